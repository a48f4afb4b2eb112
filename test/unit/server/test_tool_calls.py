"""Replies with tool calls are seen, whole or streamed, and pass as they came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engram.conversation.turns import Tag
from engram.server import tool_calls
from engram.server.tagging import CURRENT_TAG
from engram.server.tool_calls import ToolCallMiddleware
from engram.testing.samples import seeded_random
from unit.service.engine import Server, on_a_loop

CALL = {"id": "call-1", "function": {"name": "f", "arguments": "{}"}}
CHAT = "/v1/chat/completions"


def reply(**message: Any) -> bytes:
    body = {"id": "rid-1", "choices": [{"index": 0, "message": message}], "usage": {}}
    return json.dumps(body).encode()


def events(*deltas: dict[str, Any], end: bytes = b"data: [DONE]\n\n") -> bytes:
    chunks = [{"id": "rid-1", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    usage = {"id": "rid-1", "choices": [], "usage": {"total_tokens": 3}}
    lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in [*chunks, usage]]
    return b"".join(lines) + end


class App:
    """Answers with these parts of a body."""

    def __init__(self, parts: Sequence[bytes], kind: str, status: int = 200) -> None:
        self.parts, self.kind, self.status = parts, kind, status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", self.kind.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def seen(app: App, path: str = CHAT, tag: Tag | None = Tag("a")) -> tuple[list[str], int]:  # noqa: B008
    """Whom the middleware told of, and how many bytes the client had by then."""
    told: list[str] = []
    sent = bytearray()
    before = -1

    async def tool_called(rid: str) -> None:
        nonlocal before
        told.append(rid)
        before = len(sent)

    async def send(message: Any) -> None:
        sent.extend(message.get("body", b""))

    token = CURRENT_TAG.set(tag)
    try:
        scope = {"type": "http", "path": path}
        await ToolCallMiddleware(app, tool_called)(scope, None, send)  # type: ignore[arg-type]
    finally:
        CURRENT_TAG.reset(token)
    assert bytes(sent) == b"".join(app.parts)
    return told, before


@on_a_loop
async def test_a_whole_reply() -> None:
    plain = App([reply(content="text", tool_calls=None)], "application/json")
    assert (await seen(plain))[0] == []
    body = reply(content=None, tool_calls=[CALL])
    with_calls = App([body[:9], body[9:]], "application/json")
    assert await seen(with_calls) == (["rid-1"], len(body))
    assert (await seen(with_calls, tag=None))[0] == []
    assert (await seen(with_calls, "/generate"))[0] == []
    assert (await seen(App([body], "application/json", status=500)))[0] == []


@on_a_loop
async def test_a_stream_cut_anywhere() -> None:
    rng = seeded_random()
    start = {"role": "assistant", "content": ""}
    plain = events(start, {"content": "data: tool_calls"})
    body = events(start, {"content": "a"}, {"tool_calls": [CALL]}, {"content": None})
    for _ in range(50):
        cuts = sorted(rng.randrange(len(body)) for _ in range(rng.randrange(6)))
        places = zip([0, *cuts], [*cuts, len(body)], strict=True)
        parts = [body[a:b] for a, b in places]
        told, before = await seen(App(parts, "text/event-stream; charset=utf-8"))
        assert told == ["rid-1"]
        # The client did not have the end yet.
        assert before < len(body)
    assert (await seen(App([plain], "text/event-stream")))[0] == []
    unended = events({"tool_calls": [CALL]}, end=b"")
    assert (await seen(App([unended], "text/event-stream")))[0] == ["rid-1"]


@on_a_loop
async def test_responses() -> None:
    path = "/v1/responses"
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    text = {"type": "message", "content": []}
    for output, expected in (([text], []), ([text, call], ["resp_1"])):
        whole = {"id": "resp_1", "output": output, "object": "response"}
        body = json.dumps(whole).encode()
        assert (await seen(App([body], "application/json"), path))[0] == expected
        stream = [
            {"type": "response.created", "response": {"id": "resp_1", "output": []}},
            {"type": "response.output_item.done", "item": call},
            {"type": "response.completed", "response": whole},
        ]
        lines = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in stream]
        assert (await seen(App(lines, "text/event-stream"), path))[0] == expected


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[1]", b"{", b'{"id": 5}', b'{"choices": 7, "output": {}}', b"\xff" * 9],
    ids=str,
)
@on_a_loop
async def test_anything_else_passes(body: bytes) -> None:
    for kind in ("application/json", "text/event-stream"):
        assert (await seen(App([b"data: " + body + b"\n\n", body], kind)))[0] == []


@on_a_loop
async def test_what_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "MAX_REPLY_BYTES", 100)
    body = reply(content="x" * 200, tool_calls=[CALL])
    assert (await seen(App([body[:150], body[150:]], "application/json")))[0] == []


@on_a_loop
async def test_the_turn_is_saved_and_only_that(tmp_path: Path) -> None:
    server = Server.start(
        tmp_path / "store",
        seeded_random(),
        snapshot_trigger_policy="on_tool_call",
        snapshot_durability="sync",
    )
    try:
        gate = server.service.gate
        rid, tokens = await server.serve([1, 2, 3], Tag("a"))
        await server.service.context.drain()
        assert server.catalog.all_snapshots() == []
        rid, tokens = await server.serve([*tokens, 4], Tag("a"))
        await gate.tool_called(rid)
        assert [row.turn_number for row in server.catalog.all_snapshots()] == [2]
        await gate.tool_called("unknown")
        _, tokens = await server.serve([*tokens, 4], Tag("a"))
        await server.service.close()
        assert [row.turn_number for row in server.catalog.all_snapshots()] == [2]
    finally:
        server.stop()
