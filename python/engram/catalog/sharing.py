"""What two snapshots share."""

from __future__ import annotations

from typing import Final

from engram.catalog.database import Database

_FILES: Final = (
    "SELECT namespace, rank, segment_id, max(bytes) AS bytes FROM segments WHERE id IN"
    " (SELECT segment FROM snapshot_segments JOIN snapshots ON snapshot = snapshots.id"
    "  WHERE tenant = ? AND snapshot_id = ?)"
    " GROUP BY namespace, rank, segment_id"
)
"""Files that a snapshot names, each once: one may be several segments, as far as each is used."""


class SharingTable:
    """The part of the catalog that compares snapshots."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def shared_bytes(self, tenant: str, one: str, other: str) -> int:
        """Bytes of the files that two snapshots of a tenant both name."""
        row = self._db.row(
            f"SELECT coalesce(sum(bytes), 0) FROM ({_FILES})"
            f" JOIN ({_FILES}) USING (namespace, rank, segment_id, bytes)",
            (tenant, one, tenant, other),
        )
        assert row is not None
        return int(row[0])
