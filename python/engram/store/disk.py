"""A store in a directory of the local file system."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engram.errors import EncryptionKeyError, KeyringCorruptError, StoreError
from engram.snapshot.manifest import MAX_MANIFEST_BYTES
from engram.snapshot.segment import Shard
from engram.store.base import Store, StoreHealth
from engram.store.conversation_files import DiskConversations
from engram.store.durable import (
    DirectoryMaker,
    free_bytes,
    remove_abandoned_temps,
    store_error,
    sync_directory,
)
from engram.store.encryption import MAGIC, is_encrypted
from engram.store.filesystem import FileSystem
from engram.store.keyring import Keyring, load_keyring, sealed_by, write_keyring
from engram.store.keys import KEY_VARIABLE, Key
from engram.store.layout import MANIFEST_SUFFIX, SEGMENT_SUFFIX, Layout
from engram.store.lock import StoreLock
from engram.store.marker import Marker, check_marker, write_marker
from engram.store.quarantine import Quarantine, QuarantinedFile
from engram.store.record_files import DiskManifests, DiskNamespaces, read_small_file
from engram.store.reserve import Reserve
from engram.store.response_files import DiskResponses
from engram.store.segment_files import DiskSegments


@dataclass(frozen=True)
class StoreStats:
    """What a store holds, counted by walking it. Sizes in bytes."""

    segments: dict[Shard, int]
    segment_bytes: int
    manifests: int
    quarantined: int
    free_bytes: int | None


class DiskStore(
    DiskSegments, DiskNamespaces, DiskManifests, DiskConversations, DiskResponses, Store
):
    """Segments, manifests, namespaces and records of conversations and responses below a directory.

    The format is in ``docs/format/store.md``.

    Made by `open`. ``marker_rebuilt`` and ``removed_temps`` tell what opening had to heal.
    """

    def __init__(
        self,
        root: Path,
        fs: FileSystem,
        lock: StoreLock | None,
        keyring: Keyring | None = None,
    ) -> None:
        self._layout = Layout(root)
        self._fs = fs
        self._lock = lock
        self._keyring = keyring
        self._directories = DirectoryMaker(root, fs)
        self._quarantine = Quarantine(self._layout, self._directories, fs)
        self._manifest_lock = threading.Lock()
        self._reserve = Reserve(self._layout.reserve, fs)
        self.marker_rebuilt = False
        self.removed_temps = 0

    @classmethod
    def open(
        cls,
        root: Path | str,
        *,
        lock: bool = True,
        fs: FileSystem | None = None,
        key: Key | None = None,
    ) -> DiskStore:
        """Open a store, making the directory if need be.

        The one server opens it with ``lock``: that writes or rebuilds the marker and removes what
        crashes left half-written. Its scheduler ranks open it without: they read and write
        segments only.

        With ``key`` new segments are encrypted; those that lie there in the clear stay readable.
        A store that has a keyring is opened with its key or not at all.

        Raises `StoreBusyError`, `StoreFormatError`, `EncryptionKeyError`, `KeyringCorruptError`
        or `StoreError`.
        """
        root = Path(root).absolute()
        fs = fs or FileSystem()
        _make_root(root, fs)
        layout = Layout(root)
        held = StoreLock.acquire(layout.lock) if lock else None
        try:
            marker = check_marker(layout, fs)
            store = cls(root, fs, held, open_keyring(layout, key, fs, make=lock))
            if lock:
                store._heal(marker)
        except BaseException:
            if held is not None:
                held.release()
            raise
        return store

    def close(self) -> None:
        """Give the lock back. May be called again."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def root(self) -> Path:
        return self._layout.root

    @property
    def catalog_path(self) -> Path:
        """Where the catalog of this store belongs."""
        return self._layout.catalog

    @property
    def encrypted(self) -> bool:
        """Whether new segments are encrypted; records never are."""
        return self._keyring is not None

    def free_bytes(self) -> int | None:
        """Bytes that may still be written; None where the system cannot tell."""
        return free_bytes(self.root)

    def reserve_at_hand(self) -> AbstractContextManager[None]:
        return self._reserve.at_hand()

    def quarantine_file(self, path: Path, reason: str) -> Path | None:
        """Move a file of this store aside; where it is now, or None if it could not be moved."""
        return self._quarantine.take(path, reason)

    def health(self) -> StoreHealth:
        quarantined, quarantined_bytes = self._quarantine.size()
        return StoreHealth(
            quarantined,
            quarantined_bytes,
            self.marker_rebuilt,
            self.removed_temps,
            self.free_bytes(),
        )

    def remains_of_manifests(
        self, names: Iterable[str] = (), *, but: Container[str] = ()
    ) -> Iterator[bytes]:
        held = [
            held.path
            for held in self._quarantine.entries()
            if held.name.endswith(MANIFEST_SUFFIX) and held.name not in but
        ]
        for path in [*held, *(self._layout.manifest(name) for name in names)]:
            data = read_small_file(path, MAX_MANIFEST_BYTES, self._fs)
            if data is not None:
                yield data

    def remove_abandoned_temps(self) -> int:
        return remove_abandoned_temps(self.root, self._fs)

    def remove_empty_directories(self) -> int:
        """Remove directories of segments that hold nothing; how many.

        Only while nothing else uses the store: a writer relies on those it has made.
        """
        removed = 0
        for directory, _, _ in os.walk(self._layout.segments, topdown=False):
            path = Path(directory)
            if path != self._layout.segments and not any(path.iterdir()):
                try:
                    self._fs.rmdir(path)
                except OSError as error:
                    raise store_error("remove", path, error) from error
                removed += 1
        return removed

    def find_quarantined(self, name: str) -> Path | None:
        """Where the newest file in quarantine lies that had this name; None if there is none."""
        return self._quarantine.find(name)

    def quarantined(self) -> list[QuarantinedFile]:
        """The damaged files that are held, oldest first."""
        return self._quarantine.entries()

    def quarantined_names(self) -> frozenset[str]:
        """The names that files had before they were found damaged and moved aside."""
        return self._quarantine.names()

    def stats(self) -> StoreStats:
        """Count everything, by a walk over the whole store."""
        counts: dict[Shard, int] = {}
        total = 0
        for segment in self.iter_segments():
            counts[segment.shard] = counts.get(segment.shard, 0) + 1
            total += segment.bytes
        return StoreStats(
            segments=counts,
            segment_bytes=total,
            manifests=len(self.manifest_names()),
            quarantined=self._quarantine.size()[0],
            free_bytes=self.free_bytes(),
        )

    def _heal(self, marker: Marker) -> None:
        in_use = any(
            path.is_dir()
            for path in (self._layout.segments, self._layout.manifests, self._layout.namespaces)
        )
        if marker is Marker.DAMAGED:
            self._quarantine.take(self._layout.marker, "the store's marker is damaged")
        if marker is not Marker.INTACT:
            write_marker(self._layout, self._fs)
            self.marker_rebuilt = marker is Marker.DAMAGED or in_use
        self.removed_temps = remove_abandoned_temps(self.root, self._fs)
        self._reserve.keep()


