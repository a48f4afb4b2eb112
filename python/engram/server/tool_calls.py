"""Which replies contain tool calls: ASGI middleware that reads along, for the trigger on_tool_call.

SGLang parses tool calls out of a reply where it writes the reply down, per request and behind all
that a plug-in could hook, so the reply itself is read: what the client is told is what counts.  It
passes as it is; only its end waits while the turn's save is seen to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from engram.server.tagging import CURRENT_TAG, App, Message, Receive, Scope, Send, route_of

ROUTES: Final = frozenset({"/v1/chat/completions", "/v1/responses"})
"""The routes whose replies can have tool calls."""

CONVERSATIONS: Final = "/v1/conversations/"
"""How those begin whose route is the tag."""

DONE: Final = b"[DONE]"
MAX_REPLY_BYTES: Final = 64 << 20
"""A reply, or one event of a stream, that is longer is not read along."""

ToolCalled = Callable[[str], Awaitable[None]]
"""Told of the request whose reply has tool calls, before the client has all of it."""


class ToolCallMiddleware:
    """Tells of tagged requests whose replies contain tool calls."""

    def __init__(self, app: App, tool_called: ToolCalled, *, untagged: bool = False) -> None:
        """With `untagged` (`--snapshot-link-by-prefix`), chats without a tag become turns too."""
        self._app = app
        self._tool_called = tool_called
        self._untagged = untagged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = route_of(scope) if scope["type"] == "http" else ""
        tagged = self._untagged or CURRENT_TAG.get() is not None
        if not (route in ROUTES and tagged) and not route.startswith(CONVERSATIONS):
            await self._app(scope, receive, send)
            return
        reader = ReplyReader()

        async def reading(message: Message) -> None:
            if message["type"] == "http.response.start":
                reader.start(message)
            elif message["type"] == "http.response.body":
                reader.read(message.get("body", b""), more=message.get("more_body", False))
                rid = reader.finished_with_tool_calls()
                if rid is not None:
                    await self._tool_called(rid)
            await send(message)

        await self._app(scope, receive, reading)


class ReplyReader:
    """Reads one reply, whole or as a stream of events."""

    def __init__(self) -> None:
        self._stream = False
        self._whole = True
        self._ended = False
        self._told = False
        self._data = bytearray()
        self._rid: str | None = None
        self._tool_calls = False

    def start(self, message: Message) -> None:
        """The status and the headers."""
        headers = dict(message.get("headers", ()))
        self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._whole = message["status"] == 200

    def read(self, body: bytes, *, more: bool) -> None:
        """The next part of the body."""
        self._ended = self._ended or not more
        if not self._whole:
            return
        self._data += body
        if self._stream:
            *lines, self._data = self._data.split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    self._event(bytes(line[5:]).strip())
        elif not more:
            self._look(bytes(self._data))
        self._whole = len(self._data) <= MAX_REPLY_BYTES

    def finished_with_tool_calls(self) -> str | None:
        """The id of the request when its reply has just ended with tool calls; told once."""
        if not (self._ended and self._tool_calls) or self._told:
            return None
        self._told = True
        return self._rid

    def _event(self, data: bytes) -> None:
        if data == DONE:
            self._ended = True
        else:
            self._look(data)

    def _look(self, data: bytes) -> None:
        try:
            found: Any = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        if not isinstance(found, dict):
            return
        # An event of /v1/responses carries the reply inside; a chunk or a reply is it itself.
        reply = found["response"] if isinstance(found.get("response"), dict) else found
        if isinstance(reply.get("id"), str) and ("choices" in reply or "output" in reply):
            self._rid = reply["id"]
        self._tool_calls = self._tool_calls or _has_tool_calls(reply)


def _has_tool_calls(reply: dict[str, Any]) -> bool:
    for choice in _dicts(reply.get("choices")):
        for name in ("message", "delta"):
            part = choice.get(name)
            if isinstance(part, dict) and part.get("tool_calls"):
                return True
    return any(item.get("type") == "function_call" for item in _dicts(reply.get("output")))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
