"""Whose the segments are."""

from __future__ import annotations

from collections.abc import Iterable

from engram.catalog.database import Database


class OwnerTable:
    """The part of the catalog about the conversations that stand on segments."""

    _db: Database

    def owners_of(
        self, namespace: str, places: Iterable[tuple[int, str]]
    ) -> dict[tuple[int, str], frozenset[tuple[str, str]]]:
        """(rank, segment id) -> the conversations (tenant, id) with a snapshot on that segment.

        Segments that no snapshot names are left out.
        """
        found = {}
        for rank, segment_id in places:
            rows = self._db.rows(
                "SELECT DISTINCT snapshots.tenant, snapshots.conversation_id FROM segments"
                " JOIN snapshot_segments ON segment = segments.id"
                " JOIN snapshots ON snapshots.id = snapshot"
                " WHERE segments.namespace = ? AND segments.rank = ? AND segments.segment_id = ?",
                (namespace, rank, segment_id),
            )
            if rows:
                found[rank, segment_id] = frozenset((row[0], row[1]) for row in rows)
        return found

    def newest_snapshot(self, tenant: str, conversation_id: str) -> float:
        """When the newest snapshot of a conversation was made; 0 if it has none."""
        row = self._db.row(
            "SELECT max(created_at) FROM snapshots WHERE tenant = ? AND conversation_id = ?",
            (tenant, conversation_id),
        )
        return 0.0 if row is None or row[0] is None else float(row[0])
