"""Segments as files: written once through the durable writer, read into the caller's memory.

A store with a keyring writes them encrypted; whatever lies there is read, encrypted or not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engram.core.canonical import DIGEST_BYTES
from engram.core.tokens import TokenArray, tokens_from_bytes
from engram.errors import (
    InternalError,
    SegmentCorruptError,
    StoreError,
    StoreFormatError,
)
from engram.snapshot.digest import PIECE_BYTES, SegmentHasher, check_sealed, pieces, seal
from engram.snapshot.segment import (
    PREAMBLE,
    SegmentHeader,
    Shard,
    checked_payload,
    payload_offset,
)
from engram.store.base import BufferProvider, HeaderCheck, SegmentStore, StoredSegment
from engram.store.durable import (
    DirectoryMaker,
    store_error,
    sync_directory,
    unlink_durable,
    walk_names,
    write_durable,
)
from engram.store.encryption import (
    MAGIC,
    DecryptingReader,
    ReadExactly,
    encrypt,
    encrypted_length,
    is_encrypted,
)
from engram.store.filesystem import FileSystem
from engram.store.keyring import Keyring
from engram.store.layout import SEGMENT_SUFFIX, Layout, is_digest
from engram.store.quarantine import Quarantine


@dataclass(frozen=True)
class _OpenSegment:
    """``read`` reads the segment file, decrypted where it is stored encrypted."""

    read: ReadExactly
    header: SegmentHeader


class DiskSegments(SegmentStore):
    """The segments of a `DiskStore`."""

    _layout: Layout
    _directories: DirectoryMaker
    _quarantine: Quarantine
    _fs: FileSystem
    _keyring: Keyring | None

    def put_segment(
        self, header: SegmentHeader, payload: memoryview, segment_id: str | None = None
    ) -> str:
        payload = checked_payload(header, payload)
        if not header.padding_is_zero(payload):
            raise InternalError(
                "the payload has bytes between its buffers", hint="call header.clear_padding"
            )
        if segment_id is None:
            segment_id = seal(header, payload).hex()
        path = self._layout.segment(header.shard, segment_id)
        self._directories.ensure(path.parent)
        if self._is_intact(header, segment_id):
            # The name may not be durable yet: an earlier put may have failed at that very step.
            sync_directory(path.parent, self._fs)
        else:
            parts, length = _file_parts(header, payload, segment_id), header.file_length
            if self._keyring is not None:
                parts = encrypt(parts, length, self._keyring, header.shard, segment_id)
                length = encrypted_length(length)
            write_durable(path, parts, needed=length, fs=self._fs)
        return segment_id

    def has_segment(self, shard: Shard, segment_id: str, length: int | None = None) -> bool:
        path = self._layout.segment(shard, segment_id)
        try:
            status = path.stat()
        except OSError:
            return False
        if length is None:
            return stat.S_ISREG(status.st_mode)
        fitting = (length, encrypted_length(length))
        return stat.S_ISREG(status.st_mode) and status.st_size in fitting

    def read_segment(self, shard: Shard, segment_id: str, into: BufferProvider) -> SegmentHeader:
        with self._opened(shard, segment_id) as segment:
            header = segment.header
            payload = checked_payload(header, into(header))
            if payload.readonly:
                raise InternalError("the buffer to read a segment into is read-only")
            hasher = SegmentHasher(header.prefix)
            offset = len(header.prefix)
            for piece in pieces(payload):
                segment.read(piece, offset)
                hasher.update(piece)
                offset += len(piece)
            check_sealed(header, payload, hasher.digest(), self._trailer(segment, segment_id))
            return header

    def verify_segment(self, shard: Shard, segment_id: str) -> SegmentHeader:
        with self._opened(shard, segment_id) as segment:
            trailer = self._trailer(segment, segment_id)
            header = segment.header
            if _hash(segment.read, header.file_length - DIGEST_BYTES) != trailer:
                raise SegmentCorruptError("segment does not match its digest")
            for start, end in header.gaps():
                gap = memoryview(bytearray(end - start))
                segment.read(gap, len(header.prefix) + start)
                if any(gap):
                    raise SegmentCorruptError("segment has bytes between its buffers")
            return header

    def iter_payload(
        self, shard: Shard, segment_id: str, check: HeaderCheck | None = None
    ) -> Iterator[memoryview]:
        with self._opened(shard, segment_id) as segment:
            header = segment.header
            if check is not None:
                check(header)
            trailer = self._trailer(segment, segment_id)
            hasher = SegmentHasher(header.prefix)
            buffer = memoryview(bytearray(min(header.payload_length, PIECE_BYTES)))
            for start in range(0, header.payload_length, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, header.payload_length - start)]
                segment.read(piece, len(header.prefix) + start)
                hasher.update(piece)
                yield piece
            if hasher.digest() != trailer:
                raise SegmentCorruptError("segment does not match its digest")

    def read_tokens(self, shard: Shard, segment_id: str) -> tuple[SegmentHeader, TokenArray]:
        with self._opened(shard, segment_id) as segment:
            data = memoryview(bytearray(segment.header.tokens_length))
            segment.read(data, len(segment.header.prefix))
            return segment.header, tokens_from_bytes(data)

    def delete_segment(self, shard: Shard, segment_id: str) -> None:
        unlink_durable(self._layout.segment(shard, segment_id), self._fs)

    def iter_segments(self) -> Iterator[StoredSegment]:
        try:
            shards = list(self._layout.shards())
        except OSError as error:
            raise store_error("list", self._layout.segments, error) from error
        for shard, path in shards:
            for directory, names in walk_names(path):
                for name in names:
                    segment_id = name.removesuffix(SEGMENT_SUFFIX)
                    if name.endswith(SEGMENT_SUFFIX) and is_digest(segment_id):
                        try:
                            status = os.stat(directory / name)
                        except FileNotFoundError:
                            continue
                        except OSError as error:
                            raise store_error("look at", directory / name, error) from error
                        yield StoredSegment(shard, segment_id, status.st_size, status.st_mtime)

    def _is_intact(self, header: SegmentHeader, segment_id: str) -> bool:
        """Whether the very segment is stored. A damaged file is quarantined; what the device
        cannot read is replaced like one that is not there."""
        if not self.has_segment(header.shard, segment_id):
            return False
        try:
            return self.verify_segment(header.shard, segment_id) == header
        except StoreFormatError:
            raise
        except (SegmentCorruptError, StoreError):
            return False

    @contextmanager
    def _opened(self, shard: Shard, segment_id: str) -> Iterator[_OpenSegment]:
        """An open segment with its header parsed. Damage found inside is quarantined and named."""
        path = self._layout.segment(shard, segment_id)
        try:
            fd = self._fs.open_read(path)
        except FileNotFoundError:
            moved_to = self._quarantine.find(path.name)
            raise _corrupt(path, "is missing", moved_to, segment_id) from None
        except OSError as error:
            raise store_error("open", path, error) from error
        try:
            read, size = self._reader(fd, shard, segment_id)
            yield _OpenSegment(read, _read_header(read, size, shard, segment_id))
        except SegmentCorruptError as error:
            moved_to = self._quarantine_open(fd, path, error.message)
            raise _corrupt(path, f"is damaged: {error.message}", moved_to, segment_id) from None
        except OSError as error:
            raise store_error("read", path, error) from error
        finally:
            self._fs.close(fd)

    def _reader(self, fd: int, shard: Shard, segment_id: str) -> tuple[ReadExactly, int]:
        """How to read the segment file that ``fd`` holds, encrypted or not, and its length."""

        def read(buffer: memoryview, offset: int) -> None:
            self._read_exactly(fd, buffer, offset)

        size = os.fstat(fd).st_size
        beginning = bytearray(min(size, len(MAGIC)))
        read(memoryview(beginning), 0)
        if not is_encrypted(bytes(beginning)):
            return read, size
        reader = DecryptingReader(read, size, self._keyring, shard, segment_id)
        return reader, reader.length

    def _trailer(self, segment: _OpenSegment, segment_id: str) -> bytes:
        """The file's closing digest, which must be the one it is named after."""
        trailer = bytearray(DIGEST_BYTES)
        segment.read(memoryview(trailer), segment.header.file_length - DIGEST_BYTES)
        if trailer.hex() != segment_id:
            raise SegmentCorruptError("segment does not end in the digest it is named after")
        return bytes(trailer)

    def _read_exactly(self, fd: int, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = self._fs.read_into(fd, buffer, offset)
            if count == 0:
                raise SegmentCorruptError("segment is cut short")
            buffer = buffer[count:]
            offset += count

    def _quarantine_open(self, fd: int, path: Path, reason: str) -> Path | None:
        """Quarantine what ``fd`` has open, unless another process has replaced it meanwhile."""
        found = os.fstat(fd)
        try:
            if not os.path.samestat(found, path.stat()):
                return None
        except OSError:
            return None
        return self._quarantine.take(path, reason, found)


def _read_header(read: ReadExactly, size: int, shard: Shard, segment_id: str) -> SegmentHeader:
    """The header of the segment file of ``size`` bytes that ``read`` reads."""
    preamble = bytearray(min(size, PREAMBLE.size))
    read(memoryview(preamble), 0)
    try:
        length = payload_offset(bytes(preamble))
    except StoreFormatError:
        # Every version ends in the digest of all that comes before. If it holds, the file is
        # a newer Engram's; if not, the version number is what was damaged.
        if size < DIGEST_BYTES or _hash(read, size - DIGEST_BYTES).hex() != segment_id:
            raise SegmentCorruptError("segment version is damaged") from None
        raise
    if size < length:
        raise SegmentCorruptError("segment is cut short in its header")
    prefix = bytearray(length)
    read(memoryview(prefix), 0)
    header = SegmentHeader.decode(bytes(prefix))
    if size != header.file_length:
        raise SegmentCorruptError(f"segment has {size} bytes instead of {header.file_length}")
    if header.shard != shard:
        raise SegmentCorruptError("segment lies in the directory of another shard")
    return header


def _hash(read: ReadExactly, size: int) -> bytes:
    """BLAKE3 of a segment file's first ``size`` bytes, in bounded memory."""
    hasher = SegmentHasher(b"")
    buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
    for offset in range(0, size, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, size - offset)]
        read(piece, offset)
        hasher.update(piece)
    return hasher.digest()


def _file_parts(
    header: SegmentHeader, payload: memoryview, segment_id: str
) -> Iterator[memoryview | bytes]:
    """The parts of a segment file, hashed on their way so that the id is never a promise only."""
    hasher = SegmentHasher(header.prefix)
    yield header.prefix
    for piece in pieces(payload):
        hasher.update(piece)
        yield piece
    digest = hasher.digest()
    if digest.hex() != segment_id:
        raise InternalError(
            f"the payload is not segment {segment_id}: its memory was changed after it was sealed"
        )
    yield digest


def _corrupt(path: Path, what: str, moved_to: Path | None, segment_id: str) -> SegmentCorruptError:
    where = f"; it lies in {moved_to}" if moved_to else ""
    return SegmentCorruptError(
        f"segment {path} {what}{where}",
        hint="the conversation goes on by computing it again; restore an earlier snapshot, "
        "or put the file back from a backup",
        details={
            "segment_id": segment_id,
            "file": str(path),
            "quarantined_to": None if moved_to is None else str(moved_to),
        },
    )
