"""How the segments of one rank's model are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engram.snapshot.segment import BufferSpec, SegmentHeader, Shard
from engram.tiers.base import PayloadLayout


@dataclass(frozen=True)
class SegmentPlanner:
    """Headers of the segments of a shard, whose payloads are as `layout` says."""

    shard: Shard
    layout: PayloadLayout

    def header(
        self, key: str, start: int, end: int, parent: str | None, has_state: bool
    ) -> SegmentHeader:
        """The header of rows [start, end), or of the state at `end` = `start`."""
        return SegmentHeader.plan(
            shard=self.shard,
            key=key,
            start=start,
            end=end,
            parent=parent,
            has_state=has_state,
            buffers=self.layout(end - start, has_state),
        )

    def unplaced(self, key: str, start: int, end: int, has_state: bool) -> SegmentHeader:
        """As `header`, with a parent that is none: lengths and offsets do not depend on which it
        is, and its id may not be known before it is written."""
        return self.header(key, start, end, key if start else None, has_state)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that the rows of one token take, the token included."""
        return sum(spec.length for spec in self.buffers("00" * 32, 0, 1, False))

    def buffers(self, key: str, start: int, end: int, has_state: bool) -> tuple[BufferSpec, ...]:
        """Where each buffer lies in a payload."""
        return self.unplaced(key, start, end, has_state).buffers
