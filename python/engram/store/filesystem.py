"""Every file operation the store makes, one method each, so that a test can make any one fail."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileSystem:
    """The operating system's calls as they are. All raise OSError. Stateless and thread-safe.

    `write`, `fsync` and `read_into` release the GIL for the time they take.
    """

    def create_temp(self, path: Path) -> int:
        """A new file for writing, held with a lock for as long as its descriptor is open.

        The lock tells a file being written (perhaps by another process) from one a crash left.
        Raises FileExistsError if ``path`` exists or a cleaner took the new file away at once.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(fd).st_nlink == 0
        except BlockingIOError:
            taken = True
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        if taken:
            os.close(fd)
            raise FileExistsError(f"{path} was removed while it was created")
        return fd

    def remove_abandoned(self, path: Path) -> bool:
        """Remove a temporary file unless somebody holds it; whether it was removed."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(fd)
        return True

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of ``data``; how many bytes, which may be fewer than asked."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replace ``target`` by ``source``, atomically."""
        os.replace(source, target)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make one directory, readable by its owner only; one that exists is no error."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not path.is_dir():
                raise

    def allocate(self, path: Path, nbytes: int) -> None:
        """Make a file that takes ``nbytes`` on the device, whatever it holds."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        finally:
            os.close(fd)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def open_read(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into ``buffer`` from ``offset``; how many bytes, 0 at the end of the file."""
        return os.preadv(fd, [buffer], offset)
