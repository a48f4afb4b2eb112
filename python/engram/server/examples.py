"""What OpenAPI shows of bodies and replies."""

from __future__ import annotations

from typing import Any, Final, cast

from fastapi import APIRouter


def reply(description: str, example: Any) -> dict[str, Any]:
    """A JSON reply as OpenAPI describes it."""
    return {"description": description, "content": {"application/json": {"example": example}}}


ERROR_REPLY: Final = reply(
    "A failure; every one has this form.",
    {
        "success": False,
        "message": "no conversation 'trip'",
        "error": {
            "code": "not_found",
            "message": "no conversation 'trip'",
            "hint": "what to do about it",
            "details": {"conversation_id": "trip"},
        },
    },
)
CHAT_REPLY: Final = reply(
    "As of /v1/chat/completions; with stream, its chunks as server-sent events.",
    {
        "id": "5f0e6b5c9d2e4c0b8a6a0d5a7b1c2d3e",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Rain, all day."},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 212,
            "completion_tokens": 6,
            "total_tokens": 218,
            "prompt_tokens_details": {"cached_tokens": 195},
        },
    },
)
METADATA: Final[dict[str, Any]] = {
    "conversation_id": "trip",
    "turn_number": 3,
    "timestamp": 1760000100.5,
    "token_count": 211,
    "model_name": "granite-4.0-h-tiny",
    "layer_config": {"num_layers": 40, "model_type": "granitemoehybrid"},
    "branch_name": "main",
    "parent_snapshot": "snap-0f3b",
    "fill_ids": [100264, 9125, 100265],
    "snapshot_id": "snap-0f3c",
    "recompute_tokens": 1,
    "tier": "ram",
    "bytes": 2097152,
    "unique_bytes": 524288,
    "durability": "sync",
    "created_at": 1760000100.5,
    "pinned": False,
    "expires_at": None,
    "namespace": "5f" * 32,
    "user_metadata": {},
    "rid": "5f0e6b5c9d2e4c0b8a6a0d5a7b1c2d3e",
    "health": None,
    "damaged": None,
}
SAVED: Final[dict[str, Any]] = {
    "success": True,
    "snapshot_id": "snap-0f3c",
    "message": "saved turn 3 of trip/main: 211 tokens",
    "conversation_id": "trip",
    "branch_name": "main",
    "turn_number": 3,
    "token_count": 211,
    "recompute_tokens": 1,
    "bytes": 2097152,
    "unique_bytes": 524288,
    "durability": "sync",
    "recomputed": False,
    "elapsed_ms": 12.5,
}
LISTED: Final = {k: v for k, v in METADATA.items() if k not in ("fill_ids", "tier", "damaged")}
"""A snapshot as lists have it."""
RESTORED: Final[dict[str, Any]] = {
    "success": True,
    "rid": None,
    "mamba_pool_idx": None,
    "message": "restored turn 3 of trip/main: 211 tokens, from disk",
    "token_count": 211,
    "recompute_tokens": 1,
    "output_ids": None,
    "output_text": None,
    "finish_reason": None,
    "cached_tokens": None,
    "snapshot_id": "snap-0f3c",
    "conversation_id": "trip",
    "branch_name": "main",
    "turn_number": 3,
    "source_tier": "disk",
    "tier": "ram",
    "verified": True,
    "bytes": 2097152,
    "elapsed_ms": 21.5,
}
TIERS: Final[dict[str, Any]] = {
    "vram": {
        "capacity_bytes": 805306368,
        "bytes": 6291456,
        "tokens": 633,
        "states": 3,
        "pinned_bytes": 2097152,
        "pin_budget_bytes": 201326592,
        "pins": [{"conversation_id": "trip", "branch_name": "main", "resident": True}],
    },
    "ram": {
        "capacity_bytes": 10000000000,
        "bytes": 6291456,
        "segments": 6,
        "held_bytes": 0,
        "captured": 3,
        "promoted_bytes": 2097152,
        "persisted_bytes": 6291456,
        "evicted": 0,
        "demoted": 0,
        "conversations": 1,
        "pinned_bytes": 0,
    },
    "disk": {
        "capacity_bytes": None,
        "free_bytes": 99999997952,
        "bytes": 6291456,
        "segments": 6,
        "named_bytes": 6291456,
        "snapshots": 3,
        "conversations": 1,
    },
}
PLACE: Final = {"conversation_id": "trip", "turn_number": 3}
_DELETED: Final = {
    "success": True,
    "snapshot_id": "snap-0f3c",
    "message": "deleted turn 3 of trip/main",
}
REPLIES: Final[dict[str, Any]] = {
    "POST /save_snapshot": SAVED,
    "POST /restore_snapshot": RESTORED,
    "POST /v1/snapshots/{snapshot_id}/restore": RESTORED,
    "POST /list_snapshots": {"success": True, "snapshots": [METADATA]},
    "POST /get_snapshot_info": {"success": True, "metadata": METADATA},
    "POST /delete_snapshot": _DELETED,
    "DELETE /v1/snapshots/{snapshot_id}": _DELETED,
    "PATCH /v1/snapshots/{snapshot_id}": {
        "success": True,
        "snapshot_id": "snap-0f3c",
        "pinned": True,
        "expires_at": None,
        "user_metadata": {"topic": "mountains"},
        "message": "changed pinned, user_metadata",
    },
    "PATCH /v1/conversations/{conversation_id}": {
        "success": True,
        "conversation_id": "trip",
        "priority": 80,
        "message": "the priority of trip is 80",
    },
    "GET /v1/snapshots/{snapshot_id}/compare": {
        "success": True,
        "common_tokens": 120,
        "shared_bytes": 1048576,
        "snapshots": [LISTED, LISTED],
    },
    "GET /v1/requests/{rid}": {
        "success": True,
        "rid": "5f0e6b5c9d2e4c0b8a6a0d5a7b1c2d3e",
        "conversation_id": "trip",
        "branch_name": "main",
        "turn_number": 4,
        "prompt_tokens": 240,
        "cached_tokens": 211,
        "vram_tokens": 0,
        "ram_tokens": 211,
        "fetched_tokens": 211,
        "fetched_from": "disk",
        "problem": None,
        "earlier": {
            "branch_name": "main",
            "turn_number": 3,
            "snapshot_id": "snap-0f3c",
            "token_count": 211,
            "tokens": 212,
            "common_tokens": 212,
            "difference": None,
        },
    },
    "GET /v1/memory/tiers": {"success": True, "tiers": TIERS},
    "GET /v1/memory/health": {
        "success": True,
        "service": {"saves": 3, "restores": 1, "last_failures": []},
        "queues": {"requests_held": 0, "saves_running": 0, "saves_waiting": 0},
        "ranks": [{"leases": 0, "tree_locks": 0, "ram_bytes": 6291456, "corrupt": 0}],
        "stored_boundaries": 3,
    },
    "POST /v1/memory/promote": {
        "success": True,
        "snapshot_id": "snap-0f3c",
        "source_tier": "disk",
        "tier": "ram",
        "bytes": 2097152,
        "message": "snap-0f3c is in ram",
    },
    "POST /v1/memory/demote": {
        "success": True,
        "snapshots": 3,
        "bytes": 6291456,
        "message": "6291456 bytes left RAM",
    },
    "POST /v1/memory/pin": {
        "success": True,
        "conversation_id": "trip",
        "branch_name": "main",
        "resident": True,
        "message": "trip/main is kept in VRAM",
    },
    "POST /v1/memory/unpin": {
        "success": True,
        "unpinned": True,
        "message": "trip/main is not pinned in VRAM",
    },
}
"""Route -> what a success of it looks like, of those whose router does not say so itself."""
BODIES: Final[dict[str, Any]] = {
    "POST /save_snapshot": {"conversation_id": "trip", "durability": "sync"},
    "POST /restore_snapshot": PLACE,
    "POST /list_snapshots": {"conversation_id": "trip"},
    "POST /get_snapshot_info": PLACE,
    "POST /delete_snapshot": PLACE,
    "POST /v1/snapshots": {"conversation_id": "trip", "snapshot_id": "trip-3", "turn_number": 3},
    "PATCH /v1/snapshots/{snapshot_id}": {"pinned": True, "user_metadata": {"topic": "mountains"}},
    "PATCH /v1/conversations/{conversation_id}": {"priority": 80},
    "POST /v1/snapshots/{snapshot_id}/restore": {
        "create_new_request": True,
        "continuation_ids": [100264, 882, 100265],
        "max_new_tokens": 64,
        "sampling_params": {"temperature": 0.7},
    },
    "POST /v1/snapshots/{snapshot_id}/branch": {"branch_name": "another-way"},
    "POST /v1/prefixes": {
        "name": "guide",
        "messages": [{"role": "system", "content": "You are a guide. You know every path."}],
    },
    "POST /v1/memory/promote": {"conversation_id": "trip"},
    "POST /v1/memory/demote": {"snapshot_id": "snap-0f3c"},
    "POST /v1/memory/pin": {"conversation_id": "trip", "branch_name": "main"},
    "POST /v1/memory/unpin": {"conversation_id": "trip"},
}
"""Route -> a body that it takes."""


def described(router: APIRouter) -> APIRouter:
    """Give every route of a router its examples, and the form of its failures."""
    for route in cast(list[Any], router.routes):
        for method in route.methods:
            name = f"{method} {route.path}"
            if name in REPLIES:
                route.responses[200] = reply("Success.", REPLIES[name])
            for status in (404, 422):
                route.responses.setdefault(status, ERROR_REPLY)
            if name in BODIES:
                content = route.openapi_extra["requestBody"]["content"]
                content["application/json"]["example"] = BODIES[name]
    return router
