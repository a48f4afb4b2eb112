"""Room kept back so that a full disk can be emptied again: a deletion writes before it frees."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from engram.store.durable import free_bytes
from engram.store.filesystem import FileSystem

RESERVE_BYTES: Final = 1 << 20
"""Some times what the catalog's log grows by in one deletion."""
BLOCK_BYTES: Final = 512
"""What `st_blocks` counts in."""


class Reserve:
    """A file whose blocks are given back when the disk is full, and taken again when it is not.

    Only the blocks it takes matter: it holds nothing, may be lost, and is never read.
    """

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self._path = path
        self._fs = fs
        self._lock = threading.RLock()

    def keep(self) -> None:
        """Take the room, if it is not taken and the disk has it."""
        with self._lock:
            self._keep()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """What is done within finds the room free if there is little else."""
        with self._lock:
            free = free_bytes(self._path.parent)
            if free is not None and free < RESERVE_BYTES:
                with contextlib.suppress(OSError):
                    self._fs.unlink(self._path)
            try:
                yield
            finally:
                self._keep()

    def _keep(self) -> None:
        # Not whether it is there: a crash may have come before its blocks, and a copy of the
        # directory may have left them out.
        with contextlib.suppress(OSError):
            if self._path.stat().st_blocks * BLOCK_BYTES >= RESERVE_BYTES:
                return
        try:
            self._fs.allocate(self._path, RESERVE_BYTES)
        except OSError:
            # Too full even for that, or no such thing here: the disk is only less well prepared.
            with contextlib.suppress(OSError):
                self._fs.unlink(self._path)
