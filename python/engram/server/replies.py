"""What the routes say of snapshots, saves and restores."""

from __future__ import annotations

from typing import Any

from engram.catalog.rows import SnapshotRow
from engram.core.tokens import TokenArray
from engram.service.results import RestoreResult, SaveResult


def metadata(
    row: SnapshotRow, tokens: TokenArray | None, tier: str, damaged: str | None = None
) -> dict[str, Any]:
    """Everything of one snapshot; `damaged` says what is wrong with its files."""
    return {
        "conversation_id": row.conversation_id,
        "turn_number": row.turn_number,
        "timestamp": row.created_at,
        "token_count": row.token_count,
        "model_name": row.model_name,
        "layer_config": {"num_layers": row.num_layers, "model_type": row.model_type},
        "branch_name": row.branch_name,
        "parent_snapshot": row.parent_snapshot,
        "fill_ids": None if tokens is None else tokens.tolist(),
        "snapshot_id": row.snapshot_id,
        "recompute_tokens": row.pending_count,
        "tier": tier,
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
        "damaged": damaged,
    }


def summary(row: SnapshotRow) -> dict[str, Any]:
    """What a listing says of one snapshot: all but what is in its files and in memory."""
    found = metadata(row, None, "")
    for name in ("fill_ids", "tier", "damaged"):
        del found[name]
    return found


def save_reply(result: SaveResult) -> dict[str, Any]:
    """What a save acknowledges."""
    place = f"turn {result.turn_number} of {result.conversation_id}/{result.branch_name}"
    if result.existing:
        message = f"{place} was saved already"
    elif result.durability == "async":
        message = f"{place} is being saved"
    else:
        message = f"saved {place}: {result.token_count} tokens"
    if result.recomputed:
        message += "; its state was gone and was computed again from the recorded tokens"
    return {
        "success": True,
        "snapshot_id": result.snapshot_id,
        "message": message,
        "conversation_id": result.conversation_id,
        "branch_name": result.branch_name,
        "turn_number": result.turn_number,
        "token_count": result.token_count,
        "recompute_tokens": result.recompute_tokens,
        "bytes": result.bytes,
        "unique_bytes": result.unique_bytes,
        "durability": result.durability,
        "recomputed": result.recomputed,
        "elapsed_ms": round(result.elapsed_ms, 3),
    }


def restore_reply(result: RestoreResult) -> dict[str, Any]:
    """What a restore acknowledges."""
    generation = result.generation
    return {
        "success": True,
        "rid": generation.rid if generation else None,
        "mamba_pool_idx": result.state_slot,
        "message": f"restored {shown(result.snapshot)}: {result.token_count} tokens, "
        f"from {result.source_tier}",
        "token_count": result.token_count,
        "recompute_tokens": result.recompute_tokens,
        "output_ids": generation.output_ids if generation else None,
        "output_text": generation.text if generation else None,
        "finish_reason": generation.meta.get("finish_reason") if generation else None,
        "cached_tokens": generation.cached_tokens if generation else None,
        "snapshot_id": result.snapshot.snapshot_id,
        "conversation_id": result.snapshot.conversation_id,
        "branch_name": result.snapshot.branch_name,
        "turn_number": result.snapshot.turn_number,
        "source_tier": result.source_tier,
        "tier": result.tier,
        "verified": result.verified,
        "bytes": result.bytes,
        "elapsed_ms": round(result.elapsed_ms, 3),
    }


def shown(row: SnapshotRow) -> str:
    """A snapshot's place, for people."""
    return f"turn {row.turn_number} of {row.conversation_id}/{row.branch_name}"
