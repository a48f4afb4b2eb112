"""Agents mounted on an application with SGLang's own middleware for keys, over real connections."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import pytest
import uvicorn
import websockets
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from sglang.srt.utils.auth import add_api_key_middleware

from engram.conversation.turns import Tag
from engram.errors import (
    ConversationBusyError,
    GenerationAbortedError,
    InvalidRequestError,
    UnsupportedError,
)
from engram.server.tagging import CURRENT_TAG, OWN_TAG, TaggingMiddleware
from engram.sglang_plugin.agents import SglangChat, mount_agents
from engram.testing.tiny_tokenizer import build_tokenizer
from refusals import refusal
from unit.agents.scripted import server_in

KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Manager:
    """What is asked of SGLang's tokenizer manager."""

    tokenizer: Any = field(default_factory=lambda: build_tokenizer(4096))
    aborted: list[str] = field(default_factory=list)
    gracefully_exit: bool = False
    served_model_name: str = "tiny"
    ended: bool = False
    sent: list[Any] = field(default_factory=list)
    handled: list[Any] = field(default_factory=list)

    async def sigterm_watchdog(self) -> None:
        self.ended = True

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    async def _send_one_request(self, tokenized: Any) -> None:
        self.sent.append(tokenized)

    async def _handle_batch_output(self, received: Any) -> None:
        self.handled.append(received)


def args(**more: Any) -> Any:
    given = {"api_key": KEY, "admin_api_key": None, "tool_call_parser": "qwen25"}
    return SimpleNamespace(**{**given, **more})


def chat_app(manager: Manager) -> FastAPI:
    """A chat completions route that answers as SGLang does, or as the last message says."""
    app = FastAPI()
    app.state.openai_serving_chat = SimpleNamespace(chat_encoding_spec=None)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        body = await request.json()
        said = body["messages"][-1]["content"]
        if said == "bad":
            return JSONResponse({"object": "error", "message": "too bad"}, status_code=400)
        if said == "broken":
            return JSONResponse({"error": {"message": "broken"}}, status_code=500)
        if said == "wait":
            await asyncio.sleep(600)
        if said == "busy":
            told = ConversationBusyError("later", hint="wait", details={"branch_name": "b"})
            return JSONResponse(told.to_dict() | {"success": False}, status_code=409)
        await manager._send_one_request(SimpleNamespace(rid=body["rid"], stream=False))
        for part in ("one ", "", "two"):
            texts = ["not mine", part]
            batch = SimpleNamespace(rids=["other", body["rid"]], output_strs=texts)
            await manager._handle_batch_output(batch)
        await manager._handle_batch_output(SimpleNamespace(rids=[body["rid"]]))
        message = {"role": "assistant", "content": body["model"], "reasoning_content": None}
        return JSONResponse(
            {
                "id": body["rid"],
                "choices": [{"message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens_details": {"cached_tokens": 5}},
                "sglext": {"input_ids": body.get("input_ids", [1]), "output_ids": [[2, 3]]},
            }
        )

    return app


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("agents")
    manager = Manager()
    app = chat_app(manager)
    server = server_in(folder, snapshot_dir=str(folder))
    mount_agents(
        app,
        server.settings,
        server.service,
        manager,
        SimpleNamespace(chat_template_name=None),
        args(),
    )
    add_api_key_middleware(app, api_key=KEY, admin_api_key=None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{port}"
    web.should_exit = True
    thread.join()
    server.stop()


def test_every_way_in_asks_for_the_key(url: str) -> None:
    for path in ("/v1/agent/health", "/v1/agent/tools", "/v1/agent/runs/x/stream", "/mcp"):
        assert httpx.get(url + path).status_code == 401, path
    assert httpx.post(url + "/mcp", json={}).status_code == 401
    assert httpx.get(url + "/v1/agent/health", headers=HEADERS).json()["status"] == "ok"
    foreign = {**HEADERS, "Origin": "http://evil.example"}
    answer = httpx.post(url + "/mcp", json={}, headers=foreign)
    assert (answer.status_code, refusal(answer)["error"]) == (403, "foreign_origin")

    async def knock(headers: dict[str, str]) -> int | None:
        try:
            async with websockets.connect(ws(url), additional_headers=headers) as client:
                assert '"connected"' in str(await client.recv())
                return None
        except websockets.InvalidStatus as refused:
            return refused.response.status_code

    for headers in ({}, {"Authorization": "Bearer wrong"}, foreign):
        assert asyncio.run(knock(headers)) == 403
    assert asyncio.run(knock(HEADERS)) is None


def ws(url: str) -> str:
    return url.replace("http", "ws") + "/v1/agent/ws"


def over_http(url: str) -> Any:
    client = httpx2.AsyncClient(headers=HEADERS, timeout=120)
    return streamable_http_client(url + "/mcp", http_client=client)


def over_stdio(url: str) -> Any:
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "engram.cli.main", "mcp", "--url", url],
        env={**os.environ, "ENGRAM_API_KEY": KEY},
    )


