"""Hot rows kept in memory: a bounded cache that admits by frequency.

Words of a language are unevenly used, and so are n-grams: few rows serve most lookups. A row that
comes once must not push out one that comes often, so a row enters only when it was asked for more
often than the one it would replace (TinyLFU, Einziger, Friedman and Manes 2017). Everything works
on whole batches in numpy: rows are found by set, as in a processor's cache.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from engram.conditional_memory.tables.base import Bytes, Int64Array, RowSource
from engram.errors import InvalidRequestError

WAYS: Final = 8
_COUNTERS_PER_ROW: Final = 4  # of the sketch, for each row of capacity
_AGE_AFTER: Final = 10  # lookups per row of capacity between two halvings of the counters
_MIX: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))

Indices = npt.NDArray[np.int64]


@dataclass
class CacheStatistics:
    """Rows counted since the cache was made."""

    hits: int = 0
    misses: int = 0
    admitted: int = 0
    evicted: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits among all lookups, 0 .. 1."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


class HotRowCache:
    """A `RowSource` in front of another, holding at most ``capacity_bytes`` of rows.

    Tags and counters come on top: about 20 bytes a row. Safe to use from several threads; one
    reads from the source while others look up.
    """

    def __init__(self, source: RowSource, row_bytes: int, capacity_bytes: int) -> None:
        sets = capacity_bytes // (row_bytes * WAYS)
        if sets < 1:
            raise InvalidRequestError(
                f"a cache of {capacity_bytes} bytes holds no rows of {row_bytes} bytes",
                hint=f"give it at least {row_bytes * WAYS} bytes",
            )
        self._source = source
        self._tags = np.full((sets, WAYS), -1, dtype=np.int64)
        self._rows: Bytes = np.empty((sets * WAYS, row_bytes), dtype=np.uint8)
        self._sketch = _FrequencySketch(sets * WAYS)
        self._lock = threading.Lock()
        self.statistics = CacheStatistics()

    @property
    def capacity(self) -> int:
        """Rows it can hold."""
        return self._tags.size

    def read(self, ids: Int64Array) -> Bytes:
        """Distinct ``ids`` int64 [n] to bytes [n, row_bytes]."""
        out = np.empty((len(ids), self._rows.shape[1]), dtype=np.uint8)
        sets = _hash(ids, 0) % np.uint64(len(self._tags))
        with self._lock:
            slots = self._find(ids, sets)
            hit = slots >= 0
            out[hit] = self._rows[slots[hit]]
            self._sketch.add(ids)
            self.statistics.hits += int(hit.sum())
            self.statistics.misses += int((~hit).sum())
        missing = np.flatnonzero(~hit)
        if len(missing):
            # Outside the lock: the disk is slow, and others may find their rows meanwhile.
            rows = self._source.read(ids[missing])
            out[missing] = rows
            with self._lock:
                self._admit(ids[missing], sets[missing], rows)
        return out

    def _find(self, ids: Int64Array, sets: npt.NDArray[np.uint64]) -> Indices:
        """The slot of each id, or -1."""
        ways = self._tags[sets] == ids[:, None]
        slots = sets.astype(np.int64) * WAYS + ways.argmax(1)
        return np.where(ways.any(1), slots, -1)

    def _admit(self, ids: Int64Array, sets: npt.NDArray[np.uint64], rows: Bytes) -> None:
        """Put in the rows that are asked for more often than the rarest of their set."""
        # Another thread may have put an id in meanwhile.
        left = np.flatnonzero(self._find(ids, sets) < 0)
        # Of ids in one set each must see the effect of the one before; a set takes WAYS at most.
        for _ in range(WAYS):
            _, first = np.unique(sets[left], return_index=True)
            chosen = left[first]
            self._admit_one_a_set(ids[chosen], sets[chosen], rows[chosen])
            left = np.delete(left, first)
            if len(left) == 0:
                break

    def _admit_one_a_set(self, ids: Int64Array, sets: npt.NDArray[np.uint64], rows: Bytes) -> None:
        tags = self._tags[sets]
        frequency = np.where(tags < 0, -1, self._sketch.estimate(tags.ravel()).reshape(tags.shape))
        way = frequency.argmin(1)
        rarest = frequency[np.arange(len(ids)), way]
        enters = self._sketch.estimate(ids) > rarest
        slots = sets[enters].astype(np.int64) * WAYS + way[enters]
        self._tags.reshape(-1)[slots] = ids[enters]
        self._rows[slots] = rows[enters]
        self.statistics.admitted += int(enters.sum())
        self.statistics.evicted += int((rarest[enters] >= 0).sum())


class _FrequencySketch:
    """How often an id was asked for lately, approximately: a count-min sketch that ages."""

    def __init__(self, capacity: int) -> None:
        width = 1 << (capacity * _COUNTERS_PER_ROW - 1).bit_length()
        self._counters = np.zeros((len(_MIX), width), dtype=np.uint8)
        self._mask = np.uint64(width - 1)
        self._until_aging = self._period = capacity * _AGE_AFTER

    def add(self, ids: Int64Array) -> None:
        for row, counters in enumerate(self._counters):
            at = _hash(ids, row) & self._mask
            np.add(counters[at], 1, out=(added := np.empty(len(ids), np.uint8)))
            counters[at] = np.where(added == 0, 255, added)
        self._until_aging -= len(ids)
        if self._until_aging <= 0:
            self._counters >>= 1
            self._until_aging = self._period

    def estimate(self, ids: Int64Array) -> Indices:
        counts = [c[_hash(ids, r) & self._mask] for r, c in enumerate(self._counters)]
        return np.asarray(np.minimum(*counts), dtype=np.int64)


def _hash(ids: Int64Array, row: int) -> npt.NDArray[np.uint64]:
    """Spread ids over 64 bits (multiplication, then the high half onto the low)."""
    mixed = np.asarray(ids.astype(np.uint64) * _MIX[row])
    return np.asarray(mixed ^ (mixed >> np.uint64(32)))
