"""All snapshots with what they stand on, for whoever decides what to keep."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
        may or may not be there. One whose segments are not all there is left out. One that is
        changed meanwhile, which gives it another row, is there once, as it was read last.
        """
        snapshots = {(one.tenant, one.snapshot_id): one for one in self._kept_snapshots()}
        segments, files = self._kept_segments()
        whole = [
            replace(one, tips=tuple([files[tip] for tip in one.tips]))
            for one in snapshots.values()
            if all(tip in files for tip in one.tips)
        ]
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

    def _kept_segments(self) -> tuple[dict[int, KeptSegment], dict[int, int]]:
        """The segments by the first row of each, and that row for every row.

        One file has several rows where snapshots name beginnings of it.
        """
        query = (
            'SELECT id, namespace, rank, segment_id, start, "end", bytes,'
            " (SELECT below.segment FROM snapshot_segments AS here"
            "  JOIN snapshot_segments AS below ON below.snapshot = here.snapshot"
            "   AND below.rank = here.rank AND below.position = here.position - 1"
            "  WHERE here.segment = segments.id LIMIT 1) AS parent"
            " FROM segments WHERE id > ? ORDER BY id LIMIT ?"
        )
        first: dict[tuple[str, int, str], int] = {}
        files: dict[int, int] = {}
        found: dict[int, KeptSegment] = {}
        for rows in self._pages(query):
            for number, namespace, rank, segment_id, start, end, size, parent in rows:
                file = first.setdefault((namespace, rank, segment_id), number)
                files[number] = file
                if file == number:
                    found[number] = KeptSegment(parent, start, size, start == end)
        for number, one in found.items():
            if one.parent is not None:
                parent = files.get(one.parent)
                found[number] = KeptSegment(parent, one.start, one.bytes, one.is_state)
        return found, files

    def _pages(self, query: str) -> Iterator[list[sqlite3.Row]]:
        last = 0
        while rows := self._db.rows(query, (last, _PAGE_ROWS)):
            yield rows
            last = rows[-1]["id"]
