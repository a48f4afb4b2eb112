"""A store that is only looked at: nothing is written, moved or healed, and no lock is taken."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engram.errors import NotFoundError
from engram.store.disk import DiskStore, open_keyring
from engram.store.filesystem import FileSystem
from engram.store.inspection import is_store
from engram.store.keyring import Keyring, sealed_by
from engram.store.keys import Key
from engram.store.layout import Layout
from engram.store.marker import check_marker
from engram.store.quarantine import Quarantine

OnRead = Callable[[int], None]
"""Told how many bytes were read."""


class SweepingFileSystem(FileSystem):
    """Reads each file once: its pages leave the page cache again, for those that others need."""

    def __init__(self, on_read: OnRead | None = None) -> None:
        self._on_read = on_read

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        count = super().read_into(fd, buffer, offset)
        os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)
        if self._on_read is not None:
            self._on_read(count)
        return count


class ReadOnlyFileSystem(SweepingFileSystem):
    """Whatever would change something fails, as on a disk that is mounted read-only."""

    def create_temp(self, path: Path) -> int:
        _refuse(path)

    def remove_abandoned(self, path: Path) -> bool:
        _refuse(path)

    def write(self, fd: int, data: memoryview) -> int:
        _refuse(None)

    def rename(self, source: Path, target: Path) -> None:
        _refuse(source)

    def unlink(self, path: Path) -> None:
        _refuse(path)

    def mkdir(self, path: Path) -> None:
        _refuse(path)

    def rmdir(self, path: Path) -> None:
        _refuse(path)

    def allocate(self, path: Path, nbytes: int) -> None:
        _refuse(path)


class ReadOnlyStore(DiskStore):
    """A `DiskStore` for looking: damage is found and told as ever, and stays where it is.

    A server may be using the directory meanwhile.
    """

    def __init__(self, root: Path, on_read: OnRead | None, keyring: Keyring | None) -> None:
        fs = ReadOnlyFileSystem(on_read)
        super().__init__(root, fs, None, keyring)
        self._quarantine = _NothingIsMoved(self._layout, self._directories, fs)


class _NothingIsMoved(Quarantine):
    def take(self, path: Path, reason: str, found: os.stat_result | None = None) -> Path | None:
        return None


def open_for_reading(
    root: Path, on_read: OnRead | None = None, *, key: Key | None = None, segments: bool = True
) -> ReadOnlyStore:
    """The store in a directory; ``key`` is that of an encrypted one, and not needed by others, nor
    by who will read no ``segments``.

    Raises `NotFoundError` for a directory that is none, `StoreFormatError` for a newer one,
    `EncryptionKeyError` without the right key, or `KeyringCorruptError`.
    """
    root = root.absolute()
    if not root.is_dir() or not is_store(root):
        raise NotFoundError(f"{root} is no snapshot store", hint="name a --snapshot-dir")
    layout, fs = Layout(root), ReadOnlyFileSystem()
    check_marker(layout, fs)
    encrypted = sealed_by(layout, fs) is not None
    keyring = open_keyring(layout, key, fs, make=False) if encrypted and segments else None
    return ReadOnlyStore(root, on_read, keyring)


def _refuse(path: Path | None) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), None if path is None else str(path))
