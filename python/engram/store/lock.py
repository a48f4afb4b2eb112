"""One server a store: an advisory lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from engram.errors import StoreBusyError
from engram.store.durable import store_error


class StoreLock:
    """Holds a store until `release` or the end of the process, however it ends.

    Locked are ``<root>/lock`` and, where the file system can do that, the directory itself: a lock
    file that somebody removes and a second server makes anew would lock nothing.
    """

    def __init__(self, *fds: int) -> None:
        self._fds = fds

    @classmethod
    def acquire(cls, path: Path) -> StoreLock:
        """Take the lock without waiting. Raises `StoreBusyError` naming the holder."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise store_error("open", path, error) from error
        directory = None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            directory = lock_directory(path.parent, fcntl.LOCK_EX)
        except BlockingIOError:
            holder = holder_in(fd)
            os.close(fd)
            raise StoreBusyError(
                f"another server uses the snapshot directory {path.parent} ({holder})",
                hint="stop it, or give this server a --snapshot-dir of its own",
                details={"directory": str(path.parent), "holder": holder},
            ) from None
        except OSError as error:
            os.close(fd)
            raise store_error("lock", path, error) from error
        # Only for the message above, which a full disk may do without: the lock itself is the
        # kernel's. Written before what is too much is cut off, to stay in the block it has.
        name = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
        with contextlib.suppress(OSError):
            os.truncate(fd, os.pwrite(fd, name, 0))
        return cls(fd) if directory is None else cls(fd, directory)

    def release(self) -> None:
        """Give the lock back. May be called again."""
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)


def lock_directory(root: Path, how: int) -> int | None:
    """A descriptor that holds ``root`` itself; None where directories cannot be locked, as on NFS.

    Raises BlockingIOError if somebody else holds it.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
        return None
    return fd


def holder_in(fd: int) -> str:
    """Who wrote into an open lock file that it is held."""
    return os.pread(fd, 256, 0).decode(errors="replace").strip() or "unknown"
