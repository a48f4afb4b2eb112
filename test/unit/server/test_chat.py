"""The routes of stateful chat, and what they and the middleware hand to the engine."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from engram.conversation.turns import Tag
from engram.errors import EngramError, InvalidRequestError, UnsupportedError
from engram.server.chat import chat_router
from engram.server.stateful import CURRENT_STATEFUL, Stateful
from engram.server.tagging import (
    CURRENT_MARK,
    CURRENT_TAG,
    HELD,
    HoldingMiddleware,
    Marked,
    marked_in,
    stateful_in,
)
from engram.service.recorded import Place
from refusals import refusal
from unit.server.test_compatible import client_of
from unit.service.engine import on_a_loop

SAID = [{"role": "user", "content": "hello"}]


class Engine:
    fields = frozenset({"messages", "model", "stream", "temperature", "n", "input_ids", "tools"})

    def __init__(self) -> None:
        self.asked: list[tuple[Tag | None, Stateful | None, dict[str, Any]]] = []
        self.error: Exception | None = None

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        if self.error is not None:
            raise self.error
        self.asked.append((CURRENT_TAG.get(), CURRENT_STATEFUL.get(), body))
        return JSONResponse({"object": "chat.completion"})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def app(engine: Engine) -> FastAPI:
    app = FastAPI()
    app.include_router(chat_router(engine))
    return app


@on_a_loop
async def test_what_a_route_asks_for_reaches_the_engine(engine: Engine, app: FastAPI) -> None:
    url = "/v1/conversations/c"
    source = {"conversation_id": "d", "turn_number": 2, "branch_name": "b"}
    async with client_of(app) as client:
        for path, body in (
            ("chat", {"messages": SAID, "temperature": 0.5}),
            ("chat", {"messages": SAID, "branch_name": "x", "continue_from": source}),
            ("chat", {"messages": SAID, "continue_from": {"turn_number": 1}}),
            ("chat", {"messages": SAID, "conversation_priority": 80}),
            ("regenerate", {"stream": True}),
            ("continue", {"branch_name": "x"}),
        ):
            response = await client.post(f"{url}/{path}", json=body)
            assert response.status_code == 200, response.text
        assert (await client.post(f"{url}/regenerate")).status_code == 200  # no body at all
    asked = Stateful()
    assert engine.asked == [
        (Tag("c"), asked, {"messages": SAID, "temperature": 0.5}),
        (Tag("c"), Stateful("chat", "x", Place("d", "b", 2)), {"messages": SAID}),
        (Tag("c"), Stateful("chat", None, Place("c", None, 1)), {"messages": SAID}),
        (Tag("c", priority=80), asked, {"messages": SAID}),
        (Tag("c"), Stateful("regenerate"), {"stream": True}),
        (Tag("c"), Stateful("continue", "x"), {}),
        (Tag("c"), Stateful("regenerate"), {}),
    ]


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat", {}, "messages"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": SAID, "surprise": 1}, "surprise"),
        ("chat", {"messages": SAID, "input_ids": [1]}, "input_ids"),
        ("chat", {"messages": SAID, "n": 2}, "n"),
        ("chat", {"messages": SAID, "branch_name": ".a"}, "branch_name"),
        ("chat", {"messages": SAID, "conversation_priority": 101}, "conversation_priority"),
        ("chat", {"messages": SAID, "continue_from": "x"}, "continue_from"),
        ("chat", {"messages": SAID, "continue_from": {"turn": 1}}, "continue_from.turn"),
        (
            "chat",
            {"messages": SAID, "continue_from": {"turn_number": 0}},
            "continue_from.turn_number",
        ),
        (
            "chat",
            {"messages": SAID, "continue_from": {"conversation_id": "/"}},
            "continue_from.conversation_id",
        ),
        ("chat", {"messages": IMAGE}, "conversation_id"),
        ("regenerate", {"messages": SAID}, "messages"),
        ("continue", {"continue_from": {}}, "continue_from"),
    ],
)
@on_a_loop
async def test_what_is_malformed_is_refused(
    engine: Engine, app: FastAPI, path: str, body: dict[str, Any], field: str
) -> None:
    async with client_of(app) as client:
        response = await client.post(f"/v1/conversations/c/{path}", json=body)
    assert response.status_code == 422, response.text
    assert refusal(response)["details"]["field"] == field
    assert engine.asked == []


@on_a_loop
async def test_ids_errors_and_bugs(engine: Engine, app: FastAPI) -> None:
    async with client_of(app) as client:
        for name, status in ((".a", 422), ("prefix:guide", 422), ("a" * 256, 422)):
            url = f"/v1/conversations/{name}/chat"
            assert (await client.post(url, json={"messages": SAID})).status_code == status
        for error, status, code in (
            (UnsupportedError("no"), 422, "unsupported"),
            (EngramError("no"), 500, "internal_error"),
            (KeyError("no"), 500, "internal_error"),
        ):
            engine.error = error
            response = await client.post("/v1/conversations/c/chat", json={"messages": SAID})
            assert (response.status_code, refusal(response)["error"]) == (status, code)
        for content in (b"nonsense", b"[]", b'{"messages": [], "messages": []}'):
            response = await client.post("/v1/conversations/c/chat", content=content)
            assert response.status_code == 422


def test_stateful_on_chat_completions() -> None:
    chat = "/v1/chat/completions"
    body = {"messages": SAID, "conversation_id": "c", "stateful": True}
    assert stateful_in(json.dumps(body).encode(), Tag("c"), chat) == Stateful()
    branched = {**body, "branch_name": "b", "continue_from": {"turn_number": 3}}
    found = stateful_in(json.dumps(branched).encode(), Tag("c"), chat)
    assert found == Stateful("chat", "b", Place("c", None, 3))
    for value in (False, None):
        said = json.dumps({**body, "stateful": value}).encode()
        assert stateful_in(said, Tag("c"), chat) is None
    assert stateful_in(json.dumps({"messages": SAID}).encode(), Tag("c"), chat) is None
    with pytest.raises(InvalidRequestError):
        stateful_in(json.dumps({**body, "stateful": "yes"}).encode(), Tag("c"), chat)
    with pytest.raises(InvalidRequestError):
        stateful_in(json.dumps(body).encode(), None, chat)
    with pytest.raises(UnsupportedError):
        stateful_in(json.dumps(body).encode(), Tag("c"), "/v1/completions")


def test_the_last_mark_of_a_chat_counts() -> None:
    mark: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
    hour: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    plain = {"role": "user", "content": "x"}
    part = {"role": "system", "content": [{"type": "text", "text": "x", **mark}]}
    odd: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": ["1h"]}}
    for messages, count, seconds in (
        ([part, plain], 1, 300.0),
        ([{**plain, **odd}], 1, 300.0),
        ([part, {**plain, **hour}, plain], 2, 3600.0),
        ([{**part, **hour}], 1, 300.0),
    ):
        body = json.dumps({"messages": messages, "tools": [1]}).encode()
        found = marked_in(body, "/v1/chat/completions")
        assert found == Marked(messages[:count], [1], seconds)
    assert marked_in(json.dumps({"messages": [part]}).encode(), "/v1/completions") is None
    for messages in ([plain], "x", None, [1, "x"]):
        body = json.dumps({"messages": messages, "cache_control": None}).encode()
        assert marked_in(body, "/v1/chat/completions") is None


@on_a_loop
async def test_a_mark_of_a_stateful_chat_reaches_the_engine(
    engine: Engine, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Marked | None] = []
    complete = engine.complete

    async def looking(body: dict[str, Any], request: Request) -> Response:
        found.append(CURRENT_MARK.get())
        return await complete(body, request)

    monkeypatch.setattr(engine, "complete", looking)
    marked = [{**SAID[0], "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    async with client_of(app) as client:
        for messages in (marked, SAID):
            body = {"messages": messages, "tools": [1]}
            await client.post("/v1/conversations/c/chat", json=body)
        await client.post("/v1/conversations/c/continue", json={})
    assert found == [Marked(marked, [1], 3600.0), None, None]


@on_a_loop
async def test_what_a_request_holds_is_let_go_of_however_it_ends() -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        held = scope[HELD]
        assert isinstance(held, ExitStack)
        held.callback(ended.append, scope["path"])
        if scope["path"] == "/fails":
            raise OSError("the client has gone")

    served = HoldingMiddleware(app)
    await served({"type": "http", "path": "/good"}, None, None)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="gone"):
        await served({"type": "http", "path": "/fails"}, None, None)  # type: ignore[arg-type]
    assert ended == ["/good", "/fails"]
