"""The exception that a reply stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from engram.errors import EngramError, UpstreamError, error_from_dict, walk_error_classes

SHOWN: Final = 500
"""Characters of a reply that is no JSON, in the error's details."""


def failure_of(status: int, data: bytes) -> EngramError:
    """The error in the body of a reply that is no success.

    Engram's own errors come back as the class they were raised as, or the most general one of
    their code; what SGLang itself or a proxy answered is an `UpstreamError`.
    """
    body = _decoded(data)
    fields = _fields(body)
    code = fields.get("error")
    if isinstance(code, str) and code in {cls.code for cls in walk_error_classes()}:
        error = error_from_dict(fields)
        error.details.setdefault("status", status)
        return error
    told = _message(body)
    details: dict[str, object] = {"status": status}
    if isinstance(code, str):
        details["code"] = code
    if told is None:
        details["body"] = data[:SHOWN].decode("utf-8", "replace")
    return UpstreamError(
        told or f"the server answered with status {status}",
        hint=_hint(status),
        details=details,
    )


def unexpected(status: int, why: str, data: bytes) -> UpstreamError:
    """A success of which nothing can be made."""
    return UpstreamError(
        f"the server's reply is not what was expected: {why}",
        hint="is this address an SGLang server with --enable-snapshot-persistence?",
        details={"status": status, "body": data[:SHOWN].decode("utf-8", "replace")},
    )


def _decoded(data: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _fields(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """``error, message, hint, details`` as `error_from_dict` takes them."""
    inner = body.get("error")
    if isinstance(inner, dict):
        return {**inner, "error": inner.get("code")}
    return body  # of an Engram before this form, or of others


def _message(body: Mapping[str, Any]) -> str | None:
    """What SGLang, OpenAI's form or FastAPI say is wrong."""
    inner = body.get("error")
    for found in (
        inner.get("message") if isinstance(inner, dict) else None,
        body.get("message"),
        inner,
        body.get("detail"),
    ):
        if isinstance(found, str) and found:
            return found
    return None


def _hint(status: int) -> str:
    if status in (401, 403):
        return "give the server's API key, or its admin API key if it has one"
    if status in (404, 405):
        return "does the server run with --enable-snapshot-persistence?"
    return ""
