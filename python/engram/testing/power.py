"""A file system that forgets at a power cut what was not made durable.

`ForgetfulFileSystem` works on real files, so that everything which lists and reads them sees what
a running machine sees. Beside that it keeps what the disk would hold: the bytes of each file up to
its last fsync, the names in each directory up to theirs, and everything since, of which any part
may have reached the disk in any order. `cut` writes one such disk into another directory.

Modelled, each drawn at random at every cut:

* of the writes to a file since its fsync, any may be missing; holes read as zeros, and the file may
  be shorter than what was written;
* of the changes to a directory since its fsync, each name by itself has any of the states it went
  through: a rename may be there without the data of the file (which then is what is durable of
  it), a removal may be undone, both names of a rename may be there, or neither;
* or, on a disk with a journal, the changes to all directories up to some moment, and none after.

Not modelled: a disk that damages what it had acknowledged, and what other programs write; SQLite's
files are copied by who calls `cut`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from engram.store.filesystem import FileSystem


class PowerCut(BaseException):
    """The power is gone. No Exception, so that no cleanup takes it for an error it handles."""


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    written: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class _Directory:
    """Names and what they stand for: as durable, and each later state with when it came."""

    durable: dict[str, _Node | None] = field(default_factory=dict)
    pending: dict[str, list[tuple[int, _Node | None]]] = field(default_factory=dict)

    def now(self, name: str) -> _Node | None:
        states = self.pending.get(name)
        return states[-1][1] if states else self.durable.get(name)


_Node = _File | _Directory


class ForgetfulFileSystem(FileSystem):
    """The real file system below ``root``, and a model of the disk under it. Thread-safe.

    After `cut_at` operations everything raises `PowerCut`. ``operations`` counts those that change
    something.
    """

    def __init__(self, root: Path) -> None:
        """What lies below ``root`` now, which need not exist, is durable."""
        self._base = root
        self._lock = threading.RLock()
        self._files: dict[int, _File] = {}
        self._clock = 0
        self._limit: int | None = None
        self.operations = 0
        self._root = _Directory()
        if root.is_dir():
            self._load(root, self._root)

    def cut_at(self, operations: int | None) -> None:
        """The power goes at the operation of this number from now on, counted from 1."""
        self._limit = None if operations is None else self.operations + operations

    @property
    def is_cut(self) -> bool:
        """Whether the power is gone."""
        return self._limit is not None and self.operations >= self._limit

    # ---- the machine ----

    def create_temp(self, path: Path) -> int:
        with self._changing():
            fd = super().create_temp(path)
            self._files[fd] = file = _File()
            self._set(path, file)
            return fd

    def remove_abandoned(self, path: Path) -> bool:
        with self._changing():
            removed = super().remove_abandoned(path)
            if removed:
                self._set(path, None)
            return removed

    def write(self, fd: int, data: memoryview) -> int:
        with self._changing():
            count = super().write(fd, data)
            file = self._files[fd]
            file.pending.append((len(file.written), bytes(data[:count])))
            file.written += data[:count]
            return count

    def fsync(self, fd: int) -> None:
        with self._changing():
            file = self._files[fd]
            file.durable = bytes(file.written)
            file.pending.clear()

    def close(self, fd: int) -> None:
        with self._lock:
            self._files.pop(fd, None)
            super().close(fd)

    def rename(self, source: Path, target: Path) -> None:
        with self._changing():
            super().rename(source, target)
            node = self._directory(source.parent).now(source.name)
            self._set(target, node)
            self._set(source, None)

    def fsync_dir(self, path: Path) -> None:
        with self._changing():
            if not path.is_relative_to(self._base):
                return
            directory = self._directory(path)
            for name in list(directory.pending):
                directory.durable[name] = directory.now(name)
            directory.pending.clear()

    def allocate(self, path: Path, nbytes: int) -> None:
        with self._changing():
            super().allocate(path, nbytes)
            self._set(path, _File(written=bytearray(nbytes)))

    def unlink(self, path: Path) -> None:
        with self._changing():
            super().unlink(path)
            self._set(path, None)

    def rmdir(self, path: Path) -> None:
        with self._changing():
            super().rmdir(path)
            self._set(path, None)

    def mkdir(self, path: Path) -> None:
        with self._changing():
            existed = path.is_dir()
            super().mkdir(path)
            if not existed and path != self._base:
                self._set(path, _Directory())

    # ---- the disk ----

    def cut(self, target: Path, rng: Random) -> None:
        """Write into ``target`` a disk as a cut at this moment may have left it."""
        with self._lock:
            journal = rng.random() < 0.25
            self._restore(self._root, target, rng, rng.randrange(self._clock + 1), journal)

    def _restore(
        self, directory: _Directory, target: Path, rng: Random, until: int, journal: bool
    ) -> None:
        target.mkdir(mode=0o700, exist_ok=True)
        for name in {**directory.durable, **directory.pending}:
            states = [directory.durable.get(name)]
            for when, state in directory.pending.get(name, []):
                if not journal or when <= until:
                    states.append(state)
            node = states[-1] if journal else rng.choice(states)
            if isinstance(node, _Directory):
                self._restore(node, target / name, rng, until, journal)
            elif node is not None:
                (target / name).write_bytes(_surviving(node, rng))

    # ---- inside ----

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            if self.is_cut:
                raise PowerCut
            self.operations += 1
            if self.is_cut:
                raise PowerCut
            yield

    def _set(self, path: Path, node: _Node | None) -> None:
        self._clock += 1
        states = self._directory(path.parent).pending.setdefault(path.name, [])
        states.append((self._clock, node))

    def _directory(self, path: Path) -> _Directory:
        found = self._root
        for part in path.relative_to(self._base).parts:
            node = found.now(part)
            assert isinstance(node, _Directory), path
            found = node
        return found

    def _load(self, path: Path, directory: _Directory) -> None:
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                below = _Directory()
                self._load(Path(entry.path), below)
                directory.durable[entry.name] = below
            elif not _is_sqlite(entry.name):
                data = Path(entry.path).read_bytes()
                directory.durable[entry.name] = _File(data, bytearray(data))


def _is_sqlite(name: str) -> bool:
    return name.endswith((".sqlite", "-wal", "-shm"))


def _surviving(file: _File, rng: Random) -> bytes:
    """What a cut leaves of a file: what is durable, and any part of what came after."""
    if not file.pending:
        return file.durable
    found = bytearray(file.durable)
    for offset, data in file.pending:
        kept = data[: rng.choice((0, len(data), rng.randrange(len(data) + 1)))]
        if kept:
            found.extend(bytes(max(0, offset - len(found))))
            found[offset : offset + len(kept)] = kept
    if rng.random() < 0.25:
        # The length has reached the disk, the data has not.
        found.extend(bytes(len(file.written) - len(found)))
    return bytes(found)
