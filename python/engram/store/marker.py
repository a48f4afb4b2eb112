"""The marker file: which format a store has. It can always be rebuilt."""

from __future__ import annotations

import time
from enum import Enum
from typing import Final

from engram.errors import StoreFormatError
from engram.snapshot.envelope import open_record, seal_record
from engram.store.durable import write_durable
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.record_files import read_small_file

FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 16


class Marker(Enum):
    """What was found where the marker belongs."""

    INTACT = "intact"
    MISSING = "missing"
    DAMAGED = "damaged"


def check_marker(layout: Layout, fs: FileSystem) -> Marker:
    """Look at the marker. Raises `StoreFormatError` for an intact one of another format."""
    data = read_small_file(layout.marker, _MAX_BYTES, fs)
    if data is None:
        return Marker.MISSING
    try:
        body = open_record(data)
    except ValueError:
        return Marker.DAMAGED
    found = body.get("format")
    if type(found) is not int:
        return Marker.DAMAGED
    if found != FORMAT:
        raise StoreFormatError.of(f"the snapshot directory {layout.root}", found, FORMAT)
    return Marker.INTACT


def write_marker(layout: Layout, fs: FileSystem) -> None:
    """Write the marker of this format, durably."""
    data = seal_record({"created_at": time.time(), "format": FORMAT})
    write_durable(layout.marker, [data], needed=len(data), fs=fs)
