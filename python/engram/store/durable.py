"""THE durable writer: temporary file beside the target, write, fsync, rename, fsync directory.

Everything that must survive a crash goes through here, and nothing else writes into a store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from engram.errors import StoreError, StoreFullError
from engram.store.filesystem import FileSystem

TEMP_SUFFIX: Final = ".tmp"
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT}
_CREATE_ATTEMPTS: Final = 8
BLOCK_BYTES: Final = 4096


def write_durable(
    path: Path,
    parts: Iterable[memoryview | bytes],
    *,
    needed: int,
    fs: FileSystem,
) -> None:
    """Write ``parts`` as the file ``path``, replacing it atomically; durable on return.

    ``needed`` is the total size in bytes, for the message when the disk is full. ``parts`` may
    raise: then, as on every error before the rename, ``path`` is as before. If only the
    directory's fsync fails, the whole new file is in place, but not known to be durable.
    Raises `StoreFullError` or `StoreError`. The directory must exist.
    """
    temp: Path | None = None
    try:
        temp, fd = _create_temp(path, fs)
        try:
            for part in parts:
                _write_all(fs, fd, memoryview(part).cast("B"))
            fs.fsync(fd)
            # Renamed while the descriptor, and with it the lock, is held: no cleaner takes it.
            fs.rename(temp, path)
        finally:
            fs.close(fd)
    except OSError as error:
        _discard(temp, fs)
        raise store_error("write", path, error, needed=needed) from error
    except BaseException:
        _discard(temp, fs)
        raise
    sync_directory(path.parent, fs)


def unlink_durable(path: Path, fs: FileSystem) -> None:
    """Remove a file durably; one that is not there is no error. Raises `StoreError`."""
    try:
        fs.unlink(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            return
    except OSError as error:
        raise store_error("remove", path, error) from error
    # Also when it was gone already: an earlier removal may have failed at exactly this step.
    sync_directory(path.parent, fs)


def sync_directory(path: Path, fs: FileSystem) -> None:
    """Make a directory's names durable. Raises `StoreError`."""
    try:
        fs.fsync_dir(path)
    except OSError as error:
        raise store_error("fsync directory", path, error) from error


def remove_abandoned_temps(root: Path, fs: FileSystem) -> int:
    """Remove the temporary files crashes left below ``root``; how many there were.

    Files that another process is writing at this moment stay.
    """
    removed = 0
    for directory, names in walk_names(root):
        for name in names:
            if name.startswith(".") and name.endswith(TEMP_SUFFIX):
                removed += fs.remove_abandoned(directory / name)
    return removed


def walk_names(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every directory below ``root`` and the names in it, in no order.

    Our directories have no dot in their names and our files have one, but for a few at the top: so
    hundreds of thousands of names need no look at what each one is.
    Raises `StoreError` for a directory that cannot be read: what is in it must not pass for gone.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise store_error("list", root, error) from error
    yield root, names
    for name in names:
        if "." not in name:
            yield from walk_names(root / name)


def store_error(
    operation: str, path: Path, error: OSError, *, needed: int = BLOCK_BYTES
) -> StoreError:
    """The `StoreError` for an OSError; `StoreFullError` where space or quota ran out.

    ``needed`` is in bytes; whatever it is that the device refuses, it takes a block at least.
    """
    if error.errno in _NO_SPACE:
        return StoreFullError.of(
            needed=needed, free=free_bytes(path.parent), where=str(path.parent)
        )
    return StoreError(
        f"cannot {operation} {path}: {error.strerror or error}",
        hint="check the disk and the permissions of the snapshot directory",
        details={"operation": operation, "path": str(path), "errno": error.errno},
    )


def free_bytes(path: Path) -> int | None:
    """Bytes an unprivileged process may still write below ``path``; None if it cannot be told."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


class DirectoryMaker:
    """Makes directories whose own names are durable before a file in them is acknowledged."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        """``root`` must exist; only directories below it are made."""
        self._fs = fs
        self._durable = {root}
        self._lock = threading.Lock()

    def ensure(self, path: Path) -> None:
        """Make ``path`` and its missing parents, durably. Raises `StoreError`.

        A directory found there is synced too, once: a crash may have come between its making and
        its sync. The lock keeps a second thread from using a directory not yet durable.
        """
        with self._lock:
            self._ensure(path)

    def _ensure(self, path: Path) -> None:
        if path in self._durable:
            return
        self._ensure(path.parent)
        try:
            self._fs.mkdir(path)
        except OSError as error:
            raise store_error("make directory", path, error) from error
        sync_directory(path.parent, self._fs)
        self._durable.add(path)


def _create_temp(path: Path, fs: FileSystem) -> tuple[Path, int]:
    for attempt in range(_CREATE_ATTEMPTS):
        temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
        try:
            return temp, fs.create_temp(temp)
        except FileExistsError:
            if attempt == _CREATE_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _write_all(fs: FileSystem, fd: int, data: memoryview) -> None:
    while data:
        written = fs.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "the device accepted no bytes")
        data = data[written:]


def _discard(temp: Path | None, fs: FileSystem) -> None:
    """Drop a temporary file. If that fails too, the next start of the server removes it."""
    if temp is not None:
        with contextlib.suppress(OSError):
            fs.unlink(temp)
