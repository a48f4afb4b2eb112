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
        "error": "not_found",
        "message": "no conversation 'trip'",
        "hint": "what to do about it",
        "details": {"conversation_id": "trip"},
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
