"""What a request holds is let go of when its client has the reply, or has gone."""

from __future__ import annotations

import pytest

from engram.server.tagging import HELD, HoldingMiddleware, Message, Receive, Scope, Send
from unit.service.engine import on_a_loop

END = {"type": "http.response.body", "body": b"", "more_body": False}


async def nothing() -> Message:
    raise AssertionError("nobody receives")


@on_a_loop
async def test_it_is_let_go_of_before_the_reply_ends_and_not_after_what_follows_it() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope[HELD].callback(seen.append, "let go")
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send(END)
        seen.append("background work")

    async def send(message: Message) -> None:
        seen.append("part" if message["more_body"] else "end")

    await HoldingMiddleware(app)({"type": "http"}, nothing, send)
    assert seen == ["part", "let go", "end", "background work"]


@on_a_loop
async def test_it_is_let_go_of_when_there_is_no_reply() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope[HELD].callback(seen.append, "let go")
        raise ConnectionError("gone")

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    with pytest.raises(ConnectionError):
        await HoldingMiddleware(app)({"type": "http"}, nothing, send)
    assert seen == ["let go"]
