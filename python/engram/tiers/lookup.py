"""Where a sequence can go on from, as far as this rank knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from engram.tiers.base import Segment
from engram.tiers.leases import Leases
from engram.tiers.ram import RamTier

LOOKUP_LEASE_S: Final = 60.0
"""How long what a lookup promised waits for its load, should nobody say that it is not coming."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Finds boundaries: states in a model that has them (`stateful`), ends of rows in others."""

    ram: RamTier
    leases: Leases
    stateful: bool

    def boundary(self, key: str) -> Segment | None:
        """The segment from which a sequence goes on at `key`: its state there if it has one."""
        return self.ram.get(key, self.stateful)

    def stand(self, keys: Sequence[str]) -> Segment | None:
        """The rows that end at the last of `keys` from which a sequence can go on, if any do.

        Only there are they known to be the bits that who goes on from there has computed with:
        other rows of the same tokens may be of another computation.
        """
        with self.ram.lock:
            for key in reversed(keys):
                boundary = self.boundary(key)
                if boundary is not None and self.ram.whole(boundary):
                    return boundary.parent if boundary.has_state else boundary
        return None

    def promise(self, owner: str, keys: Sequence[str], page_size: int) -> list[int]:
        """Lengths, in pages of `keys`, that can be loaded now; they are leased to `owner`.

        `keys` are the page keys past some device-resident prefix, first page first.
        """
        with self.ram.lock:
            for index in range(len(keys) - 1, -1, -1):
                boundary = self.boundary(keys[index])
                if boundary is None:
                    continue
                after = boundary.end - (index + 1) * page_size
                if not self.ram.loadable(boundary, after):
                    continue
                chain = boundary.chain(after)
                ends = list(self._loadable_ends(chain))
                promised = list(dict.fromkeys([*chain, *ends]))
                self.leases.take(owner, promised, seconds=LOOKUP_LEASE_S, promised=True)
                return [(end.end - after) // page_size for end in ends]
        return []

    def _loadable_ends(self, chain: Sequence[Segment]) -> Iterator[Segment]:
        """Where on a loadable chain a sequence could go on, first one first."""
        for segment in chain:
            end = self.boundary(segment.key)
            if end is None or end is chain[-1]:
                continue
            if end is segment or (end.parent is segment and end.resident):
                yield end
        yield chain[-1]