def open_keyring(layout: Layout, key: Key | None, fs: FileSystem, *, make: bool) -> Keyring | None:
    """The store's keyring; one is made where there is none yet and a key is given."""
    if key is None:
        fingerprint = sealed_by(layout, fs)
        if fingerprint is not None:
            raise EncryptionKeyError(
                f"the snapshot directory {layout.root} is encrypted, and no key is given",
                hint=f"give key {fingerprint}, in a file or in {KEY_VARIABLE}",
                details={"sealed_by": fingerprint},
            )
        return None
    keyring = load_keyring(layout, key, fs)
    if keyring is None and make:
        _require_nothing_encrypted(layout, fs)
        keyring = Keyring.new()
        write_keyring(layout, keyring, key, fs)
    if keyring is None:
        raise KeyringCorruptError(
            f"the snapshot directory {layout.root} has no keyring",
            hint="the server makes one when it opens the directory with a key",
        )
    return keyring


def _require_nothing_encrypted(layout: Layout, fs: FileSystem) -> None:
    """A new keyring beside segments that only a lost one can open would look like all is well."""
    for _, shard in layout.shards():
        for path in shard.rglob("*" + SEGMENT_SUFFIX):
            if is_encrypted(read_small_file(path, len(MAGIC), fs) or b""):
                raise KeyringCorruptError(
                    f"the keyring {layout.keyring} is missing, and {path} is encrypted",
                    hint="put the file back from a backup: without it no encrypted segment can be "
                    "read; to do without them, use another snapshot directory",
                    details={"file": str(layout.keyring), "segment": str(path)},
                )


def _make_root(root: Path, fs: FileSystem) -> None:
    """Make the store's directory and what is missing above it, durably."""
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir():
        raise StoreError(
            f"the snapshot directory {root} cannot be made: {existing} is not a directory",
            hint="give another --snapshot-dir",
        )
    DirectoryMaker(existing, fs).ensure(root)
    if existing == root:
        # A crash may have come right after it was made. Its parent may not be ours to open.
        with contextlib.suppress(StoreError):
            sync_directory(root.parent, fs)
