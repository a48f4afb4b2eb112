"""Which conversation a generation request belongs to: ASGI middleware in front of SGLang's routes.

The id is the body's field `conversation_id` or the header `x-override-conversation-id`; the body
wins.  SGLang has a switch that maps this header to a request field, but it opens other overrides to
clients as well, so the header is read here.  The body is passed on as it came.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.errors import EngramError, InvalidRequestError, UnsupportedError
from engram.server.stateful import CURRENT_STATEFUL, Stateful, stateful_of
from engram.server.wire import bounded, error_response
from engram.service.finder import check_not_reserved
from engram.snapshot.conversation import MAX_PRIORITY

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATION_ROUTES: Final = frozenset(
    {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"}
)
HEADER: Final = b"x-override-conversation-id"
FIELD: Final = b'"conversation_id"'
MARK: Final = b'"cache_control"'
MARK_SECONDS: Final[dict[str, float]] = {"5m": 300.0, "1h": 3600.0}
STATEFUL: Final = b'"stateful"'
CHAT: Final = "/v1/chat/completions"
TEXT_PARTS: Final = ("text", "input_text", "output_text", "refusal")
"""Types of the parts of a message that are text, in chat completions and in responses."""

MAX_GENERATION_BODY_BYTES: Final = 64 << 20
"""Of the routes that generate: room for a context of millions of tokens, or for inline images."""

HELD: Final = "engram.held"
"""Where in a request's scope its `ExitStack` is."""

CURRENT_TAG: ContextVar[Tag | None] = ContextVar("CURRENT_TAG", default=None)
"""The tag of the request that is being served in this task."""

OWN_TAG: ContextVar[Tag | None] = ContextVar("OWN_TAG", default=None)
"""The tag of a request that the server itself makes in this task, in place of what its body says:
no client can say which branch a request is of that brings its own tokens."""


class _Fields(msgspec.Struct):
    """What tagging needs of a body; the rest is skipped while decoding."""

    conversation_id: Any = None
    conversation_priority: Any = None
    n: Any = None
    sampling_params: Any = None
    text: Any = None
    input_ids: Any = None
    prompt: Any = None
    messages: Any = None
    input: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    session_params: Any = None
    stateful: Any = None
    branch_name: Any = None
    continue_from: Any = None
    tools: Any = None


def route_of(scope: Scope) -> str:
    """The path of a request as SGLang's routes see it.

    Behind a proxy the server may have a root path (`--fastapi-root-path`), which stands before the
    path whether or not the proxy has taken it off.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(root.rstrip("/") + "/") else path


@dataclass(frozen=True, slots=True)
class Marked:
    """What a chat marks with `cache_control`: its messages up to there, for so many seconds."""

    messages: list[dict[str, Any]]
    tools: Any
    seconds: float


CURRENT_MARK: ContextVar[Marked | None] = ContextVar("CURRENT_MARK", default=None)
"""What the request that is served in this task has marked."""


def marked_in(body: bytes, route: str) -> Marked | None:
    """The last mark of a chat's messages; None without one."""
    fields = _decode(body) if route == CHAT and MARK in body else None
    return None if fields is None else last_mark(fields.messages, fields.tools)


def last_mark(messages: Any, tools: Any) -> Marked | None:
    """The last mark of messages as they came; None without one."""
    if not isinstance(messages, list):
        return None
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        marks = [message.get("cache_control")]
        marks += [part.get("cache_control") for part in parts if isinstance(part, dict)]
        for mark in reversed(marks):
            if isinstance(mark, dict):
                ttl = mark.get("ttl")
                seconds = MARK_SECONDS.get(ttl if isinstance(ttl, str) else "", MARK_SECONDS["5m"])
                return Marked(messages[: index + 1], tools, seconds)
    return None


class TaggingMiddleware:
    """Sets `CURRENT_TAG` for the tagged requests to the generation routes."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_of(scope) not in GENERATION_ROUTES:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            body, replay = await _read(receive, headers.get(b"content-length"))
            tag = tag_of(body, headers.get(HEADER))
            if tag is not None:
                tag = OWN_TAG.get() or tag
            stateful = stateful_in(body, tag, route_of(scope))
            mark = marked_in(body, route_of(scope))
        except EngramError as error:
            await error_response(error)(scope, receive, send)
            return
        token, asked = CURRENT_TAG.set(tag), CURRENT_STATEFUL.set(stateful)
        marked = CURRENT_MARK.set(mark)
        try:
            await self._app(scope, replay, send)
        finally:
            CURRENT_MARK.reset(marked)
            CURRENT_TAG.reset(token)
            CURRENT_STATEFUL.reset(asked)


class HoldingMiddleware:
    """Gives every request a stack of what is to be let go of when its reply has ended, or when it
    is over in another way.

    The reply's end comes first: behind a stream SGLang waits for two seconds before the request is
    over, and its client may have sent the next message by then.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            scope[HELD] = held

            async def releasing(message: Message) -> None:
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    held.close()
                await send(message)

            await self._app(scope, receive, releasing)


