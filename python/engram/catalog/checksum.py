"""A checksum in every row: SQLite's own check sees damaged pages and indexes, not values."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Mapping
from typing import Any, Final

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
            if not row_is_intact(row):
                return f"row {row['id']} of {table} does not match its checksum"
    return None


def row_is_intact(row: sqlite3.Row) -> bool:
    """Whether a whole row of one of these tables matches its checksum."""
    values = {name: value for name, value in dict(row).items() if name not in _NOT_COVERED}
    return bool(_checksum(values) == row["checksum"])


def _checksum(values: Mapping[str, Any]) -> int:
    # Without NULLs, so that a column added by a migration leaves the rows there are valid. In
    # Python's own notation: it tells types apart, and takes a third of the time that JSON does.
    known = sorted(item for item in values.items() if item[1] is not None)
    return zlib.crc32(repr(known).encode("utf-8", "surrogatepass"))
