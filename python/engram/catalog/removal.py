"""Taking snapshots out of the catalog, many at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from engram.catalog.database import Database
from engram.catalog.rows import UnreferencedSegment
from engram.catalog.segments import FILE_REFERENCED
from engram.snapshot.segment import Shard

_UNREFERENCED: Final = f"SELECT * FROM segments WHERE id = ? AND NOT {FILE_REFERENCED}"


class RemovalTable:
    """The part of the catalog about what goes."""

    _db: Database

    def remove_snapshots(self, names: Iterable[tuple[str, str]]) -> list[UnreferencedSegment]:
        """Remove the rows of snapshots, by (snapshot id, tenant), in one transaction.

        Returns the segments that nothing refers to since. Their rows stay until their files are
        gone (`Catalog.forget_segments`); none until the catalog has been checked through, as with
        `Catalog.unreferenced_segments`. A snapshot that is not there is no error.
        """
        segments: set[int] = set()
        orphans: dict[UnreferencedSegment, None] = {}
        with self._db.atomic():
            for snapshot_id, tenant in names:
                rows = self._db.rows(
                    "SELECT DISTINCT segment FROM snapshots"
                    " JOIN snapshot_segments ON snapshot = snapshots.id"
                    " WHERE tenant = ? AND snapshot_id = ?",
                    (tenant, snapshot_id),
                )
                segments.update(row[0] for row in rows)
                self._db.run(
                    "DELETE FROM snapshots WHERE tenant = ? AND snapshot_id = ?",
                    (tenant, snapshot_id),
                )
            for number in sorted(segments):
                row = self._db.row(_UNREFERENCED, (number,))
                if row is not None:
                    shard = Shard(row["namespace"], row["rank"], row["world_size"])
                    orphans[UnreferencedSegment(shard, row["segment_id"], row["bytes"])] = None
        return list(orphans) if self._db.checked else []

    def count_snapshots(self, tenant: str, conversation_id: str) -> int:
        """How many snapshots a conversation has; 0 for an unknown one."""
        row = self._db.row(
            "SELECT count(*) FROM snapshots WHERE tenant = ? AND conversation_id = ?",
            (tenant, conversation_id),
        )
        assert row is not None
        return int(row[0])
