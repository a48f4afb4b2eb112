"""Hashing of segments: in pieces, outside the GIL, with a bounded number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from blake3 import blake3

from engram.errors import SegmentCorruptError
from engram.snapshot.segment import SegmentHeader, checked_payload

PIECE_BYTES: Final = 8 << 20
# More threads hash faster than any disk delivers, and would take cores from the scheduler.
HASH_THREADS: Final = 2


class SegmentHasher:
    """BLAKE3 over a segment's prefix and then its payload, piece by piece."""

    def __init__(self, prefix: bytes) -> None:
        self._hash = blake3(prefix, max_threads=HASH_THREADS)

    def update(self, piece: memoryview | bytes) -> None:
        self._hash.update(piece)

    def digest(self) -> bytes:
        """The 32 bytes that close a segment file; in hex, the segment id."""
        return self._hash.digest()


def pieces(payload: memoryview) -> Iterator[memoryview]:
    """``payload`` in consecutive slices of at most `PIECE_BYTES`."""
    for start in range(0, len(payload), PIECE_BYTES):
        yield payload[start : start + PIECE_BYTES]


def seal(header: SegmentHeader, payload: memoryview) -> bytes:
    """The digest (32 bytes) of a segment made of ``header`` and ``payload``.

    Raises `InternalError` if the payload has another size than the header says.
    """
    hasher = SegmentHasher(header.prefix)
    for piece in pieces(checked_payload(header, payload)):
        hasher.update(piece)
    return hasher.digest()


def verify(header: SegmentHeader, payload: memoryview, digest: bytes) -> None:
    """Raise `SegmentCorruptError` unless ``digest`` is the segment's and its padding is zero."""
    check_sealed(header, payload, seal(header, payload), digest)


def check_sealed(
    header: SegmentHeader, payload: memoryview, computed: bytes, expected: bytes
) -> None:
    """The checks of `verify` for a digest computed while the payload was read."""
    if computed != expected:
        raise SegmentCorruptError("segment does not match its digest")
    if not header.padding_is_zero(checked_payload(header, payload)):
        raise SegmentCorruptError("segment has bytes between its buffers")