@pytest.mark.parametrize("way", [over_http, over_stdio])
def test_the_official_mcp_client(url: str, way: Any) -> None:
    async def work() -> None:
        async with Client(way(url)) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert {"calculator", "memory_search"} <= names
            result = await client.call_tool("calculator", {"expression": "6 * 7"})
            assert result.structured_content == {"result": 42}
            await client.call_tool("memory_store", {"key": way.__name__, "value": "station"})
            found = await client.call_tool("memory_recall", {"key": way.__name__})
            assert found.structured_content["value"] == "station"
            failed = await client.call_tool("memory_recall", {"key": "unknown"})
            assert failed.is_error
            resources = (await client.list_resources()).resources
            assert [str(one.uri) for one in resources] == ["engram://conversations"]

    asyncio.run(work())


def test_a_bridge_to_nowhere_says_so(url: str) -> None:
    for there, more in (("http://127.0.0.1:9", []), (url + "/v1", []), (url, ["--api-key", "x"])):
        command = [sys.executable, "-m", "engram.cli.main", "mcp", "--url", there, *more]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert result.returncode == 2
        assert f"engram: error: {there}" in result.stderr
        assert "--enable-agent-tools" in result.stderr
        assert result.stdout == ""


def test_a_run_over_the_application(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "checkpoint": False}
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as client:
        run = client.post("/v1/agent/runs", json=body).json()
        stream = client.get(f"/v1/agent/runs/{run['run_id']}/stream").text
        assert "event: run_finished" in stream
        done = client.get(f"/v1/agent/runs/{run['run_id']}").json()
        assert (done["status"], done["result"]["content"]) == ("completed", "tiny")


def test_runs_are_interrupted_before_the_server_ends(tmp_path: Path) -> None:
    """Else their next replies would be requests that the end has to wait for."""
    manager = Manager()
    app = chat_app(manager)
    server = server_in(tmp_path, snapshot_dir=str(tmp_path))
    templates = SimpleNamespace(chat_template_name=None)
    mount_agents(app, server.settings, server.service, manager, templates, args(api_key=None))

    async def work() -> None:
        transport = httpx.ASGITransport(app)
        client = httpx.AsyncClient(transport=transport, base_url="http://engram")
        async with app.router.lifespan_context(app), client:
            body = {"messages": [{"role": "user", "content": "wait"}]}
            run = (await client.post("/v1/agent/runs", json=body)).json()
            ending = asyncio.create_task(manager.sigterm_watchdog())
            await asyncio.sleep(0)
            assert not manager.ended
            manager.gracefully_exit = True
            await ending
            assert manager.ended
            path = f"/v1/agent/runs/{run['run_id']}"
            assert (await client.get(path)).json()["status"] == "interrupted"
            refused = await client.post("/v1/agent/runs", json=body)
            assert (refused.status_code, refusal(refused)["error"]) == (503, "agents_busy")

    asyncio.run(work())
    server.stop()


