"""All snapshots with what they stand on, for whoever decides what to keep."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engram.catalog.database import Database

_PAGE_ROWS: Final = 5_000
"""Rows of one query: others may ask in between."""


@dataclass(frozen=True, slots=True)
class KeptSnapshot:
    """One snapshot; ``tips`` are the row ids of its last segments, one a rank."""

    snapshot_id: str
    tenant: str
    conversation_id: str
    branch_name: str
    turn_number: int
    token_count: int
    created_at: float
    pinned: bool
    expires_at: float | None
    tips: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KeptSegment:
    """One segment; ``parent`` is the row id of the one it stands on. ``start`` is a token count."""

    parent: int | None
    start: int
    bytes: int
    is_state: bool


@dataclass(frozen=True, slots=True)
class KeptInventory:
    """Snapshots in no order, and the segments that they stand on, by row id."""

    snapshots: list[KeptSnapshot]
    segments: dict[int, KeptSegment]


class InventoryTable:
    """The part of the catalog for retention: everything at once, of all tenants."""

    _db: Database

    def inventory(self) -> KeptInventory:
        """All snapshots and their segments, without reading a manifest.

        Read in pages, without holding the lock in between: a snapshot that comes or goes meanwhile
        may or may not be there. One whose segments are not all there is left out.
        """
        snapshots = list(self._kept_snapshots())
        segments = dict(self._kept_segments())
        whole = [one for one in snapshots if all(tip in segments for tip in one.tips)]
        return KeptInventory(whole, segments)

    def _kept_snapshots(self) -> Iterator[KeptSnapshot]:
        for rows in self._pages("SELECT * FROM snapshots WHERE id > ? ORDER BY id LIMIT ?"):
            # SQLite gives the other columns of the row that has the maximum.
            tips = self._db.rows(
                "SELECT snapshot, segment, max(position) FROM snapshot_segments"
                " WHERE snapshot BETWEEN ? AND ? GROUP BY snapshot, rank ORDER BY snapshot, rank",
                (rows[0]["id"], rows[-1]["id"]),
            )
            of: dict[int, list[int]] = {}
            for snapshot, segment, _ in tips:
                of.setdefault(snapshot, []).append(segment)
            for row in rows:
                found = of.get(row["id"], [])
                if len(found) == row["world_size"]:
                    yield KeptSnapshot(
                        row["snapshot_id"],
                        row["tenant"],
                        row["conversation_id"],
                        row["branch_name"],
                        row["turn_number"],
                        row["token_count"],
                        row["created_at"],
                        bool(row["pinned"]),
                        row["expires_at"],
                        tuple(found),
                    )

    def _kept_segments(self) -> Iterator[tuple[int, KeptSegment]]:
        query = (
            'SELECT id, start, "end", bytes,'
            " (SELECT below.segment FROM snapshot_segments AS here"
            "  JOIN snapshot_segments AS below ON below.snapshot = here.snapshot"
            "   AND below.rank = here.rank AND below.position = here.position - 1"
            "  WHERE here.segment = segments.id LIMIT 1) AS parent"
            " FROM segments WHERE id > ? ORDER BY id LIMIT ?"
        )
        for rows in self._pages(query):
            for row in rows:
                is_state = row["start"] == row["end"]
                yield (
                    row["id"],
                    KeptSegment(row["parent"], row["start"], row["bytes"], is_state),
                )

    def _pages(self, query: str) -> Iterator[list[sqlite3.Row]]:
        last = 0
        while rows := self._db.rows(query, (last, _PAGE_ROWS)):
            yield rows
            last = rows[-1]["id"]
