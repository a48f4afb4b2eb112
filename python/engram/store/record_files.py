"""Manifests and namespace descriptions: small records, one file each."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from engram.core.namespace import MAX_NAMESPACE_BYTES, Namespace
from engram.errors import (
    AlreadyExistsError,
    InternalError,
    ManifestCorruptError,
    NotFoundError,
    StoreError,
    StoreFormatError,
)
from engram.snapshot.envelope import open_record
from engram.snapshot.listing import DamagedManifest, ManifestEntry, manifest_name
from engram.snapshot.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from engram.store.base import ManifestStore, NamespaceStore
from engram.store.durable import (
    DirectoryMaker,
    store_error,
    sync_directory,
    unlink_durable,
    walk_names,
    write_durable,
)
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.lock import StoreLock
from engram.store.quarantine import Quarantine


class DiskNamespaces(NamespaceStore):
    """The namespace descriptions of a `DiskStore`: canonical JSON named by its own digest."""

    _layout: Layout
    _directories: DirectoryMaker
    _quarantine: Quarantine
    _fs: FileSystem

    def put_namespace(self, namespace: Namespace) -> None:
        path = self._layout.namespace(namespace.id)
        self._directories.ensure(path.parent)
        with contextlib.suppress(NotFoundError):
            self.get_namespace(namespace.id)
            sync_directory(path.parent, self._fs)
            return
        data = namespace.canonical
        write_durable(path, [data], needed=len(data), fs=self._fs)

    def get_namespace(self, namespace_id: str) -> Namespace:
        path = self._layout.namespace(namespace_id)
        data = read_small_file(path, MAX_NAMESPACE_BYTES, self._fs)
        if data is None:
            raise NotFoundError(f"no namespace {namespace_id} is described in this store")
        try:
            namespace = Namespace.from_canonical(data)
            if namespace.id != namespace_id:
                raise ValueError("it is not the namespace it is named after")
        except ValueError as error:
            self._quarantine.take(path, str(error))
            raise NotFoundError(
                f"the description of namespace {namespace_id} is damaged: {error}"
            ) from None
        return namespace


class DiskManifests(ManifestStore):
    """The manifests of a `DiskStore`."""

    _layout: Layout
    _directories: DirectoryMaker
    _quarantine: Quarantine
    _fs: FileSystem
    _lock: StoreLock | None
    _manifest_lock: threading.Lock

    def put_manifest(self, manifest: Manifest, *, replace: bool = False) -> ManifestEntry:
        name = manifest_name(manifest.snapshot_id, manifest.tenant)
        path = self._layout.manifest(name)
        data = encode_manifest(manifest)
        with self._writing_manifests():
            self._directories.ensure(path.parent)
            existed = path.exists()
            if existed and not replace:
                raise AlreadyExistsError(
                    f"snapshot {manifest.snapshot_id!r} exists already",
                    hint="choose another snapshot_id, or none to have one made",
                    details={"snapshot_id": manifest.snapshot_id},
                )
            try:
                write_durable(path, [data], needed=len(data), fs=self._fs)
            except StoreError:
                if not existed:
                    # A save reported as failed must not turn up as a snapshot at the next start.
                    with contextlib.suppress(OSError):
                        self._fs.unlink(path)
                raise
            return ManifestEntry(name, _stamp(path.stat()))

    def get_manifest(self, snapshot_id: str, tenant: str = "") -> Manifest:
        path = self._layout.manifest(manifest_name(snapshot_id, tenant))
        try:
            found = self._read_or_move(path)
        except NotFoundError:
            moved_to = self._quarantine.find(path.name)
            if moved_to is not None:
                raise _corrupt(snapshot_id, path, "damaged", moved_to) from None
            raise NotFoundError(
                f"no snapshot {snapshot_id!r}",
                details={"snapshot_id": snapshot_id, "file": str(path)},
            ) from None
        if isinstance(found, DamagedManifest):
            moved = None if found.quarantined_to is None else Path(found.quarantined_to)
            raise _corrupt(snapshot_id, path, f"damaged: {found.reason}", moved)
        return found

    def delete_manifest(self, snapshot_id: str, tenant: str = "") -> None:
        with self._writing_manifests():
            unlink_durable(self._layout.manifest(manifest_name(snapshot_id, tenant)), self._fs)

    def manifest_names(self) -> set[str]:
        """The names of all stored manifests: `list_manifests` looks at every file."""
        return {name for _, name in self._manifest_files()}

    def manifest_entry(self, name: str) -> ManifestEntry | None:
        """One manifest as `list_manifests` has it; None if there is none."""
        return _entry(str(self._layout.manifest(name)), name)

    def list_manifests(self) -> list[ManifestEntry]:
        entries = [_entry(file, name) for file, name in self._manifest_files()]
        return sorted((entry for entry in entries if entry), key=lambda entry: entry.name)

    def _manifest_files(self) -> Iterator[tuple[str, str]]:
        """Every manifest's file, as a string, and its name; a path for each would take longer than
        to look at it."""
        for directory, names in walk_names(self._layout.manifests):
            for name in names:
                if name.endswith(".json") and name[:2] == directory.name:
                    yield f"{directory}/{name}", name

    def load_manifest(self, entry: ManifestEntry) -> Manifest | DamagedManifest:
        try:
            return self._read_or_move(self._layout.manifest(entry.name))
        except (StoreFormatError, NotFoundError) as error:
            return DamagedManifest(entry.name, error.message, None)

    def quarantine_manifest(self, entry: ManifestEntry, reason: str) -> Path | None:
        """Move a listed manifest aside; where it is now, or None if it could not be moved."""
        return self._quarantine.take(self._layout.manifest(entry.name), reason)

    @contextlib.contextmanager
    def _writing_manifests(self) -> Iterator[None]:
        with self._manifest_lock:
            if self._lock is None:
                raise InternalError("manifests are written by the process that holds the lock only")
            yield

    def _read_or_move(self, path: Path) -> Manifest | DamagedManifest:
        """A manifest; a damaged one is quarantined."""
        with contextlib.suppress(ManifestCorruptError):
            return self._read(path)
        # Once more, while nobody writes: what has been put there since is not to be moved.
        with self._manifest_lock:
            try:
                return self._read(path)
            except ManifestCorruptError as error:
                moved_to = self._quarantine.take(path, error.message)
                moved = None if moved_to is None else str(moved_to)
                return DamagedManifest(path.name, error.message, moved)

    def _read(self, path: Path) -> Manifest:
        data = read_small_file(path, MAX_MANIFEST_BYTES, self._fs)
        if data is None:
            raise NotFoundError(f"no manifest {path}")
        manifest = decode_manifest(data)
        if manifest_name(manifest.snapshot_id, manifest.tenant) != path.name:
            raise ManifestCorruptError("it is the manifest of another snapshot")
        return manifest


def _corrupt(
    snapshot_id: str, path: Path, what: str, moved_to: Path | None
) -> ManifestCorruptError:
    where = f"; it lies in {moved_to}" if moved_to else ""
    return ManifestCorruptError(
        f"the manifest of snapshot {snapshot_id!r} ({path}) is {what}{where}",
        hint="restore an earlier snapshot, put the file back from a backup, or delete the snapshot",
        details={
            "snapshot_id": snapshot_id,
            "file": str(path),
            "quarantined_to": None if moved_to is None else str(moved_to),
        },
    )


def read_small_file(path: Path, limit: int, fs: FileSystem) -> bytes | None:
    """A whole file, or its first ``limit`` + 1 bytes; None if there is none. `StoreError`."""
    try:
        fd = fs.open_read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_error("open", path, error) from error
    try:
        size = min(os.fstat(fd).st_size, limit + 1)
        buffer = bytearray(size)
        filled = 0
        while filled < size:
            count = fs.read_into(fd, memoryview(buffer)[filled:], filled)
            if count == 0:
                break
            filled += count
        return bytes(buffer[:filled])
    except OSError as error:
        raise store_error("read", path, error) from error
    finally:
        fs.close(fd)


def refuse_newer(what: str, data: bytes, known: int) -> None:
    """Raise `StoreFormatError` for an intact record of a newer version than ``known``."""
    version: object = None
    with contextlib.suppress(ValueError):
        version = open_record(data).get("version")
    if type(version) is int and version > known:
        raise StoreFormatError.of(what, version, known)


def _entry(file: str, name: str) -> ManifestEntry | None:
    try:
        return ManifestEntry(name, _stamp(os.stat(file)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_error("look at", Path(file), error) from error


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
