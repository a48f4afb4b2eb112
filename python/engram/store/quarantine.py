"""Damaged files are moved aside with a note saying why, and never read again.

The newest are kept, as many as the bounds below allow, for whoever wants to repair one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engram.core.canonical import canonical_json
from engram.errors import StoreError
from engram.store.durable import DirectoryMaker, write_durable
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout

logger = logging.getLogger(__name__)

MAX_FILES: Final = 1_000
MAX_BYTES: Final = 4 << 30
"""Bounds of what is kept. The newest file is, however large it is."""
NOTE_SUFFIX: Final = ".reason.json"
_MAX_NOTE_BYTES: Final = 1 << 16
_STAMP_LENGTH: Final = 30
"""`<20 digits of nanoseconds>-<8 hex>-` before the name a file had."""


@dataclass(frozen=True)
class QuarantinedFile:
    """A damaged file that is held. ``name`` and ``file`` are what it was called before it was moved
    to ``path``; times are seconds since the epoch. What its note does not tell is None or empty.
    """

    path: Path
    name: str
    bytes: int
    file: str
    reason: str
    quarantined_at: float | None


class Quarantine:
    """The quarantine directory of one store. Thread-safe, usable by several processes."""

    def __init__(self, layout: Layout, directories: DirectoryMaker, fs: FileSystem) -> None:
        self._layout = layout
        self._directories = directories
        self._fs = fs

    def take(self, path: Path, reason: str, found: os.stat_result | None = None) -> Path | None:
        """Move ``path`` here and write ``<name>.reason.json`` beside it; where it is now.

        None if it could not be moved (a read-only disk, or another process was faster): the damage
        itself is what the caller has to report, so that this never raises. None too if it is no
        longer the file ``found`` damaged: whoever has put another there relies on it.
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
            # Looked at afterwards: before, it could still be replaced until it is moved.
            if found is not None and not os.path.samestat(found, target.stat()):
                self._fs.rename(target, path)
                return None
        except (OSError, StoreError):
            logger.warning("Engram: %s is damaged (%s) and cannot be moved aside", path, reason)
            return None
        logger.warning("Engram: %s is damaged (%s); it lies in %s", path, reason, target)
        # It is moved: only the note, its durability or the room it takes can be missing.
        with contextlib.suppress(OSError, StoreError):
            write_durable(
                target.with_name(target.name + NOTE_SUFFIX),
                [note],
                needed=len(note),
                fs=self._fs,
            )
            self._fs.fsync_dir(path.parent)
            self._trim()
        return target

    def find(self, name: str) -> Path | None:
        """Where the newest file lies that had this name; None if none is held."""
        held = [path for path in self._files() if path.name[_STAMP_LENGTH:] == name]
        return held[-1] if held else None

    def names(self) -> frozenset[str]:
        """The names that the files held had."""
        return frozenset(path.name[_STAMP_LENGTH:] for path in self._files())

    def entries(self) -> list[QuarantinedFile]:
        """What is held and why, oldest first."""
        return [_entry(path) for path in self._files()]

    def size(self) -> tuple[int, int]:
        """How many damaged files are held, and their bytes."""
        sizes = [_size(path) for path in self._files()]
        return len(sizes), sum(sizes)

    def _files(self) -> list[Path]:
        """The damaged files, oldest first."""
        if not self._layout.quarantine.is_dir():
            return []
        found = (path for path in self._layout.quarantine.iterdir() if path.name[0] != ".")
        return sorted(path for path in found if not path.name.endswith(NOTE_SUFFIX))

    def _trim(self) -> None:
        """Remove the oldest files beyond the bounds, and their notes."""
        count = total = 0
        for path in reversed(self._files()):
            count += 1
            total += _size(path)
            if count == 1 or (count <= MAX_FILES and total <= MAX_BYTES):
                continue
            logger.warning("Engram: the quarantine is full: %s is removed", path)
            for gone in (path, path.with_name(path.name + NOTE_SUFFIX)):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.unlink(gone)


def _entry(path: Path) -> QuarantinedFile:
    note = _note(path.with_name(path.name + NOTE_SUFFIX))
    file, reason, at = (note.get(name) for name in ("file", "reason", "quarantined_at"))
    return QuarantinedFile(
        path=path,
        name=path.name[_STAMP_LENGTH:],
        bytes=_size(path),
        file=file if isinstance(file, str) else "",
        reason=reason if isinstance(reason, str) else "",
        quarantined_at=float(at) if isinstance(at, (int, float)) else None,
    )


def _note(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as opened:
            note = json.loads(opened.read(_MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # removed meanwhile by another process