# ---- the engine ----


def engine(manager: Manager, **more: Any) -> SglangChat:
    app = chat_app(manager)
    templates = SimpleNamespace(chat_template_name=more.pop("template", None))
    return SglangChat(app, manager, templates, args(**more))


def ask(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "input_ids": [7, 8]}


def test_replies_and_refusals_of_the_route() -> None:
    chat = engine(Manager())
    reply = asyncio.run(chat.complete(ask("hello")))
    assert reply.message == {"role": "assistant", "content": "tiny"}
    assert (reply.prompt_ids, reply.output_ids, reply.cached_tokens) == ([7, 8], [2, 3], 5)
    with pytest.raises(InvalidRequestError, match="too bad"):
        asyncio.run(engine(Manager()).complete(ask("bad")))
    with pytest.raises(GenerationAbortedError, match="broken"):
        asyncio.run(engine(Manager()).complete(ask("broken")))
    with pytest.raises(ConversationBusyError, match="later") as busy:
        asyncio.run(engine(Manager()).complete(ask("busy")))
    assert (busy.value.hint, busy.value.details) == ("wait", {"branch_name": "b"})
    with pytest.raises(InvalidRequestError, match="JSON"):
        asyncio.run(engine(Manager()).complete(ask("x") | {"temperature": float("nan")}))


def test_a_reply_is_told_while_it_is_written() -> None:
    manager = Manager()
    chat = engine(manager)
    heard: list[str] = []
    asyncio.run(chat.complete(ask("hello"), None, heard.append))
    assert heard == ["one ", "two"]
    assert len(manager.handled) == 4

    def broken(text: str) -> None:
        heard.append(text)
        raise RuntimeError("no bread")

    # What goes wrong there costs what is seen, not the reply.
    asyncio.run(chat.complete(ask("hello"), None, broken))
    assert heard == ["one ", "two", "one "]
    asyncio.run(chat.complete(ask("hello")))
    assert [one.stream for one in manager.sent] == [True, True, False]
    assert chat._watched == {}


def test_the_turn_of_a_reply_is_not_the_bodys_to_say() -> None:
    seen: list[Tag | None] = []
    manager = Manager()
    app = chat_app(manager)

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        seen.append(CURRENT_TAG.get())
        await app(scope, receive, send)

    chat = SglangChat(TaggingMiddleware(watched), manager, SimpleNamespace(), args())
    turn = Tag("c", "b", after_turn=4)
    body = {**ask("hello"), "conversation_id": "c", "branch_name": "other"}
    asyncio.run(chat.complete(body, turn))
    asyncio.run(chat.complete(body))
    asyncio.run(chat.complete(ask("hello"), turn))
    assert seen == [turn, Tag("c"), None]
    assert OWN_TAG.get() is None


def test_a_reply_nobody_waits_for_is_aborted() -> None:
    manager = Manager()

    async def work() -> None:
        task = asyncio.create_task(engine(manager).complete(ask("wait")))
        while not manager.aborted:
            await asyncio.sleep(0.05)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert len(manager.aborted[0]) == 32


def test_templates(tmp_path: Path) -> None:
    chat = engine(Manager())
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert chat.render(messages[:1], (), more=True) == "<|user|>hi<|assistant|>"
    assert chat.render(messages, (), more=False) == "<|user|>hi<|assistant|>ho<|endoftext|>"
    tokens = chat.encode("<|tool|>4")
    assert chat.decode(tokens) == "<|tool|>4"
    with pytest.raises(UnsupportedError, match="unknown role"):
        chat.render([{"role": "stranger", "content": ""}], (), more=True)
    with pytest.raises(UnsupportedError):
        engine(Manager(), template="own").render(messages, (), more=True)
    assert chat.parses_tool_calls
    assert not engine(Manager(), tool_call_parser=None).parses_tool_calls
