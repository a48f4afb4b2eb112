"""Do a manifest and the segments it names agree?  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engram.core.tokens import TokenArray, tokens_digest
from engram.snapshot.manifest import Manifest, SegmentRef
from engram.snapshot.segment import SegmentHeader


@dataclass(frozen=True, slots=True)
class Link:
    """What a segment's header says about its place, without its buffers; ``bytes`` is its file's
    length."""

    key: str
    start: int
    end: int
    parent: str | None
    has_state: bool
    bytes: int

    @classmethod
    def of(cls, header: SegmentHeader) -> Link:
        return cls(
            header.key,
            header.start,
            header.end,
            header.parent,
            header.has_state,
            header.file_length,
        )


def chain_problem(chain: Sequence[SegmentRef], links: Sequence[Link]) -> str | None:
    """In which segment, and in what, a manifest's chain differs from the headers of its segments.

    None if all agree. Rows may be used in part: then only their key is another.
    """
    parent = None
    for ref, link in zip(chain, links, strict=True):
        in_part = not link.has_state and ref.end < link.end
        wanted = {
            "start": (ref.start, link.start),
            "end": (ref.end, ref.end if in_part else link.end),
            "key": (ref.key, ref.key if in_part else link.key),
            "has_state": (ref.has_state, link.has_state),
            "bytes": (ref.bytes, link.bytes),
            "parent": (parent, link.parent),
        }
        for field, (named, found) in wanted.items():
            if named != found:
                return (
                    f"segment {ref.segment_id} is not the one it speaks of: {field} is "
                    f"{found!r}, expected {named!r}"
                )
        parent = ref.segment_id
    return None


def tokens_problem(manifest: Manifest, rows: Iterable[TokenArray]) -> str | None:
    """Whether the tokens of a chain, one array a segment, are not the recorded ones.

    Each array is that of the whole segment, empty for a state; of rows used in part only the
    beginning counts.
    """
    used = [
        tokens[: ref.end - ref.start]
        for ref, tokens in zip(manifest.segments[0], rows, strict=True)
    ]
    if tokens_digest(*used, manifest.pending_tokens) == manifest.tokens_digest:
        return None
    return "the tokens of its segments are not those it was saved with"
