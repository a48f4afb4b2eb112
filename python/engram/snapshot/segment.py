"""The segment format, version 1: header, payload layout, digest. The byte table is in
``docs/format/segment.md``.

There are two kinds. *Rows* are the tokens ``[start, end)`` and their KV rows; a *state* is the
recurrent state at one token, ``start == end``. Apart, because all later turns of a conversation
need the rows, and none of them an earlier state.

A segment is what its digest says: ``segment_id`` is the BLAKE3-256 of every byte before the digest,
and the header names the parent's id, so that the last segment's id pins a whole chain.
The payload is one contiguous buffer of the caller's, laid out by `SegmentHeader.plan`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

from pydantic import BaseModel, Field, Strict, ValidationError, model_validator

from engram.core.canonical import DIGEST_BYTES, canonical_json
from engram.core.tokens import TOKEN_BYTES
from engram.errors import (
    InternalError,
    InvalidRequestError,
    SegmentCorruptError,
    StoreFormatError,
)
from engram.snapshot.dtypes import ITEM_BYTES
from engram.snapshot.fields import (
    CLOSED,
    Count,
    Digest,
    Flag,
    PositiveCount,
    first_problem,
)

MAGIC: Final = b"ENGRSEG\0"
VERSION: Final = 1
MAX_HEADER_BYTES: Final = 1 << 20
PREAMBLE: Final = struct.Struct("<8sII")
PAGE_BYTES: Final = 4096
BUFFER_ALIGNMENT: Final = 64
TOKENS: Final = "tokens"
MAX_DIMENSIONS: Final = 8

BufferName = Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9._/-]{1,128}$")]


class BufferSpec(BaseModel):
    """One named array in the payload: ``length`` bytes from ``offset``, row-major."""

    model_config = CLOSED

    name: BufferName
    dtype: Annotated[str, Strict()]
    shape: Annotated[tuple[PositiveCount, ...], Field(max_length=MAX_DIMENSIONS)]
    offset: Count
    length: PositiveCount

    @model_validator(mode="after")
    def _length_fits(self) -> BufferSpec:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype[:32]!r}")
        if self.length != math.prod(self.shape) * ITEM_BYTES[self.dtype]:
            raise ValueError("length is not the size of its shape and dtype")
        return self


@dataclass(frozen=True)
class Shard:
    """Where a segment belongs: one rank's part of one namespace."""

    namespace: str
    rank: int
    world_size: int


