"""The archive format, version 1: snapshots in one safetensors file. The byte table is in
``docs/format/archive.md``.

Every buffer of every segment is a tensor; manifests, namespaces and segment headers are in the
file's metadata. The header of an archive follows from those alone: a reader builds it again and
compares, so that nothing else can be in one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from engram.core.canonical import canonical_json
from engram.core.namespace import MAX_NAMESPACE_BYTES, Namespace
from engram.errors import (
    InvalidRequestError,
    SegmentCorruptError,
    SnapshotCorruptError,
    StoreFormatError,
)
from engram.snapshot.manifest import Manifest, decode_manifest, encode_manifest
from engram.snapshot.segment import (
    BUFFER_ALIGNMENT,
    MAGIC,
    MAX_HEADER_BYTES,
    PAGE_BYTES,
    PREAMBLE,
    SegmentHeader,
    Shard,
    payload_offset,
)
from engram.snapshot.segment import (
    VERSION as SEGMENT_VERSION,
)

VERSION: Final = 1
LENGTH_BYTES: Final = 8
MAX_ARCHIVE_HEADER_BYTES: Final = 64 << 20
"""Below what the safetensors library reads, 100 MB."""

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True)
class ArchivedSegment:
    """A segment of an archive: its payload starts ``offset`` bytes into the data."""

    segment_id: str
    header: SegmentHeader
    offset: int

    @property
    def end(self) -> int:
        """Where its payload ends in the data."""
        return self.offset + self.header.payload_length


@dataclass(frozen=True)
class Archive:
    """What an archive holds, and where. Made by `plan_archive` or `decode_archive`.

    All manifests are of one tenant; segments and namespaces are exactly those they name.
    """

    manifests: tuple[Manifest, ...]
    namespaces: tuple[Namespace, ...]
    segments: tuple[ArchivedSegment, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the data: its length, the JSON, and spaces up to a page's end.

        Raises `InvalidRequestError` above `MAX_ARCHIVE_HEADER_BYTES`.
        """
        described = {"__metadata__": self._metadata(), **self._tensors()}
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        length = -(-(LENGTH_BYTES + len(text)) // PAGE_BYTES) * PAGE_BYTES - LENGTH_BYTES
        if length > MAX_ARCHIVE_HEADER_BYTES:
            raise InvalidRequestError(
                f"the archive's header would have {length} bytes, "
                f"{MAX_ARCHIVE_HEADER_BYTES} are allowed",
                hint="export one branch or one snapshot at a time",
            )
        return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)

    @property
    def data_length(self) -> int:
        """Bytes of the data behind the header."""
        return self.segments[-1].end

    @property
    def file_length(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_length

    def _metadata(self) -> dict[str, str]:
        return {
            "engram_archive": str(VERSION),
            "manifests": "".join(encode_manifest(m).decode() for m in self.manifests),
            "namespaces": "".join(n.canonical.decode() + "\n" for n in self.namespaces),
            "segments": "".join(
                f"{s.segment_id} {canonical_json(s.header.model_dump(mode='json')).decode()}\n"
                for s in self.segments
            ),
        }

    def _tensors(self) -> dict[str, dict[str, object]]:
        tensors: dict[str, dict[str, object]] = {}
        position = 0

        def pad(number: int, end: int) -> None:
            # Safetensors knows no holes: what lies between two buffers is a tensor too.
            if position < end:
                tensors[f"{number}/+{position}"] = _tensor("U8", (end - position,), position, end)

        for number, segment in enumerate(self.segments):
            for buffer in segment.header.buffers:
                start = segment.offset + buffer.offset
                pad(number, start)
                position = start + buffer.length
                tensors[f"{number}/{buffer.name}"] = _tensor(
                    buffer.dtype, buffer.shape, start, position
                )
        return tensors


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    engram_archive: str
    manifests: str
    namespaces: str
    segments: str


class _Version(msgspec.Struct):
    engram_archive: str


class _VersionHeader(msgspec.Struct):
    metadata: _Version = msgspec.field(name="__metadata__")


class _Header(msgspec.Struct):
    # The tensors are not read but computed again; so no memory is spent on them.
    metadata: _Metadata = msgspec.field(name="__metadata__")


def plan_archive(
    manifests: Iterable[Manifest],
    namespaces: Iterable[Namespace],
    segments: Iterable[tuple[str, SegmentHeader]],
) -> Archive:
    """An archive of these, in this order.

    Raises `SnapshotCorruptError` unless segments and namespaces are those that the manifests name.
    """
    placed: list[ArchivedSegment] = []
    for segment_id, header in segments:
        end = placed[-1].end if placed else 0
        offset = -(-end // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        placed.append(ArchivedSegment(segment_id, header, offset))
    archive = Archive(tuple(manifests), tuple(namespaces), tuple(placed))
    _check_closed(archive)
    return archive


def header_length(data: bytes) -> int:
    """The length of an archive's JSON, told by its first 8 bytes. `InvalidRequestError`."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or not 2 <= length <= MAX_ARCHIVE_HEADER_BYTES:
        raise _no_archive("its first 8 bytes are not the length of a header")
    return length


def decode_archive(header: bytes) -> Archive:
    """The archive that starts with ``header``: 8 bytes of length and the JSON.

    What is in it is checked for itself and against each other; payloads are the caller's to check.
    Raises `InvalidRequestError` for what is no archive at all, `StoreFormatError` for another
    version, `SnapshotCorruptError` for one that is damaged.
    """
    text = header[LENGTH_BYTES:]
    try:
        version = msgspec.json.decode(text, type=_VersionHeader).metadata.engram_archive
    except _UNREADABLE:
        raise _no_archive("it has no header of one") from None
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise _no_archive("its version is no number")
    if int(version) != VERSION:
        raise StoreFormatError.of("the archive", int(version), VERSION)
    try:
        metadata = msgspec.json.decode(text, type=_Header).metadata
    except _UNREADABLE as error:
        raise SnapshotCorruptError(f"the archive's metadata is damaged: {error}") from None
    archive = plan_archive(
        [decode_manifest(line + b"\n") for line in _lines(metadata.manifests)],
        [_namespace(line) for line in _lines(metadata.namespaces)],
        [_segment(line) for line in _lines(metadata.segments)],
    )
    if archive.header != header:
        raise SnapshotCorruptError("the archive's header is not the one of what it holds")
    return archive


def segments_of(manifest: Manifest) -> list[tuple[Shard, str]]:
    """All that a manifest names, rank after rank."""
    return [(shard, ref.segment_id) for shard, chain in manifest.shards() for ref in chain]


def _check_closed(archive: Archive) -> None:
    if not archive.manifests:
        raise SnapshotCorruptError("the archive holds no snapshot")
    ids = [manifest.snapshot_id for manifest in archive.manifests]
    if len(set(ids)) != len(ids) or len({m.tenant for m in archive.manifests}) != 1:
        raise SnapshotCorruptError("the archive holds two snapshots of one id, or of two tenants")
    places = {(m.conversation_id, m.branch_name, m.turn_number) for m in archive.manifests}
    if len(places) != len(ids):
        raise SnapshotCorruptError("the archive holds two snapshots of one turn")
    held = [(segment.header.shard, segment.segment_id) for segment in archive.segments]
    named = {key for manifest in archive.manifests for key in segments_of(manifest)}
    if len(set(held)) != len(held) or set(held) != named:
        raise SnapshotCorruptError("the archive's segments are not those that its snapshots name")
    described = [namespace.id for namespace in archive.namespaces]
    if sorted(described) != sorted({manifest.namespace for manifest in archive.manifests}):
        raise SnapshotCorruptError("the archive's namespaces are not those of its snapshots")


def _lines(text: str) -> Iterator[bytes]:
    """The lines of a record list, each of which ends in a line feed; one at a time, since there
    may be millions and the first be wrong."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise SnapshotCorruptError("the archive's metadata is no valid Unicode") from None
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        if end < 0:
            raise SnapshotCorruptError("the archive's metadata is cut short")
        yield data[start:end]
        start = end + 1


def _namespace(line: bytes) -> Namespace:
    if len(line) > MAX_NAMESPACE_BYTES:
        raise SnapshotCorruptError(f"a namespace of the archive has {len(line)} bytes")
    try:
        return Namespace.from_canonical(line)
    except ValueError as error:
        raise SnapshotCorruptError(f"a namespace of the archive: {error}") from None


def _segment(line: bytes) -> tuple[str, SegmentHeader]:
    segment_id, _, encoded = line.partition(b" ")
    if not 2 <= len(encoded) <= MAX_HEADER_BYTES:
        raise SegmentCorruptError("a segment header of the archive has an impossible length")
    prefix = PREAMBLE.pack(MAGIC, SEGMENT_VERSION, len(encoded)) + encoded
    header = SegmentHeader.decode(prefix.ljust(payload_offset(prefix), b"\0"))
    # Whether it is a digest shows when it is compared with those that manifests name.
    return segment_id.decode(), header


def _tensor(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _no_archive(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"this is no Engram archive: {why}", hint="engram export writes them"
    )
