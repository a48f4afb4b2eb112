"""One server a store: an advisory lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from engram.errors import StoreBusyError
from engram.store.durable import store_error


class StoreLock:
    """Holds ``<root>/lock`` until `release` or the end of the process, however it ends."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @classmethod
    def acquire(cls, path: Path) -> StoreLock:
        """Take the lock without waiting. Raises `StoreBusyError` naming the holder."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise store_error("open", path, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 256, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StoreBusyError(
                f"another server uses the snapshot directory {path.parent} ({holder})",
                hint="stop it, or give this server a --snapshot-dir of its own",
                details={"directory": str(path.parent), "holder": holder},
            ) from None
        except OSError as error:
            os.close(fd)
            raise store_error("lock", path, error) from error
        # Only for the message above; the lock itself is the kernel's.
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(fd)

    def release(self) -> None:
        """Give the lock back. May be called again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
