"""A snapshot as the routes describe it: its metadata, or what lists have of it."""

from __future__ import annotations

from typing import Any

from engram.catalog.rows import SnapshotRow
from engram.core.tokens import TokenArray
from engram.errors import NotFoundError, SnapshotCorruptError, StoreError
from engram.service import SnapshotService


def summary(row: SnapshotRow) -> dict[str, Any]:
    """What the catalog knows of a snapshot: no file is read for it, and no rank is asked."""
    return {
        "conversation_id": row.conversation_id,
        "turn_number": row.turn_number,
        "timestamp": row.created_at,
        "token_count": row.token_count,
        "model_name": row.model_name,
        "layer_config": {"num_layers": row.num_layers, "model_type": row.model_type},
        "branch_name": row.branch_name,
        "parent_snapshot": row.parent_snapshot,
        "snapshot_id": row.snapshot_id,
        "recompute_tokens": row.pending_count,
        "bytes": row.bytes,
        "unique_bytes": row.unique_bytes,
        "durability": "sync",
        "created_at": row.created_at,
        "pinned": row.pinned,
        "expires_at": row.expires_at,
        "namespace": row.namespace,
        "user_metadata": row.user_metadata,
        "rid": row.rid,
        "health": row.health,
    }


def metadata_of(
    row: SnapshotRow, tokens: TokenArray | None, tier: str, damaged: str | None = None
) -> dict[str, Any]:
    """The whole: `tokens` are all that are recorded, None if they cannot be read."""
    return {
        **summary(row),
        "fill_ids": None if tokens is None else tokens.tolist(),
        "tier": tier,
        "damaged": damaged,
    }


async def listed(service: SnapshotService, row: SnapshotRow) -> dict[str, Any]:
    """The metadata of one snapshot among others, which its damage must not hide."""
    try:
        tokens = await service.tokens(row)
        return metadata_of(row, tokens, await service.tier(row))
    except (SnapshotCorruptError, NotFoundError, StoreError) as error:
        return metadata_of(row, None, "disk", damaged=error.message)
