"""The RAM tier: a bounded pool of host buffers and the boundary index over them.

The index maps a boundary key to its `Boundary`.  Page keys are chained, so it holds boundaries, not
pages: a lookup walks back from the end of a request to the first boundary held.

Eviction takes what nobody asked to keep before anything that somebody did; within each of the two
the least recently used goes first, and a boundary goes before the ones it stands on: using a chain
touches its parents last.  What is held (leased, being written, being filled) never goes.
A durable boundary keeps its entry when its bytes leave RAM; the others are forgotten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain
from threading import RLock
from typing import Final

import torch

from engram.errors import RamTierFullError
from engram.snapshot.segment import BufferSpec
from engram.tiers.base import Boundary, Fill, TierStats

MAX_COLD_ENTRIES: Final = 65_536
"""Durable boundaries remembered without their bytes; a few hundred bytes each."""


class RamTier:
    """Bounded host memory for segments.  Every method may be called from any thread.

    `capacity` is in bytes; `pinned` asks for page-locked memory, which device copies need to
    overlap with computation; `stats` are the counters to go on with.
    """

    def __init__(
        self, capacity: int, *, pinned: bool = False, stats: TierStats | None = None
    ) -> None:
        self.capacity = capacity
        self.pinned = pinned
        self.used = 0
        self.stats = stats or TierStats()
        self.lock = RLock()
        self._index: dict[str, Boundary] = {}
        # What has room here, least recently used first.
        self._unwanted: OrderedDict[Boundary, None] = OrderedDict()
        self._wanted: OrderedDict[Boundary, None] = OrderedDict()
        self._cold: OrderedDict[Boundary, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def held(self) -> int:
        """Bytes that cannot give way now: leased, being written, loaded or filled."""
        with self.lock:
            return sum(node.nbytes for node in chain(self._unwanted, self._wanted) if node.holders)

    def get(self, key: str) -> Boundary | None:
        """The boundary stored under `key`, whether or not its bytes are in RAM."""
        return self._index.get(key)

    def reserve(
        self,
        key: str,
        start: int,
        end: int,
        parent: Boundary | None,
        buffers: Sequence[BufferSpec],
        *,
        has_state: bool,
    ) -> Boundary:
        """Take room for a new boundary, to be published and filled.

        Raises `RamTierFullError` when everything that could make room is held.
        """
        boundary = Boundary(key, start, end, parent, tuple(buffers), has_state, holders=1)
        with self.lock:
            self._take_room(boundary)
        return boundary

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A host buffer of `nbytes` (uint8, 1-d, pinned where asked for); may be slow."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)

    def publish(self, boundary: Boundary, *, replace: bool = False) -> Boundary:
        """Put a reserved boundary into the index and return the one that stands there.

        The first write wins unless `replace`: keys name tokens, not bits, so a second computation
        of the same tokens must not change what others already read.  What lost stays in RAM for
        its holders and goes like everything else when room is needed.
        """
        with self.lock:
            if boundary.in_ram:
                self._queue(boundary)[boundary] = None
            held = self._index.get(boundary.key)
            if held is not None and held is not boundary and not replace and self.whole(held):
                return held
            if held is not None and held is not boundary:
                self._unlist(held)
            self._index[boundary.key] = boundary
            return boundary

    def complete(self, boundary: Boundary) -> None:
        """The payload is whole: lookups may promise it from now on."""
        with self.lock:
            boundary.fill = Fill.READY
            boundary.holders -= 1
        boundary.filled.set_result(None)

    def fail(self, boundary: Boundary, error: BaseException) -> None:
        """The payload could not be filled: give its room back and forget what has no file."""
        with self.lock:
            boundary.fill = Fill.FAILED
            boundary.holders -= 1
            self._drop_payload(boundary)
            if not boundary.durable:
                self._unlist(boundary)
        boundary.filled.set_exception(error)

    def whole(self, boundary: Boundary) -> bool:
        """True when every part of the chain is in RAM, being filled, or durable."""
        return all(
            node.durable or (node.in_ram and node.fill is not Fill.FAILED)
            for node in boundary.ancestors()
        )

    def loadable(self, boundary: Boundary, after: int) -> bool:
        """True when the bytes past token `after` are in RAM."""
        return all(node.resident for node in boundary.chain(after))

    def longest(self, keys: Sequence[str]) -> Boundary | None:
        """The boundary of the last key on which a new segment may stand."""
        with self.lock:
            for key in reversed(keys):
                boundary = self._index.get(key)
                if boundary is not None and self.whole(boundary):
                    return boundary
        return None

    def hold(self, boundaries: Iterable[Boundary]) -> tuple[Boundary, ...]:
        """Keep boundaries in RAM until `release`; counts as a use."""
        with self.lock:
            held = tuple(boundaries)
            for boundary in held:
                boundary.holders += 1
            self.touch(held)
            return held

    def release(self, held: Iterable[Boundary]) -> None:
        """Undo one `hold`."""
        with self.lock:
            for boundary in held:
                boundary.holders -= 1

    def touch(self, boundaries: Iterable[Boundary]) -> None:
        """Mark a chain as just used; parents come out more recent than their children."""
        with self.lock:
            for boundary in sorted(boundaries, key=lambda b: -b.end):
                queue = self._queue(boundary)
                if boundary in queue:
                    queue.move_to_end(boundary)

    def want(self, boundary: Boundary) -> None:
        """Somebody asked to keep this chain: it goes only when nothing unwanted is left to go."""
        with self.lock:
            for node in boundary.ancestors():
                if node.wanted:
                    return
                node.wanted = True
                if node in self._unwanted:
                    del self._unwanted[node]
                    self._wanted[node] = None

    def mark_durable(self, boundary: Boundary, segment_id: str) -> None:
        """The segment file of this boundary is on disk under `segment_id`."""
        with self.lock:
            boundary.segment_id = segment_id

    def forget_files(self, segment_ids: frozenset[str]) -> None:
        """These segment files are gone: their boundaries live on only where bytes are in RAM."""
        with self.lock:
            for boundary in list(self._index.values()):
                if boundary.segment_id in segment_ids:
                    self.lose_file(boundary)

    def lose_file(self, boundary: Boundary) -> None:
        """The segment file of this boundary, listed or not, is gone."""
        with self.lock:
            boundary.segment_id = None
            if not boundary.in_ram:
                self._unlist(boundary)

    def _queue(self, boundary: Boundary) -> OrderedDict[Boundary, None]:
        return self._wanted if boundary.wanted else self._unwanted

    def clear(self) -> None:
        """Forget every boundary, and the bytes of those that nobody holds."""
        with self.lock:
            for boundary in [*self._unwanted, *self._wanted]:
                if not boundary.holders:
                    self._drop_payload(boundary)
            self._index.clear()
            self._cold.clear()

    def _take_room(self, boundary: Boundary) -> None:
        # Counted before room is made, so that a parent does not go to make room for its child.
        if boundary.parent is not None:
            boundary.parent.resident_children += 1
        try:
            self._make_room(boundary.nbytes)
        except RamTierFullError:
            if boundary.parent is not None:
                boundary.parent.resident_children -= 1
            raise
        self.used += boundary.nbytes
        boundary.in_ram = True

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self.capacity:
            raise RamTierFullError(
                f"a segment of {nbytes} bytes is larger than the RAM tier ({self.capacity} bytes)",
                hint="raise --max-warm-memory-gb",
            )
        if self.used + nbytes <= self.capacity:
            return
        victims = self._victims(self.used + nbytes - self.capacity)
        if victims:
            for boundary in victims:
                self._evict(boundary)
            return
        raise RamTierFullError(
            f"the RAM tier is full: {self.used} of {self.capacity} bytes are held",
            hint="raise --max-warm-memory-gb, or retry when running saves and restores are done",
        )

    def _victims(self, wanted: int) -> list[Boundary]:
        """What to evict for `wanted` bytes, children before parents; nothing if not enough."""
        victims: list[Boundary] = []
        passed: set[Boundary] = set()
        gone: Counter[Boundary] = Counter()
        for boundary in chain(self._unwanted, self._wanted):
            node: Boundary | None = boundary
            while node is not None:
                children = node.resident_children - gone[node]
                if node.holders or children or node.fill is Fill.FILLING:
                    passed.add(node)
                    break
                victims.append(node)
                wanted -= node.nbytes
                if wanted <= 0:
                    return victims
                parent = node.parent
                if parent is not None:
                    gone[parent] += 1
                # One that was passed over for its child's sake has been used less recently.
                node = parent if parent in passed else None
        return []

    def _evict(self, boundary: Boundary) -> None:
        self._drop_payload(boundary)
        self.stats.evicted += 1
        if not boundary.durable:
            self._unlist(boundary)
        elif self._index.get(boundary.key) is boundary:
            self._cold[boundary] = None
            if len(self._cold) > MAX_COLD_ENTRIES:
                self._unlist(next(iter(self._cold)))

    def _drop_payload(self, boundary: Boundary) -> None:
        if not boundary.in_ram:
            return
        boundary.in_ram = False
        boundary.payload = None
        self.used -= boundary.nbytes
        self._queue(boundary).pop(boundary, None)
        if boundary.parent is not None:
            boundary.parent.resident_children -= 1

    def _unlist(self, boundary: Boundary) -> None:
        """Take a boundary out of the index; its bytes go when its last holder lets go."""
        self._cold.pop(boundary, None)
        if self._index.get(boundary.key) is boundary:
            del self._index[boundary.key]
