"""A checksum in every row: SQLite's own check sees damaged pages and indexes, not values."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Mapping
from typing import Any, Final

from engram.core.canonical import canonical_json

CHECKED_TABLES: Final = ("snapshots", "segments")
_NOT_COVERED: Final = {"id", "checksum"}


def with_checksum(columns: Mapping[str, Any]) -> dict[str, Any]:
    """``columns`` of a new row, and the ``checksum`` over them."""
    values = {name: int(v) if isinstance(v, bool) else v for name, v in columns.items()}
    return {**values, "checksum": _checksum(values)}


def damaged_row(connection: sqlite3.Connection) -> str | None:
    """Which row does not match its checksum; None if all do."""
    for table in CHECKED_TABLES:
        for row in connection.execute(f"SELECT * FROM {table}"):
            values = {name: v for name, v in dict(row).items() if name not in _NOT_COVERED}
            if not _matches(values, row["checksum"]):
                return f"row {row['id']} of {table} does not match its checksum"
    return None


def _matches(values: Mapping[str, Any], checksum: object) -> bool:
    try:
        return _checksum(values) == checksum
    except (TypeError, ValueError):  # a type was damaged: JSON knows no blobs and no infinities
        return False


def _checksum(values: Mapping[str, Any]) -> int:
    # Without NULLs, so that a column added by a migration leaves the rows there are valid.
    return zlib.crc32(canonical_json({n: v for n, v in values.items() if v is not None}))