def stateful_in(body: bytes, tag: Tag | None, route: str) -> Stateful | None:
    """What a request says with `"stateful": true`; None if it does not say it."""
    fields = _decode(body) if STATEFUL in body else None
    if fields is None or fields.stateful in (None, False):
        return None
    if fields.stateful is not True:
        raise InvalidRequestError("stateful must be true or false", details={"field": "stateful"})
    if route != CHAT:
        raise UnsupportedError(
            f"stateful is for {CHAT} and for /v1/conversations/{{conversation_id}}/chat",
            details={"field": "stateful"},
        )
    if tag is None:
        raise InvalidRequestError(
            "stateful needs a conversation_id", details={"field": "conversation_id"}
        )
    return stateful_of("chat", tag.conversation_id, fields.branch_name, fields.continue_from)


def tag_of(body: bytes, header: bytes | None) -> Tag | None:
    """The tag of a request, None if it has none.  Raises for what a conversation cannot hold."""
    if header is None and FIELD not in body:
        return None
    fields = _decode(body)
    if fields is None:
        return None
    given = fields.conversation_id
    if given is None:
        given = header.decode("latin-1") if header is not None else None
    return None if given is None else _tag(given, fields)


def tag_of_chat(conversation_id: str, body: Mapping[str, Any]) -> Tag:
    """The tag of a chat whose conversation its route names; the same rules hold."""
    return _tag(conversation_id, msgspec.convert(dict(body), type=_Fields))


def _tag(given: Any, fields: _Fields) -> Tag:
    name = check_id("conversation_id", given)
    check_not_reserved("conversation_id", name)
    tag = Tag(
        name,
        tenant=DEFAULT_TENANT,
        priority=_priority(fields.conversation_priority),
    )
    _check_single(fields)
    _check_text_only(fields)
    return tag


def _priority(given: Any) -> int | None:
    if given is None or (type(given) is int and 0 <= given <= MAX_PRIORITY):
        return given
    raise InvalidRequestError(
        f"conversation_priority must be an integer from 0 to {MAX_PRIORITY}",
        details={"field": "conversation_priority"},
    )


def _decode(body: bytes) -> _Fields | None:
    """The fields of a body; None for one that SGLang's routes refuse, in their own words."""
    try:
        return msgspec.json.decode(body, type=_Fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # Python's reader, which SGLang uses, takes more for JSON: NaN, and half surrogate pairs.
        return msgspec.convert(json.loads(body), type=_Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _check_single(fields: _Fields) -> None:
    """A turn has one prompt and one reply, and all of the prompt is in the request."""
    if fields.session_params:
        raise UnsupportedError(
            "a request with a conversation_id cannot be part of an SGLang session: the session "
            "holds the rest of its prompt",
            hint="leave session_params out and send the whole history",
            details={"field": "session_params"},
        )
    given = fields.sampling_params
    params = given if isinstance(given, list) else [given]
    numbers = [one.get("n") for one in params if isinstance(one, dict)]
    for value in (fields.n, *numbers):
        if value not in (None, 1):
            raise UnsupportedError(
                "n must be 1 in a request with a conversation_id: a turn has one reply",
                details={"field": "n"},
            )
    if any(isinstance(one, dict) and one.get("beam_width") not in (None, 1) for one in params):
        raise UnsupportedError(
            "beam_width must be 1 in a request with a conversation_id: beams share no one state",
            details={"field": "sampling_params.beam_width"},
        )
    batches = (fields.text, fields.input_ids, fields.prompt, params)
    if any(isinstance(b, list) and len(b) > 1 and not isinstance(b[0], int) for b in batches):
        raise UnsupportedError(
            "a request with a conversation_id must have one prompt",
            hint="send one request a conversation",
            details={"field": "prompt"},
        )


def _check_text_only(fields: _Fields) -> None:
    media = any((fields.image_data, fields.video_data, fields.audio_data))
    if media or not (is_text(fields.messages) and is_text(fields.input)):
        raise UnsupportedError(
            "image, audio and video inputs cannot be part of a saved conversation yet",
            hint="leave conversation_id out for this request",
            details={"field": "conversation_id"},
        )


def is_text(messages: Any) -> bool:
    """Whether all parts of messages, as they came, are text."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else ()
        if any(part.get("type") not in TEXT_PARTS for part in parts if isinstance(part, dict)):
            return False
    return True


async def _read(receive: Receive, announced: bytes | None) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that delivers it again."""
    left: list[Message] = []

    async def parts() -> AsyncIterator[bytes]:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                left.append(message)
                return
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    length = None if announced is None else announced.decode("latin-1")
    body = await bounded(parts(), length, MAX_GENERATION_BODY_BYTES)
    first = left or [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return body, replay
