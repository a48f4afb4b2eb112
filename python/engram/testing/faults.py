"""A file system that fails, or dies, at a chosen operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from engram.store.filesystem import FileSystem

Result = TypeVar("Result")

WRITE_OPERATIONS: Final = ("mkdir", "create_temp", "write", "fsync", "rename", "fsync_dir")
"""What storing a file consists of, in this order, `fsync_dir` also after each `mkdir`."""


@dataclass(frozen=True)
class _Fault:
    operation: str
    after: int
    error: int
    crash: bool


class SimulatedCrash(BaseException):
    """The process died here. No Exception, so that no cleanup takes it for an error it handles."""


class FaultyFileSystem(FileSystem):
    """The real file system, until the fault armed with `fail` comes.

    ``short`` limits each write and read to that many bytes. ``calls`` records (operation, file
    name) of everything called; the name is empty for operations on a descriptor.
    """

    def __init__(self, *, short: int | None = None) -> None:
        self._real = FileSystem()
        self._short = short
        self._fault: _Fault | None = None
        self._seen = 0
        self._dead = False
        self.calls: list[tuple[str, str]] = []

    def fail(
        self,
        operation: str,
        *,
        after: int = 0,
        error: int = errno.EIO,
        crash: bool = False,
    ) -> FaultyFileSystem:
        """From now on, let ``after`` calls of ``operation`` pass and fail the next one.

        It raises ``OSError(error)``. With ``crash`` it raises `SimulatedCrash` instead, and so does
        then everything except ``close``, as if the process had been killed: only the kernel still
        closes its files. Returns itself.
        """
        self._fault = _Fault(operation, after, error, crash)
        self._seen = 0
        return self

    @property
    def fired(self) -> bool:
        """Whether the fault has happened."""
        return self._fault is not None and self._seen > self._fault.after

    def create_temp(self, path: Path) -> int:
        return self._call("create_temp", path, lambda: self._real.create_temp(path))

    def remove_abandoned(self, path: Path) -> bool:
        return self._call("remove_abandoned", path, lambda: self._real.remove_abandoned(path))

    def write(self, fd: int, data: memoryview) -> int:
        part = data[: self._short]
        return self._call("write", None, lambda: self._real.write(fd, part))

    def fsync(self, fd: int) -> None:
        self._call("fsync", None, lambda: self._real.fsync(fd))

    def close(self, fd: int) -> None:
        self.calls.append(("close", ""))
        self._real.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", target, lambda: self._real.rename(source, target))

    def fsync_dir(self, path: Path) -> None:
        self._call("fsync_dir", path, lambda: self._real.fsync_dir(path))

    def unlink(self, path: Path) -> None:
        self._call("unlink", path, lambda: self._real.unlink(path))

    def mkdir(self, path: Path) -> None:
        self._call("mkdir", path, lambda: self._real.mkdir(path))

    def open_read(self, path: Path) -> int:
        return self._call("open_read", path, lambda: self._real.open_read(path))

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        part = buffer[: self._short]
        return self._call("read_into", None, lambda: self._real.read_into(fd, part, offset))

    def _call(self, name: str, path: Path | None, operation: Callable[[], Result]) -> Result:
        if self._dead:
            raise SimulatedCrash(name)
        self.calls.append((name, "" if path is None else path.name))
        fault = self._fault
        if fault is not None and fault.operation == name:
            self._seen += 1
            if self._seen == fault.after + 1:
                if fault.crash:
                    self._dead = True
                    raise SimulatedCrash(name)
                raise OSError(fault.error, os.strerror(fault.error), str(path or ""))
        return operation()