class SegmentHeader(BaseModel):
    """What a segment holds and its place in the chain.

    ``has_state`` tells the kind: the recurrent state at ``end`` (and ``start``), or the rows of the
    tokens ``[start, end)``. ``key`` is the chained page hash at ``end``. ``parent`` are the rows it
    stands on, which reach ``start`` or beyond; None exactly when ``start`` is 0.
    """

    model_config = CLOSED

    namespace: Digest
    rank: Count
    world_size: PositiveCount
    key: Digest
    start: Count
    end: Count
    parent: Digest | None
    has_state: Flag
    buffers: tuple[BufferSpec, ...]

    @model_validator(mode="after")
    def _consistent(self) -> SegmentHeader:
        if self.rank >= self.world_size:
            raise ValueError("rank is not below world_size")
        if self.has_state and (self.end != self.start or self.end == 0):
            raise ValueError("the end of a state is its start, and not 0")
        if not self.has_state and self.end <= self.start:
            raise ValueError("end is not after start")
        if (self.parent is None) != (self.start == 0):
            raise ValueError("parent must be null exactly when start is 0")
        if not self.buffers:
            raise ValueError("a segment must have a buffer")
        if len({buffer.name for buffer in self.buffers}) != len(self.buffers):
            raise ValueError("two buffers have one name")
        position = 0
        for buffer in self.buffers:
            if buffer.offset != _aligned(position, BUFFER_ALIGNMENT):
                raise ValueError(f"buffer {buffer.name!r} does not follow the one before it")
            position = buffer.offset + buffer.length
        self._check_tokens()
        return self

    def _check_tokens(self) -> None:
        """Rows begin with their tokens; a state has none."""
        if self.has_state:
            if any(buffer.name == TOKENS for buffer in self.buffers):
                raise ValueError("a state has no 'tokens'")
            return
        first = self.buffers[0]
        if (first.name, first.dtype) != (TOKENS, "U32"):
            raise ValueError("the first buffer must be 'tokens' of dtype U32")
        if first.shape != (self.end - self.start,):
            raise ValueError("'tokens' must have one entry for each token of [start, end)")

    @classmethod
    def plan(
        cls,
        *,
        shard: Shard,
        key: str,
        start: int,
        end: int,
        parent: str | None,
        has_state: bool,
        buffers: Iterable[tuple[str, str, Sequence[int]]],
    ) -> SegmentHeader:
        """Lay out a segment: of rows ``tokens`` first, then ``buffers`` of (name, dtype, shape).

        Raises `InvalidRequestError` for what the format does not allow.
        """
        if end <= start and not has_state:
            raise InvalidRequestError("segment header: end is not after start")
        specs: list[dict[str, object]] = []
        position = 0
        tokens = [] if has_state else [(TOKENS, "U32", (end - start,))]
        for name, dtype, shape in [*tokens, *buffers]:
            if dtype not in ITEM_BYTES:
                raise InvalidRequestError(
                    f"buffer {name!r} has the unknown dtype {dtype!r}",
                    hint=f"one of {', '.join(ITEM_BYTES)}",
                )
            offset = _aligned(position, BUFFER_ALIGNMENT)
            length = math.prod(shape) * ITEM_BYTES[dtype]
            specs.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": tuple(shape),
                    "offset": offset,
                    "length": length,
                }
            )
            position = offset + length
        try:
            header = cls.model_validate(
                {
                    "namespace": shard.namespace,
                    "rank": shard.rank,
                    "world_size": shard.world_size,
                    "key": key,
                    "start": start,
                    "end": end,
                    "parent": parent,
                    "has_state": has_state,
                    "buffers": specs,
                }
            )
        except ValidationError as error:
            raise InvalidRequestError(f"segment header: {first_problem(error)}") from None
        if len(header.prefix) > _prefix_length(MAX_HEADER_BYTES):
            raise InvalidRequestError(
                f"a segment header may have {MAX_HEADER_BYTES} bytes; use fewer buffers"
            )
        return header

    @property
    def shard(self) -> Shard:
        return Shard(self.namespace, self.rank, self.world_size)

    @cached_property
    def prefix(self) -> bytes:
        """Everything before the payload: magic, version, header length, header, zero padding."""
        encoded = canonical_json(self.model_dump(mode="json"))
        start = PREAMBLE.pack(MAGIC, VERSION, len(encoded)) + encoded
        return start.ljust(_prefix_length(len(encoded)), b"\0")

    @cached_property
    def payload_length(self) -> int:
        """Bytes of the payload: from the first buffer's start to the last one's end."""
        last = self.buffers[-1]
        return last.offset + last.length

    @property
    def file_length(self) -> int:
        """Bytes of the whole segment file."""
        return len(self.prefix) + self.payload_length + DIGEST_BYTES

    @property
    def tokens_length(self) -> int:
        """Bytes of the ``tokens`` buffer, which is the payload's first; 0 for a state."""
        return (self.end - self.start) * TOKEN_BYTES

    def view(self, payload: memoryview, name: str) -> memoryview:
        """The bytes of one buffer inside ``payload``. Raises KeyError for an unknown name."""
        for buffer in self.buffers:
            if buffer.name == name:
                return payload[buffer.offset : buffer.offset + buffer.length]
        raise KeyError(name)

    def clear_padding(self, payload: memoryview) -> None:
        """Zero the gaps between buffers, as the format demands; for reused memory."""
        for start, end in self.gaps():
            payload[start:end] = bytes(end - start)

    def padding_is_zero(self, payload: memoryview) -> bool:
        """Whether all gaps between buffers are zero."""
        return all(not any(payload[start:end]) for start, end in self.gaps())

    @classmethod
    def decode(cls, prefix: bytes) -> SegmentHeader:
        """The header of exactly the bytes before a payload (`payload_offset` tells how many).

        Raises `SegmentCorruptError` or `StoreFormatError`.
        """
        if len(prefix) != payload_offset(prefix[: PREAMBLE.size]):
            raise SegmentCorruptError("segment header is cut short")
        length = PREAMBLE.unpack_from(prefix)[2]
        encoded = prefix[PREAMBLE.size : PREAMBLE.size + length]
        try:
            header = cls.model_validate_json(encoded)
        except ValidationError as error:
            raise SegmentCorruptError(f"segment header: {first_problem(error)}") from None
        # One comparison settles key order, spaces, duplicate keys, number forms and the padding.
        if header.prefix != prefix:
            raise SegmentCorruptError("segment header is not in canonical form")
        return header

    def gaps(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of the padding between buffers, relative to the payload."""
        for before, after in zip(self.buffers, self.buffers[1:], strict=False):
            if before.offset + before.length < after.offset:
                yield before.offset + before.length, after.offset


def payload_offset(preamble: bytes) -> int:
    """Where the payload starts, told by a file's first ``PREAMBLE.size`` bytes.

    Raises `SegmentCorruptError`, or `StoreFormatError` for a version this build does not know.
    """
    if len(preamble) < PREAMBLE.size:
        raise SegmentCorruptError("segment is shorter than its preamble")
    magic, version, length = PREAMBLE.unpack_from(preamble)
    if magic != MAGIC:
        raise SegmentCorruptError("segment does not start with the magic bytes")
    if version != VERSION:
        raise StoreFormatError.of("a segment", version, VERSION)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise SegmentCorruptError(f"segment header length {length} is out of bounds")
    return _prefix_length(length)


def checked_payload(header: SegmentHeader, payload: memoryview) -> memoryview:
    """``payload`` as flat bytes. Raises `InternalError` unless its size is the header's."""
    if not payload.c_contiguous or payload.nbytes != header.payload_length:
        raise InternalError(
            f"the payload buffer must be {header.payload_length} contiguous bytes, "
            f"not {payload.nbytes}"
        )
    return payload if payload.format == "B" and payload.ndim == 1 else payload.cast("B")


def _prefix_length(header_length: int) -> int:
    return _aligned(PREAMBLE.size + header_length, PAGE_BYTES)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
