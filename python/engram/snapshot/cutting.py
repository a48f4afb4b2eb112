"""The beginning of a segment as a segment of its own.  Pure.

What it holds is decided by its header alone; its id is the digest of what `Cut.payload` yields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engram.errors import SegmentCorruptError
from engram.snapshot.digest import SegmentHasher
from engram.snapshot.segment import TOKENS, SegmentHeader


@dataclass(frozen=True)
class Cut:
    """A segment made of a stored one, ``source``, whose header is ``of``.

    It holds the first of its rows, or stands on another parent, or both.
    """

    source: str
    of: SegmentHeader
    header: SegmentHeader

    @classmethod
    def at(cls, source: str, of: SegmentHeader, *, end: int, key: str, parent: str | None) -> Cut:
        """A segment up to ``end``, where ``key`` is the page hash, on top of ``parent``.

        Raises `SegmentCorruptError` for rows that have not one row a token in every buffer.
        """
        count = end - of.start
        buffers = [(b.name, b.dtype, b.shape) for b in of.buffers if b.name != TOKENS]
        if not of.has_state and end < of.end:
            if any(shape[:1] != (of.end - of.start,) for _, _, shape in buffers):
                raise SegmentCorruptError(
                    f"segment {source} cannot be cut: a buffer has not one row a token",
                    hint="export the snapshots that use the whole of it as well",
                    details={"segment_id": source},
                )
            buffers = [(name, dtype, (count, *shape[1:])) for name, dtype, shape in buffers]
        header = SegmentHeader.plan(
            shard=of.shard,
            key=key,
            start=of.start,
            end=end,
            parent=parent,
            has_state=of.has_state,
            buffers=buffers,
        )
        return cls(source, of, header)

    def payload(self, pieces: Iterable[memoryview]) -> Iterator[memoryview | bytes]:
        """The payload, made of the source's own, which comes in ``pieces`` and is read to its end.

        What it yields is valid until the next is asked for.
        """
        spans = [
            (whole.offset, own.length, own.offset)
            for whole, own in zip(self.of.buffers, self.header.buffers, strict=True)
        ]
        position = written = 0
        for piece in pieces:
            stop = position + len(piece)
            while spans:
                start, length, target = spans[0]
                first, last = max(start, position), min(start + length, stop)
                if first < last:
                    if written < target:
                        yield bytes(target - written)
                        written = target
                    yield piece[first - position : last - position]
                    written += last - first
                if start + length > stop:
                    break
                spans.pop(0)
            position = stop

    def segment_id(self, pieces: Iterable[memoryview]) -> str:
        """The id of the segment, from the pieces of the source's payload."""
        hasher = SegmentHasher(self.header.prefix)
        for part in self.payload(pieces):
            hasher.update(part)
        return hasher.digest().hex()
