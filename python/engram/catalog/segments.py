"""The segments table: boundaries, chains, and what nothing refers to any more."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final

from engram.catalog.database import Database
from engram.catalog.rows import CatalogCounts, UnreferencedSegment
from engram.errors import NotFoundError
from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import Shard

_REFERENCED: Final = "EXISTS (SELECT 1 FROM snapshot_segments WHERE segment = segments.id)"
FILE_REFERENCED: Final = (
    "EXISTS (SELECT 1 FROM segments AS same JOIN snapshot_segments ON segment = same.id"
    " WHERE same.namespace = segments.namespace AND same.rank = segments.rank"
    " AND same.segment_id = segments.segment_id)"
)
"""A row is a segment as far as some snapshot uses it, so that one file may have several."""


class SegmentTable:
    """The part of the catalog about segments. They are no tenant's: bytes are shared by key."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def chain(self, namespace: str, rank: int, key: str) -> list[SegmentRef]:
        """The segments from token 0 to the boundary ``key``, in order, as one snapshot has them.

        Of several chains that end in ``key``, that of the newest snapshot. Raises `NotFoundError`
        if no snapshot holds it: rows that end there are no boundary where there are states.
        """
        with self._db.unchanging():
            holder = self._db.row(
                "SELECT link.snapshot, link.position FROM segments"
                " JOIN snapshot_segments AS link ON link.segment = segments.id"
                " JOIN snapshots ON snapshots.id = link.snapshot"
                " WHERE segments.namespace = ?1 AND segments.rank = ?2 AND segments.key = ?3"
                " AND (segments.has_state OR NOT EXISTS"
                "  (SELECT 1 FROM segments WHERE namespace = ?1 AND rank = ?2 AND has_state))"
                " ORDER BY snapshots.created_at DESC, snapshots.id DESC LIMIT 1",
                (namespace, rank, key),
            )
            if holder is None:
                raise NotFoundError(f"no snapshot holds the boundary {key}", details={"key": key})
            rows = self._db.rows(
                "SELECT segments.* FROM snapshot_segments AS link"
                " JOIN segments ON segments.id = link.segment"
                " WHERE link.snapshot = ? AND link.rank = ? AND link.position <= ?"
                " ORDER BY link.position",
                (holder["snapshot"], rank, holder["position"]),
            )
        return [_ref(row) for row in rows]

    def chains(self, namespace: str, world_size: int, key: str) -> list[list[SegmentRef]]:
        """`chain` of every rank, all as the catalog is at one moment.

        Without states, one rank's rows may end in ``key`` and another's not: what its RAM held of
        other conversations when they were captured decides where rows are cut. Then it raises
        `NotFoundError` too.
        """
        with self._db.unchanging():
            return [self.chain(namespace, rank, key) for rank in range(world_size)]

    def is_referenced(self, shard: Shard, segment_id: str) -> bool:
        """Whether some snapshot names the segment; so it seems while that is not known for sure.

        Until the catalog has been checked through, a damaged row may hide a reference.
        """
        if not self._db.checked:
            return True
        row = self._db.row(
            "SELECT 1 FROM segments WHERE namespace = ? AND rank = ? AND segment_id = ?"
            f" AND {_REFERENCED}",
            (shard.namespace, shard.rank, segment_id),
        )
        return row is not None

    def unreferenced_segments(self) -> list[UnreferencedSegment]:
        """Segments whose last snapshot was deleted.

        Files that no manifest ever named are not among them: compare the store's own listing with
        `is_referenced`. Chains stay whole, because a snapshot names all segments it stands on.
        There are none until the catalog has been checked through: nothing goes on a word that may
        be damaged.
        """
        if not self._db.checked:
            return []
        rows = self._db.rows(
            "SELECT DISTINCT namespace, rank, world_size, segment_id, bytes FROM segments"
            # The first says less, but at a fraction of the cost: it is asked of every row.
            f" WHERE NOT {_REFERENCED} AND NOT {FILE_REFERENCED} ORDER BY id"
        )
        return [
            UnreferencedSegment(
                Shard(row["namespace"], row["rank"], row["world_size"]),
                row["segment_id"],
                row["bytes"],
            )
            for row in rows
        ]

    def forget_segments(self, segments: Iterable[UnreferencedSegment]) -> int:
        """Drop the rows of segments whose files are gone; how many were dropped.

        One that a snapshot has come to name meanwhile stays.
        """
        with self._db.atomic():
            return sum(
                self._db.run(
                    "DELETE FROM segments WHERE namespace = ? AND rank = ? AND segment_id = ?"
                    f" AND NOT {FILE_REFERENCED}",
                    (segment.shard.namespace, segment.shard.rank, segment.segment_id),
                )
                for segment in segments
            )

    def counts(self) -> CatalogCounts:
        """How much the catalog holds; only referenced segments count."""
        row = self._db.row(
            "SELECT (SELECT count(*) FROM snapshots) AS snapshots,"
            " (SELECT count(*) FROM (SELECT DISTINCT tenant, conversation_id FROM snapshots))"
            "  AS conversations,"
            " count(*) AS segments, coalesce(sum(bytes), 0) AS segment_bytes"
            # Grouped as the index has them, which spares sorting hundreds of thousands of ids.
            " FROM (SELECT max(bytes) AS bytes FROM segments"
            f" WHERE {_REFERENCED} GROUP BY namespace, rank, segment_id)"
        )
        assert row is not None
        return CatalogCounts(**dict(row))


def _ref(row: sqlite3.Row) -> SegmentRef:
    return SegmentRef(
        segment_id=row["segment_id"],
        key=row["key"],
        start=row["start"],
        end=row["end"],
        has_state=bool(row["has_state"]),
        bytes=row["bytes"],
    )
