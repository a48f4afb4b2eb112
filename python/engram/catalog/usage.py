"""When conversations were last used: of all tables the one that may be lost without harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engram.catalog.database import Database

Conversation = tuple[str, str]
"""Tenant and conversation id."""

_SNAPSHOT_OF_IT: Final = (
    "EXISTS (SELECT 1 FROM snapshots WHERE snapshots.tenant = usage.tenant"
    " AND snapshots.conversation_id = usage.conversation_id)"
)


class UsageTable:
    """The part of the catalog about the use of conversations. No manifest has it: after the catalog
    was rebuilt, a conversation was used when its newest snapshot was made.
    """

    _db: Database

    def record_use(self, uses: Mapping[Conversation, float]) -> None:
        """Conversations were used at these times (seconds since the epoch); one transaction."""
        if not uses:
            return
        with self._db.atomic():
            self._db.run_many(
                "INSERT INTO usage (tenant, conversation_id, used_at) VALUES (?1, ?2, ?3)"
                " ON CONFLICT DO UPDATE SET used_at = max(used_at, ?3)",
                [(*conversation, used_at) for conversation, used_at in uses.items()],
            )

    def last_uses(self) -> dict[Conversation, float]:
        """When each conversation was last used, as far as it was recorded."""
        rows = self._db.rows("SELECT tenant, conversation_id, used_at FROM usage")
        return {(row[0], row[1]): row[2] for row in rows if isinstance(row[2], float)}

    def last_use(self, tenant: str, conversation_id: str) -> float | None:
        """When a conversation was last used; None if that was not recorded."""
        row = self._db.row(
            "SELECT used_at FROM usage WHERE tenant = ? AND conversation_id = ?",
            (tenant, conversation_id),
        )
        return row[0] if row is not None and isinstance(row[0], float) else None

    def forget_uses(self, before: float) -> int:
        """Drop what was last used before then and has no snapshot; how many were dropped."""
        return self._db.run(
            f"DELETE FROM usage WHERE used_at < ? AND NOT {_SNAPSHOT_OF_IT}", (before,)
        )
