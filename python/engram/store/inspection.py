"""Looks at a store without changing it: no file is written, moved or healed, no lock is kept."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from engram.errors import EngramError, KeyringCorruptError, StoreFormatError
from engram.snapshot.archive import segments_of
from engram.snapshot.manifest import decode_manifest
from engram.store.disk import DiskStore
from engram.store.durable import TEMP_SUFFIX
from engram.store.filesystem import FileSystem
from engram.store.keyring import sealed_by
from engram.store.layout import Layout
from engram.store.lock import holder_in, lock_directory
from engram.store.marker import check_marker


@dataclass(frozen=True)
class StoreInspection:
    """What lies below a store's root. Sizes are bytes.

    ``marker`` is "intact", "missing", "damaged" or "newer format"; ``holder`` names the server that
    holds the lock, None if none does. ``damaged_manifests`` and ``incomplete`` are file names, the
    latter of manifests that name a segment which is not there. ``keyring`` is "none", "sealed by
    key ..." or what is wrong with it.
    """

    root: str
    marker: str
    holder: str | None
    manifests: int
    damaged_manifests: tuple[str, ...]
    incomplete: tuple[str, ...]
    segments: int
    segment_bytes: int
    quarantined: int
    free_bytes: int | None
    keyring: str = "none"
    keyring_damaged: bool = False


def inspect_store(root: Path) -> StoreInspection:
    """Count what a store holds, and see whether it is whole; segments' bytes are not verified.

    Manifests are verified. Raises `StoreError` where the system refuses to read.
    """
    fs = FileSystem()
    layout = Layout(root)
    try:
        marker = check_marker(layout, fs).value
    except StoreFormatError:
        return StoreInspection(
            str(root), "newer format", lock_holder(root), 0, (), (), 0, 0, 0, None
        )
    keyring, keyring_damaged = _keyring(layout, fs)
    store = DiskStore(root, fs, None)
    stats = store.stats()
    present = {(found.shard, found.segment_id) for found in store.iter_segments()}
    damaged, incomplete = [], []
    for entry in store.list_manifests():
        try:
            manifest = decode_manifest(layout.manifest(entry.name).read_bytes())
        except FileNotFoundError:
            continue  # deleted meanwhile
        except EngramError:
            damaged.append(entry.name)
            continue
        if not present.issuperset(segments_of(manifest)):
            incomplete.append(entry.name)
    return StoreInspection(
        root=str(root),
        marker=marker,
        holder=lock_holder(root),
        manifests=stats.manifests,
        damaged_manifests=tuple(damaged),
        incomplete=tuple(incomplete),
        segments=len(present),
        segment_bytes=stats.segment_bytes,
        quarantined=stats.quarantined,
        free_bytes=stats.free_bytes,
        keyring=keyring,
        keyring_damaged=keyring_damaged,
    )


def lock_holder(root: Path) -> str | None:
    """Who holds a store's lock, in its own words; None if nobody does.

    A shared lock is asked for and given back at once. A running server keeps its own; one that
    starts in those microseconds would be told that the store is in use.
    """
    path = Layout(root).lock
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = None
    try:
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Held also by a server whose lock file somebody has removed.
        directory = lock_directory(root, fcntl.LOCK_SH) if root.is_dir() else None
        if directory is not None:
            os.close(directory)
    except BlockingIOError:
        return "unknown" if fd is None else holder_in(fd)
    finally:
        if fd is not None:
            os.close(fd)
    return None


def abandoned_temps(root: Path) -> list[Path]:
    """Temporary files below a store's root that nobody is writing."""
    found = []
    for directory, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(TEMP_SUFFIX):
                path = Path(directory, name)
                if not _is_written(path):
                    found.append(path)
    return sorted(found)


def _is_written(path: Path) -> bool:
    """Whether a process holds a temporary file, or has finished it just now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        # A writer that makes its file in these microseconds takes another name.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def is_store(root: Path) -> bool:
    """Whether a directory has been used as a store."""
    layout = Layout(root)
    parts = (layout.marker, layout.segments, layout.manifests, layout.namespaces)
    return any(path.exists() for path in parts)


def _keyring(layout: Layout, fs: FileSystem) -> tuple[str, bool]:
    try:
        fingerprint = sealed_by(layout, fs)
    except (KeyringCorruptError, StoreFormatError) as error:
        return str(error), True
    return "none" if fingerprint is None else f"sealed by key {fingerprint}", False
