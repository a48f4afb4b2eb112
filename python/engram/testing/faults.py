"""File systems that fail, die, block or are slow: in one process, or told so from another."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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

    def allocate(self, path: Path, nbytes: int) -> None:
        self._call("allocate", path, lambda: self._real.allocate(path, nbytes))

    def rmdir(self, path: Path) -> None:
        self._call("rmdir", path, lambda: self._real.rmdir(path))

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


# ---- faults that another process sets ----

POLL_S: Final = 0.01
OPERATIONS: Final = ("read", "write", "fsync", "commit", "layer")
"""What can be made faulty: file reads, writes (renames and removals too) and fsyncs, the catalog's
commits, and the copy of one layer into the device pools."""


@dataclass(frozen=True)
class Fault:
    """What an operation meets: it waits `delay` seconds, then for as long as it is `block`ed, then
    fails with `error` (a name of `errno`).  `only` limits it to paths that contain that text.
    """

    delay: float = 0.0
    block: bool = False
    error: str | None = None
    only: str = ""


class FaultControl:
    """The faults in force, in a folder that several processes share.

    One process sets them; in others, what is made faulty calls `meet` first.
    """

    def __init__(self, folder: Path) -> None:
        self._rules = folder / "faults.json"
        self._blocked = folder / "blocked"
        self._blocked.mkdir(parents=True, exist_ok=True)

    def set(self, **faults: Fault) -> None:
        """From now on these faults, by operation, and no others."""
        unknown = set(faults) - set(OPERATIONS)
        if unknown:
            raise ValueError(f"unknown operations {sorted(unknown)}; there are {OPERATIONS}")
        new = self._rules.with_suffix(".new")
        new.write_text(json.dumps({name: asdict(fault) for name, fault in faults.items()}))
        new.replace(self._rules)

    def clear(self) -> None:
        """No faults; what is blocked goes on."""
        self.set()

    def blocked(self, operation: str) -> int:
        """How many threads, of all processes, are blocked in an operation."""
        return len(list(self._blocked.glob(f"{operation}-*")))

    def meet(self, operation: str, path: str = "") -> None:
        """Wait and fail as the fault in force says; returns at once if there is none."""
        fault = self._fault(operation, path)
        if fault is None:
            return
        if fault.delay:
            time.sleep(fault.delay)
        if fault.block:
            fault = self._wait(operation, path)
        if fault is not None and fault.error is not None:
            number = getattr(errno, fault.error)
            raise OSError(number, os.strerror(number), path)

    def _wait(self, operation: str, path: str) -> Fault | None:
        sign = self._blocked / f"{operation}-{os.getpid()}-{threading.get_ident()}"
        sign.touch()
        try:
            while True:
                fault = self._fault(operation, path)
                if fault is None or not fault.block:
                    return fault
                time.sleep(POLL_S)
        finally:
            sign.unlink()

    def _fault(self, operation: str, path: str) -> Fault | None:
        try:
            rules = json.loads(self._rules.read_bytes())
        except FileNotFoundError:
            return None
        fault = Fault(**rules[operation]) if operation in rules else None
        return fault if fault is not None and fault.only in path else None


class ControlledFileSystem(FileSystem):
    """The real file system behind a `FaultControl`."""

    def __init__(self, control: FaultControl) -> None:
        self._control = control

    def create_temp(self, path: Path) -> int:
        self._control.meet("write", str(path))
        return super().create_temp(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._control.meet("write", _path_of(fd))
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._control.meet("fsync", _path_of(fd))
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._control.meet("write", str(target))
        super().rename(source, target)

    def fsync_dir(self, path: Path) -> None:
        self._control.meet("fsync", str(path))
        super().fsync_dir(path)

    def unlink(self, path: Path) -> None:
        self._control.meet("write", str(path))
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._control.meet("write", str(path))
        super().mkdir(path)

    def allocate(self, path: Path, nbytes: int) -> None:
        self._control.meet("write", str(path))
        super().allocate(path, nbytes)

    def rmdir(self, path: Path) -> None:
        self._control.meet("write", str(path))
        super().rmdir(path)

    def open_read(self, path: Path) -> int:
        self._control.meet("read", str(path))
        return super().open_read(path)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._control.meet("read", _path_of(fd))
        return super().read_into(fd, buffer, offset)


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
