"""One portable file to snapshots: checked to its last byte before anything is written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engram.catalog.catalog import Catalog
from engram.core.ids import new_snapshot_id
from engram.core.tokens import TokenArray, tokens_from_bytes
from engram.errors import (
    InternalError,
    InvalidRequestError,
    SegmentCorruptError,
    SnapshotCorruptError,
    StoreFullError,
)
from engram.snapshot.archive import (
    LENGTH_BYTES,
    ArchivedSegment,
    decode_archive,
    header_length,
)
from engram.snapshot.digest import PIECE_BYTES, SegmentHasher
from engram.snapshot.manifest import Manifest, change_manifest
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store.disk import DiskStore
from engram.store.durable import store_error
from engram.store.filesystem import FileSystem
from engram.upkeep.exporting import OnBytes, nobody, require_whole


@dataclass(frozen=True)
class Names:
    """What imported snapshots are called here.

    They become ``tenant``'s, whoever's they were. With a ``conversation_id`` they get that and new
    snapshot ids, with a ``snapshot_id`` that one; else they keep theirs.
    """

    tenant: str = ""
    conversation_id: str | None = None
    snapshot_id: str | None = None


@dataclass(frozen=True)
class ImportReport:
    """What an import stored; ``new_bytes`` of ``bytes`` were not in the store before."""

    manifests: tuple[Manifest, ...]
    segments: int
    bytes: int
    new_segments: int
    new_bytes: int


class ArchiveFile:
    """An archive that lies in a file.

    Opening it checks header and length; `verify` everything else. The file must not change
    meanwhile.
    """

    def __init__(self, path: Path, fs: FileSystem | None = None) -> None:
        """Raises as `decode_archive` does, and `StoreError` for what cannot be read."""
        self.path = path
        self._fs = fs or FileSystem()
        try:
            self._fd = self._fs.open_read(path)
        except OSError as error:
            raise store_error("open", path, error) from error
        try:
            size = os.fstat(self._fd).st_size
            length = LENGTH_BYTES + header_length(bytes(self._read(0, min(size, LENGTH_BYTES))))
            if size < length:
                raise SnapshotCorruptError("the archive is cut short in its header")
            self.archive = decode_archive(bytes(self._read(0, length)))
            if size != self.archive.file_length:
                raise SnapshotCorruptError(
                    f"the archive has {size} bytes instead of {self.archive.file_length}"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._fs.close(self._fd)

    def __enter__(self) -> ArchiveFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def verify(self, on_bytes: OnBytes = nobody) -> None:
        """Read everything: every segment has its digest, every manifest fits its segments.

        Raises `SnapshotCorruptError`. Memory is bounded by a piece and the tokens.
        """
        headers: dict[tuple[Shard, str], SegmentHeader] = {}
        tokens: dict[tuple[Shard, str], TokenArray] = {}
        position = 0
        for segment in self.archive.segments:
            if any(self._read(self._start(position), segment.offset - position)):
                raise SnapshotCorruptError("the archive has bytes between its segments")
            position = segment.end
            key = segment.header.shard, segment.segment_id
            headers[key] = segment.header
            self._verify_payload(segment, on_bytes)
            if segment.header.rank == 0:
                start = self._start(segment.offset)
                tokens[key] = tokens_from_bytes(self._read(start, segment.header.tokens_length))
        for manifest in self.archive.manifests:
            require_whole(manifest, headers, tokens)

    def _verify_payload(self, segment: ArchivedSegment, on_bytes: OnBytes) -> None:
        hasher = SegmentHasher(segment.header.prefix)
        for start in range(segment.offset, segment.end, PIECE_BYTES):
            piece = self._read(self._start(start), min(PIECE_BYTES, segment.end - start))
            hasher.update(memoryview(piece))
            on_bytes(len(piece))
        if hasher.digest().hex() != segment.segment_id:
            raise SegmentCorruptError(
                f"segment {segment.segment_id} of the archive does not match its digest"
            )
        for start, end in segment.header.gaps():
            if any(self._read(self._start(segment.offset + start), end - start)):
                raise SegmentCorruptError(
                    f"segment {segment.segment_id} of the archive has bytes between its buffers"
                )

    def payload(self, segment: ArchivedSegment) -> memoryview:
        """A segment's payload, mapped: its pages are the system's to load and to drop again.

        If somebody cuts the file short meanwhile, touching what is gone ends the process (SIGBUS);
        a server imports files that are its own.
        """
        start = self._start(segment.offset)
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = start - first + segment.header.payload_length
        mapped = mmap.mmap(self._fd, length, access=mmap.ACCESS_READ, offset=first)
        return memoryview(mapped)[start - first :]

    def _start(self, offset: int) -> int:
        """Where in the file a place of the data is."""
        return len(self.archive.header) + offset

    def _read(self, start: int, length: int) -> bytearray:
        buffer = bytearray(length)
        filled = 0
        with memoryview(buffer) as view:
            while filled < length:
                try:
                    count = self._fs.read_into(self._fd, view[filled:], start + filled)
                except OSError as error:
                    raise store_error("read", self.path, error) from error
                if count == 0:
                    raise SnapshotCorruptError("the archive is cut short")
                filled += count
        return buffer


def import_archive(
    store: DiskStore,
    catalog: Catalog,
    file: ArchiveFile,
    names: Names,
    *,
    on_bytes: OnBytes = nobody,
) -> ImportReport:
    """Store the snapshots of an archive that was verified: segments, then manifests, then rows.

    The caller holds the store's lock, and lets no deletion in meanwhile. Each snapshot is there
    whole or not at all; on an error none is, and segments that nothing names may have been left.
    Raises `AlreadyExistsError` for an id or a turn that is taken, `InvalidRequestError` for names
    that cannot be given, `StoreFullError` before anything is written if there is too little room,
    and `StoreError`.
    """
    archive = file.archive
    manifests = _renamed(archive.manifests, names)
    for manifest in manifests:
        catalog.ensure_free(manifest)
    new = {
        segment.segment_id
        for segment in archive.segments
        if not store.has_segment(
            segment.header.shard, segment.segment_id, segment.header.file_length
        )
    }
    sizes = {segment.segment_id: segment.header.file_length for segment in archive.segments}
    _require_room(store, sum(sizes[segment_id] for segment_id in new))
    for namespace in archive.namespaces:
        store.put_namespace(namespace)
    for segment in archive.segments:
        _put(store, file, segment)
        on_bytes(segment.header.payload_length)
    manifests = _with_unique_bytes(manifests, new)
    with ExitStack() as undo:
        for manifest in manifests:
            entry = store.put_manifest(manifest)
            undo.callback(store.delete_manifest, manifest.snapshot_id, manifest.tenant)
            catalog.insert(manifest, entry)
            undo.callback(catalog.delete, manifest.snapshot_id, manifest.tenant)
        undo.pop_all()
    return ImportReport(
        manifests=tuple(manifests),
        segments=len(archive.segments),
        bytes=sum(sizes.values()),
        new_segments=len(new),
        new_bytes=sum(sizes[segment_id] for segment_id in new),
    )


def _put(store: DiskStore, file: ArchiveFile, segment: ArchivedSegment) -> None:
    try:
        store.put_segment(segment.header, file.payload(segment), segment.segment_id)
    except InternalError as error:
        raise SnapshotCorruptError(
            f"{file.path} was changed while it was imported: {error.message}",
            hint="import a file that nothing writes to",
        ) from error


def _require_room(store: DiskStore, needed: int) -> None:
    free = store.free_bytes()
    if free is not None and free < needed:
        raise StoreFullError.of(needed=needed, free=free, where=str(store.root))


def _renamed(manifests: Sequence[Manifest], names: Names) -> list[Manifest]:
    """The manifests under the names they get here, parents before children."""
    if names.snapshot_id is not None and len(manifests) != 1:
        raise InvalidRequestError(
            f"the archive holds {len(manifests)} snapshots: one id cannot name them all",
            hint="give another conversation id; then each snapshot gets a new id",
        )
    ids: dict[str, str] = {}
    if names.conversation_id is not None:
        ids = {manifest.snapshot_id: new_snapshot_id() for manifest in manifests}
    if names.snapshot_id is not None:
        ids = {manifests[0].snapshot_id: names.snapshot_id}
    changed = []
    for manifest in sorted(manifests, key=lambda m: (m.created_at, m.turn_number)):
        parent = manifest.parent_snapshot
        fields: dict[str, object] = {
            "tenant": names.tenant,
            "snapshot_id": ids.get(manifest.snapshot_id, manifest.snapshot_id),
            "parent_snapshot": None if parent is None else ids.get(parent, parent),
            "durability": "sync",
        }
        if names.conversation_id is not None:
            # The request it came from was one of the other conversation.
            fields |= {"conversation_id": names.conversation_id, "rid": None}
        changed.append(change_manifest(manifest, **fields))
    return changed


def _with_unique_bytes(manifests: Sequence[Manifest], new: set[str]) -> list[Manifest]:
    """What each snapshot is the first to store in this store."""
    left = set(new)
    changed = []
    for manifest in manifests:
        refs = {ref.segment_id: ref.bytes for chain in manifest.segments for ref in chain}
        first = refs.keys() & left
        left -= first
        unique = sum(refs[segment_id] for segment_id in first)
        changed.append(change_manifest(manifest, unique_bytes=unique))
    return changed
