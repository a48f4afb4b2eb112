"""What people ask of the catalog beyond lists: one conversation, and what two snapshots share."""

from __future__ import annotations

from typing import Final

from engram.catalog.database import Database
from engram.catalog.rows import BranchRow, ConversationRow

_FILES: Final = (
    "SELECT namespace, rank, segment_id, max(bytes) AS bytes FROM segments WHERE id IN"
    " (SELECT segment FROM snapshot_segments JOIN snapshots ON snapshot = snapshots.id"
    "  WHERE tenant = ? AND {} = ?)"
    " GROUP BY namespace, rank, segment_id"
)
"""Files that snapshots name, each once: a file may be several segments, as far as each is used."""


class BrowsingTable:
    """The part of the catalog that describes conversations and compares snapshots."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def conversation_of(
        self, tenant: str, conversation_id: str, branches: list[BranchRow]
    ) -> ConversationRow:
        """A conversation of these branches, of which there is at least one."""
        row = self._db.row(
            f"SELECT sum(bytes) FROM ({_FILES.format('conversation_id')})",
            (tenant, conversation_id),
        )
        assert row is not None
        return ConversationRow(
            conversation_id,
            sum(branch.snapshots for branch in branches),
            len(branches),
            max(branch.newest_turn for branch in branches),
            min(branch.created_at for branch in branches),
            max(branch.updated_at for branch in branches),
            row[0] or 0,
        )

    def shared_bytes(self, tenant: str, one: str, other: str) -> int:
        """Bytes of the files that two snapshots of a tenant both name."""
        files = _FILES.format("snapshot_id")
        row = self._db.row(
            f"SELECT coalesce(sum(bytes), 0) FROM ({files})"
            f" JOIN ({files}) USING (namespace, rank, segment_id, bytes)",
            (tenant, one, tenant, other),
        )
        assert row is not None
        return int(row[0])
