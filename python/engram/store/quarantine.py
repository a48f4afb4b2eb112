"""Damaged files are moved aside with a note saying why, never deleted and never read again."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from engram.core.canonical import canonical_json
from engram.errors import StoreError
from engram.store.durable import DirectoryMaker, write_durable
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout


class Quarantine:
    """The quarantine directory of one store. Thread-safe, usable by several processes."""

    def __init__(self, layout: Layout, directories: DirectoryMaker, fs: FileSystem) -> None:
        self._layout = layout
        self._directories = directories
        self._fs = fs

    def take(self, path: Path, reason: str) -> Path | None:
        """Move ``path`` here and write ``<name>.reason.json`` beside it; where it is now.

        None if it could not be moved (a read-only disk, or another process was faster): the damage
        itself is what the caller has to report, so that this never raises.
        """
        target = (
            self._layout.quarantine / f"{time.time_ns():020d}-{secrets.token_hex(4)}-{path.name}"
        )
        note = canonical_json(
            {
                "file": str(path),
                "reason": reason,
                "quarantined_at": time.time(),
            }
        )
        try:
            self._directories.ensure(self._layout.quarantine)
            self._fs.rename(path, target)
        except (OSError, StoreError):
            return None
        try:
            write_durable(
                target.with_name(target.name + ".reason.json"),
                [note],
                needed=len(note),
                fs=self._fs,
            )
            self._fs.fsync_dir(path.parent)
        except (OSError, StoreError):
            return target  # moved; only the note or its durability is missing
        return target

    def count(self) -> int:
        """How many damaged files are held."""
        if not self._layout.quarantine.is_dir():
            return 0
        names = (path.name for path in self._layout.quarantine.iterdir())
        return sum(not name.endswith(".reason.json") and not name.startswith(".") for name in names)
