"""The one form in which every route tells what went wrong."""

from __future__ import annotations

from typing import Any

import httpx

KEYS = {"code", "message", "hint", "details"}


def refusal(response: httpx.Response) -> dict[str, Any]:
    """What a failed reply says, after a look at its form: `error` (its code), `message`, `hint`,
    `details`."""
    body = response.json()
    assert response.status_code >= 400, body
    assert set(body) == {"success", "message", "error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == KEYS, body
    assert body["success"] is False
    assert body["message"] == error["message"] != ""
    assert isinstance(error["hint"], str)
    assert isinstance(error["details"], dict)
    return {**error, "error": error["code"]}
