"""What OpenAPI shows of replies."""

from __future__ import annotations

from typing import Any, Final


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
