"""Stateful chat: the client sends what is new, the server goes on from what it has recorded."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from fastapi import APIRouter, Request, Response

from engram.core.ids import check_id
from engram.errors import EngramError, InternalError, InvalidRequestError
from engram.server.examples import CHAT_REPLY, ERROR_REPLY
from engram.server.stateful import CURRENT_STATEFUL, stateful_of
from engram.server.tagging import (
    CURRENT_MARK,
    CURRENT_TAG,
    MAX_GENERATION_BODY_BYTES,
    last_mark,
    tag_of_chat,
)
from engram.server.wire import bounded, error_response, parse_json

logger = logging.getLogger(__name__)

OWN_FIELDS: Final = frozenset({"branch_name", "continue_from", "conversation_priority"})
"""Fields of these routes' bodies that are not OpenAI's."""
KINDS: Final = {
    "chat": "Say something new in a conversation; only the new messages travel.",
    "regenerate": "Have the last reply written once more, as another turn.",
    "continue": "Have the last reply written further, as another turn.",
}
"""Route -> what it does."""


class ChatEngine(Protocol):
    """The engine's own chat completions."""

    fields: frozenset[str]
    """What a body may have."""

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        """The reply, whole or streamed, of the request of `CURRENT_TAG` and `CURRENT_STATEFUL`.

        `InvalidRequestError` for what the engine refuses, `UpstreamError` and
        `GenerationAbortedError` for where it fails before its reply begins.
        """
        ...


def chat_router(engine: ChatEngine) -> APIRouter:
    """`POST /v1/conversations/{conversation_id}/chat`, `/regenerate` and `/continue`."""
    router = APIRouter(tags=["chat"])
    for kind, summary in KINDS.items():
        router.add_api_route(
            f"/v1/conversations/{{conversation_id}}/{kind}",
            _route(engine, kind),
            methods=["POST"],
            summary=summary,
            responses={200: CHAT_REPLY, 409: ERROR_REPLY, 422: ERROR_REPLY},
            openapi_extra={"requestBody": _body_of(kind)},
        )
    return router


def _route(engine: ChatEngine, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        try:
            return await _serve(engine, kind, request)
        except EngramError as error:
            return error_response(error)
        except Exception as error:
            logger.exception("Engram: %s failed", request.url.path)
            return error_response(InternalError(f"{type(error).__name__}: {error}"))

    # FastAPI resolves annotations in this module; only the request is a parameter.
    route.__annotations__ = {"request": Request, "return": Response}
    route.__name__ = kind
    return route


async def _serve(engine: ChatEngine, kind: str, request: Request) -> Response:
    conversation_id = check_id("conversation_id", request.path_params["conversation_id"])
    body = await _read(request, kind, engine.fields)
    tag = tag_of_chat(conversation_id, body)
    own = {name: body.pop(name, None) for name in OWN_FIELDS}
    stateful = stateful_of(kind, conversation_id, own["branch_name"], own["continue_from"])
    mark = last_mark(body.get("messages"), body.get("tools"))
    token, asked = CURRENT_TAG.set(tag), CURRENT_STATEFUL.set(stateful)
    marked = CURRENT_MARK.set(mark)
    try:
        return await engine.complete(body, request)
    finally:
        CURRENT_MARK.reset(marked)
        CURRENT_TAG.reset(token)
        CURRENT_STATEFUL.reset(asked)


async def _read(request: Request, kind: str, fields: frozenset[str]) -> dict[str, Any]:
    """The body of a request, its fields known ones."""
    length = request.headers.get("content-length")
    data = await bounded(request.stream(), length, MAX_GENERATION_BODY_BYTES)
    body = parse_json(data) if data or kind == "chat" else {}
    if not isinstance(body, dict):
        raise InvalidRequestError("the body is not a JSON object")
    known = fields | OWN_FIELDS
    if kind != "chat":
        known -= {"messages", "continue_from"}
    # What makes the prompt is recorded, or is in the messages.
    unknown = sorted(body.keys() - (known - {"input_ids"}))
    if unknown:
        name = unknown[0][:80]
        raise InvalidRequestError(f"{name}: no such field here", details={"field": name})
    if kind == "chat" and not body.get("messages"):
        raise InvalidRequestError(
            "messages: at least one is needed",
            hint="to have the last reply written further, POST .../continue",
            details={"field": "messages"},
        )
    return body


def _body_of(kind: str) -> dict[str, Any]:
    example: dict[str, Any] = {"max_tokens": 64, "stream": False}
    if kind == "chat":
        example = {"messages": [{"role": "user", "content": "And tomorrow?"}], **example}
    own = {
        "branch_name": {"type": "string", "description": "the branch, main if not given"},
        "conversation_priority": {"type": "integer", "minimum": 0, "maximum": 100},
    }
    if kind == "chat":
        own["continue_from"] = {
            "type": "object",
            "additionalProperties": False,
            "description": "the turn to go on from, instead of the branch's newest",
            "properties": {
                "conversation_id": {"type": "string"},
                "branch_name": {"type": "string"},
                "turn_number": {"type": "integer", "minimum": 1},
            },
        }
        own["messages"] = {"type": "array", "items": {"type": "object"}, "minItems": 1}
    schema: dict[str, Any] = {
        "type": "object",
        "description": "the fields of /v1/chat/completions, and:",
        "properties": own,
        "required": ["messages"] if kind == "chat" else [],
    }
    content = {"application/json": {"schema": schema, "example": example}}
    return {"required": kind == "chat", "content": content}
