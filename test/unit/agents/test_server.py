"""The routes, the WebSocket and the MCP server over real tools, memory and snapshots."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from mcp import Client
from mcp.shared.exceptions import MCPError
from starlette.requests import Request

from engram.agents.execution import MAX_RESULT_BYTES
from engram.agents.host import AgentHost, owner_of
from engram.agents.mcp_bridge import bridge
from engram.agents.mcp_server import CONVERSATION_META, mcp_server
from engram.server import agent_socket
from engram.server.agent import agent_router
from engram.server.agent_socket import MAX_CALLS, AgentSocket
from engram.server.origins import is_foreign
from refusals import refusal
from unit.agents.scripted import ScriptedChat, calling, host_of, server_in
from unit.service.engine import Server

T = TypeVar("T")
BUILT_IN = {
    *("memory_store", "memory_recall", "memory_search"),
    *("checkpoint_save", "checkpoint_list", "checkpoint_restore"),
    *("conversation_branch", "conversation_compare", "calculator"),
    *("conversation_explore", "conversation_keep"),
}


def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
    return calling(("calculator", {"expression": "6 * 7"})) if number == 0 else "done"


def using(
    folder: Path,
    work: Callable[[Server, AgentHost, ScriptedChat], Awaitable[T]],
    **options: Any,
) -> T:
    keyed = options.pop("keyed", False)

    async def run() -> T:
        server = server_in(folder, **options)
        host, chat = host_of(server, script, folder / "agents.sqlite", keyed=keyed)
        await host.start()
        try:
            return await work(server, host, chat)
        finally:
            await host.close()
            server.stop()

    return asyncio.run(run())


@asynccontextmanager
async def client_of(host: AgentHost, key: str | None = None) -> Any:
    app = FastAPI()
    app.include_router(agent_router(host))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://engram", headers=headers
    ) as client:
        yield client


async def ok(response: Awaitable[httpx.Response]) -> dict[str, Any]:
    found = await response
    body: dict[str, Any] = found.json()
    assert found.status_code == 200, body
    assert body["success"] is True
    return body


async def refused(response: Awaitable[httpx.Response], status: int, code: str) -> dict[str, Any]:
    found = await response
    body = refusal(found)
    assert (found.status_code, body["error"]) == (status, code), body
    return body


def test_tools_over_rest(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host) as client:
            tools = (await ok(client.get("/v1/agent/tools")))["tools"]
            assert {tool["name"] for tool in tools} > BUILT_IN
            tagged = (await ok(client.get("/v1/agent/tools?tag=math")))["tools"]
            assert [tool["name"] for tool in tagged] == ["calculator"]
            tool = (await ok(client.get("/v1/agent/tools/total")))["tool"]
            assert tool["parameters"]["required"] == ["orders", "price"]
            run = "/v1/agent/tools/execute"
            body = {"tool": "calculator", "arguments": {"expression": "6 * 7"}}
            assert (await ok(client.post(run, json=body)))["result"] == 42
            body = {"tool": "steps", "arguments": {}, "conversation_id": "c"}
            answer = await ok(client.post(run, json=body))
            assert answer["result"] == {"conversation": "c", "call": answer["call_id"]}
            await refused(client.get("/v1/agent/tools/none"), 404, "not_found")
            await refused(client.post(run, json={"tool": "none"}), 404, "not_found")
            await refused(client.post(run, json={"tool": "calculator"}), 422, "invalid_request")
            await refused(client.post(run, json={"tol": "x"}), 422, "invalid_request")
            body = {"tool": "fail", "arguments": {"message": "no"}}
            await refused(client.post(run, json=body), 502, "tool_failed")
            body = {"tool": "large", "arguments": {"size": MAX_RESULT_BYTES}}
            await refused(client.post(run, json=body), 502, "tool_result_too_large")
            body = {"tool": "hang", "arguments": {}}
            await refused(client.post(run, json=body), 504, "tool_timeout")
            health = await ok(client.get("/v1/agent/health"))
            assert health["tools"] == len(tools)
            stats = await ok(client.get("/v1/agent/stats"))
            assert stats["tools"] == {"calls": 6, "failures": 4, "running": 0}

    using(tmp_path, work, agent_tools_module="hostile_tools")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        (tool, {"prompts": ["a", "b"]} if tool == "conversation_explore" else {})
        for tool in (
            *("checkpoint_save", "checkpoint_restore", "conversation_branch"),
            *("conversation_compare", "conversation_explore"),
        )
    ],
)
def test_places_that_cannot_be_are_the_callers_mistake(
    tmp_path: Path, tool: str, arguments: dict[str, Any]
) -> None:
    """Not a failure of the tool, which may be tried again."""

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        wrongs: list[dict[str, Any]] = [{"conversation_id": "../c"}, {"branch_name": "a b"}]
        wrongs.append({"snapshot_id": "../x"} if tool == "checkpoint_save" else {})
        wrongs[2] = wrongs[2] or {"turn_number": 2**63}
        async with client_of(host) as client:
            for wrong in wrongs:
                place = {"conversation_id": "c", "branch_name": "main", **arguments, **wrong}
                body = {"tool": tool, "arguments": place}
                told = await refused(
                    client.post("/v1/agent/tools/execute", json=body), 422, "invalid_request"
                )
                assert told["details"]["field"] == next(iter(wrong))

    using(tmp_path, work)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_runs_that_cannot_be_written_down_do_not_begin(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        async with client_of(host) as client:
            messages = [{"role": "user", "content": "x"}]
            deep = [{"role": "user", "content": nested(300)}]
            for wrong in (
                {"temperature": "inf"},
                {"messages": deep},
                {"response_format": {"schema": nested(300)}},
            ):
                task = {"messages": messages, "tools": [], **wrong}
                await refused(client.post("/v1/agent/runs", json=task), 422, "invalid_request")
                body = {"conversation_id": "c", "branches": [task, task]}
                await refused(
                    client.post("/v1/agent/explorations", json=body), 422, "invalid_request"
                )
            assert (await ok(client.get("/v1/agent/runs")))["runs"] == []
            task = {"messages": [{"role": "user", "content": nested(98)}], "tools": []}
            await ok(client.post("/v1/agent/runs", json=task))

    using(tmp_path, work)


def test_memory_over_rest_keeps_owners_apart(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host, "one") as one, client_of(host, "two") as two:
            where = {"key": "k", "conversation_id": "c"}
            body = {**where, "value": "an old station", "category": "place"}
            stored = (await ok(one.post("/v1/agent/memory/store", json=body)))["memory"]
            found = (await ok(one.post("/v1/agent/memory/recall", json=where)))["memory"]
            assert found == stored
            search = {"query": "station", "conversation_id": "c"}
            assert (
                len((await ok(one.post("/v1/agent/memory/search", json=search)))["memories"]) == 1
            )
            assert (await ok(two.post("/v1/agent/memory/search", json=search)))["memories"] == []
            await refused(two.post("/v1/agent/memory/recall", json=where), 404, "not_found")
            await refused(two.post("/v1/agent/memory/delete", json=where), 404, "not_found")
            assert (await ok(two.get("/v1/agent/stats")))["memories"] == 0
            run = {"tool": "memory_recall", "arguments": {"key": "k"}, "conversation_id": "c"}
            await refused(two.post("/v1/agent/tools/execute", json=run), 404, "not_found")
            assert (await ok(one.post("/v1/agent/tools/execute", json=run)))["result"] == found
            created = await ok(
                one.post("/v1/agent/runs", json={"messages": [{"role": "user", "content": "x"}]})
            )
            path = f"/v1/agent/runs/{created['run_id']}"
            await refused(two.get(path), 404, "not_found")
            await refused(two.get(path + "/stream"), 404, "not_found")
            await refused(two.post(path + "/cancel"), 404, "not_found")
            assert (await ok(two.get("/v1/agent/runs")))["runs"] == []
            await ok(one.post("/v1/agent/memory/delete", json=where))
            await refused(one.post("/v1/agent/memory/recall", json=where), 404, "not_found")

    using(tmp_path, work, keyed=True)


def test_keys_are_not_kept_and_owners_differ(tmp_path: Path) -> None:
    assert owner_of("Bearer one", keyed=False) == owner_of(None, keyed=False) == ""
    one, two = (owner_of(f"Bearer {key}", keyed=True) for key in ("one", "two"))
    assert one != two
    assert "one" not in one
    assert one == owner_of("bearer one", keyed=True)


def test_a_query_is_not_passed_over(tmp_path: Path) -> None:
    """`limits=3` would be answered with everything."""

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host) as client:
            body = {"messages": [{"role": "user", "content": "x"}]}
            run = (await ok(client.post("/v1/agent/runs", json=body)))["run_id"]
            for path in (
                *("health", "stats", "tools", "tools/calculator", "conversations", "tiers"),
                *("conversations/c", "runs", f"runs/{run}", f"runs/{run}/stream"),
                "explorations/x",
            ):
                asking = client.get(f"/v1/agent/{path}?limits=3")
                told = await refused(asking, 422, "invalid_request")
                assert told["details"] == {"field": "limits"}
            for path in ("conversations?limit=3&after=a", "runs?limit=3", "tools?tag=math"):
                await ok(client.get(f"/v1/agent/{path}"))

    using(tmp_path, work)


def test_conversations_over_rest(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        first = await server.chat("c", turns=2)
        async with client_of(host) as client:
            base = "/v1/agent/conversations"
            for turn in (1, 2):
                await server.service.save(tenant="", conversation_id="c", turn_number=turn)
            saved = (await ok(client.post(f"{base}/checkpoint", json={"conversation_id": "c"})))[
                "result"
            ]
            assert (saved["turn_number"], saved["existing"]) == (2, True)
            rows = (await ok(client.get(f"{base}/c")))["result"]
            assert [row["turn_number"] for row in rows] == [1, 2]
            listed = await ok(client.get(base))
            assert [one["conversation_id"] for one in listed["conversations"]] == ["c"]
            branch = {"conversation_id": "c", "turn_number": 1, "branch_name": "other"}
            made = (await ok(client.post(f"{base}/branch", json=branch)))["result"]
            assert (made["branch_name"], made["turn_number"]) == ("other", 1)
            compare = {"conversation_id": "c", "other_branch_name": "other"}
            found = (await ok(client.post(f"{base}/compare", json=compare)))["result"]
            assert found["common_tokens"] == found["other"]["tokens"] == 7
            assert found["first"]["tokens"] == len(first)
            assert found["first"]["differing_tokens"] == len(first) - 7
            assert found["equal"] is False
            same = {"conversation_id": "c", "other_conversation_id": "c"}
            found = (await ok(client.post(f"{base}/compare", json=same)))["result"]
            assert found["equal"] is True
            place = {"conversation_id": "c"}
            restored = (await ok(client.post(f"{base}/restore", json=place)))["result"]
            assert restored["verified"] is True
            assert (await ok(client.post("/v1/agent/tiers/promote", json=place)))["result"]["tier"]
            await ok(client.post("/v1/agent/tiers/demote", json=place))
            await refused(client.get(f"{base}/unknown"), 404, "not_found")
            await refused(client.get(f"{base}/.x"), 422, "invalid_request")
            await refused(client.get(f"{base}?limit=0"), 422, "invalid_request")

    using(tmp_path, work)


def test_a_run_over_rest_as_a_stream(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host) as client:
            body = {"messages": [{"role": "user", "content": "x"}], "conversation_id": "c"}
            created = await ok(client.post("/v1/agent/runs", json=body))
            path = f"/v1/agent/runs/{created['run_id']}"
            response = await client.get(path + "/stream")
            assert response.headers["content-type"].startswith("text/event-stream")
            numbers = [int(found) for found in re.findall(r"^id: (\d+)$", response.text, re.M)]
            kinds = re.findall(r"^event: (\w+)$", response.text, re.M)
            assert numbers == list(range(1, len(numbers) + 1))
            assert (kinds[0], kinds[-1]) == ("run_started", "run_finished")
            assert {"run_step", "tool_start", "tool_result", "run_checkpoint"} <= set(kinds)
            run = await ok(client.get(path))
            assert (run["status"], run["result"]["content"]) == ("completed", "done")
            assert run["steps"][0]["calls"][0]["outcome"] == {"result": 42}
            headers = {"last-event-id": str(len(numbers) - 1)}
            rest = await client.get(path + "/stream", headers=headers)
            assert re.findall(r"^event: (\w+)$", rest.text, re.M) == ["run_finished"]
            await refused(client.get(path + "/stream?after=x"), 422, "invalid_request")
            await refused(client.get("/v1/agent/runs/unknown"), 404, "not_found")
            await refused(client.post(path + "/cancel"), 409, "run_conflict")
            await refused(client.post(path + "/resume", json={}), 409, "run_conflict")
            await refused(
                client.post("/v1/agent/runs", json={"messages": []}), 422, "invalid_request"
            )
            saved = (await ok(client.get("/v1/agent/conversations/c")))["result"]
            assert [row["snapshot_id"] for row in saved] == [
                step["snapshot_id"] for step in run["steps"]
            ]

    using(tmp_path, work)


def test_a_run_over_rest_with_its_tokens_and_its_end(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host) as client:
            body = {"messages": [{"role": "user", "content": "x"}]}
            created = await ok(client.post("/v1/agent/runs", json=body))
            path = f"/v1/agent/runs/{created['run_id']}"
            response = await client.get(path + "/stream?tokens=true")
            parts = [part.splitlines() for part in response.text.strip().split("\n\n")]
            shown = [lines for lines in parts if lines[0] == "event: run_tokens"]
            assert shown
            # Without a number: a client that comes back names the last event that counts.
            assert all(lines[0].startswith("id: ") for lines in parts if lines not in shown)
            texts: dict[int, str] = {}
            for lines in shown:
                told = json.loads(lines[1].removeprefix("data: "))
                assert told["offset"] == len(texts.get(told["step"], ""))
                texts[told["step"]] = texts.get(told["step"], "") + told["text"]
            assert json.loads(texts[1])["content"] == "done"
            await refused(client.get(path + "/stream?tokens=maybe"), 422, "invalid_request")
            await ok(client.delete(path))
            await refused(client.delete(path), 404, "not_found")
            await refused(client.get(path + "/stream"), 404, "not_found")

    using(tmp_path, work)


def test_explorations_over_rest(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        base = "/v1/agent/explorations"
        async with client_of(host, "one") as one, client_of(host, "two") as two:
            task = {"messages": [{"role": "user", "content": "x"}], "tools": ["calculator"]}
            body = {"conversation_id": "c", "branches": [task, task]}
            for wrong in (
                {**body, "branches": [task]},
                {**body, "branches": [task] * 17},
                {**body, "branches": [task, {**task, "conversation_id": "d"}]},
                {**body, "extra": 1},
                {"branches": [task, task]},
            ):
                await refused(one.post(base, json=wrong), 422, "invalid_request")
            unknown = {**body, "conversation_id": "unknown"}
            await refused(one.post(base, json=unknown), 404, "not_found")
            made = await ok(one.post(base, json=body))
            path = f"{base}/{made['exploration_id']}"
            for branch in made["branches"]:
                await host.runs.ended(branch["run_id"])
            keep = {"branch_name": made["branches"][1]["branch_name"]}
            await refused(two.get(path), 404, "not_found")
            await refused(two.delete(path), 404, "not_found")
            await refused(two.post(path + "/keep", json=keep), 404, "not_found")
            await refused(one.post(path + "/keep", json={}), 422, "invalid_request")
            assert (await ok(one.get(path)))["status"] == "over"
            kept = await ok(one.post(path + "/keep", json=keep))
            assert kept["kept"]["branch_name"] == keep["branch_name"]
            assert kept["dropped"] == [made["branches"][0]["branch_name"]]
            await refused(one.get(path), 404, "not_found")
            again = await ok(one.post(base, json=body))
            gone = await ok(one.delete(f"{base}/{again['exploration_id']}"))
            assert gone["dropped"] == [branch["branch_name"] for branch in again["branches"]]
            assert host.runs.active == 0

    using(tmp_path, work, keyed=True)


def test_everything_is_described(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        app = FastAPI()
        app.include_router(agent_router(host))
        paths = app.openapi()["paths"]
        assert all(path.startswith("/v1/agent/") for path in paths)
        for path, methods in paths.items():
            for method, about in methods.items():
                assert about["summary"], path
                assert ("requestBody" in about) == (
                    method == "post" and not path.endswith("/cancel")
                ), path

    using(tmp_path, work)


# ---- WebSocket ----


class Socket:
    """A client of the WebSocket, in memory: it takes messages only when it is asked to."""

    def __init__(self, **headers: str) -> None:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "websocket", "headers": raw}
        self.headers = Request({"type": "http", "headers": raw}).headers
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        self.closed: int | None = None

    async def accept(self) -> None:
        pass

    async def close(self, code: int, reason: str = "") -> None:
        self.closed = code

    async def receive(self) -> dict[str, Any]:
        return await self.said.get()

    async def send_json(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.heard.put_nowait(message)

    def say(self, text: str | None = None, **message: Any) -> None:
        text = json.dumps(message) if text is None else text
        self.said.put_nowait({"type": "websocket.receive", "text": text})

    async def hear(self, kind: str) -> dict[str, Any]:
        while True:
            message = await self.heard.get()
            if message["type"] == kind:
                return message


@asynccontextmanager
async def connected(
    agents: AgentHost, *, heartbeat: float = 600.0, allow: bool = True, **headers: str
) -> Any:
    socket = Socket(**headers)
    server = AgentSocket(agents, lambda header: allow, heartbeat=heartbeat)

    def websocket() -> WebSocket:
        return socket  # type: ignore[return-value]

    task = asyncio.create_task(server.serve(websocket()))
    try:
        yield socket
    finally:
        socket.said.put_nowait({"type": "websocket.disconnect"})
        socket.reads.set()
        await task


def test_messages_of_the_socket(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with connected(host) as socket:
            await socket.hear("connected")
            socket.say(type="ping", request_id="p")
            assert (await socket.hear("heartbeat"))["request_id"] == "p"
            socket.say(type="execute_tool", tool="steps", request_id="s", conversation_id="c")
            start = await socket.hear("tool_start")
            result = await socket.hear("tool_result")
            assert start["request_id"] == result["request_id"] == "s"
            assert result["result"] == {"conversation": "c", "call": start["call_id"]}
            socket.say(type="execute_tool", tool="fail", arguments={"message": "no"})
            assert (await socket.hear("tool_error"))["error"] == "tool_failed"
            socket.say(type="execute_tool", tool="none", request_id="n")
            assert (await socket.hear("tool_error"))["error"] == "not_found"
            for text in ("{", "[]", '{"type": "sing"}', '{"type": "ping", "extra": 1}', "\x00"):
                socket.say(text)
                assert (await socket.hear("error"))["error"] == "invalid_request", text
            socket.say("x" * (agent_socket.MAX_MESSAGE_BYTES + 1))
            while socket.closed is None:
                await asyncio.sleep(0)
            assert socket.closed == agent_socket.TOO_LARGE

    using(tmp_path, work, agent_tools_module="hostile_tools")


def test_events_of_the_socket(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with connected(host) as socket, connected(host) as other:
            for each in (socket, other):
                await each.hear("connected")
            socket.say(type="subscribe", conversation_ids=["c"])
            told = await socket.hear("subscription_updated")
            assert "tier_transition" in told["events"]
            other.say(type="subscribe", events=["memory_update"], conversation_ids=["d"])
            await other.hear("subscription_updated")
            await host.memory.store("", "k", "v", conversation_id="d")
            await host.memory.store("", "k", "v", conversation_id="c")
            heard = await socket.hear("memory_update")
            assert (heard["conversation_id"], heard["key"], heard["action"]) == ("c", "k", "stored")
            assert (await other.hear("memory_update"))["conversation_id"] == "d"
            await server.chat("c")
            await server.service.save(tenant="", conversation_id="c")
            row = await server.service.find(tenant="", conversation_id="c")
            await server.service.demote([row])
            moved = await socket.hear("tier_transition")
            assert (moved["from"], moved["to"], moved["reason"]) == ("ram", "disk", "request")
            server.engine.forget()
            await server.service.restore(row)
            moved = await socket.hear("tier_transition")
            assert (moved["from"], moved["to"], moved["snapshot_id"]) == (
                "disk",
                "ram",
                row.snapshot_id,
            )
            other.say(
                type="execute_tool",
                tool="calculator",
                arguments={"expression": "1"},
                conversation_id="c",
            )
            assert (await socket.hear("tool_start"))["tool"] == "calculator"
            assert (await socket.hear("tool_result"))["result"] == 1
            assert (await other.hear("tool_result"))["result"] == 1
            assert other.heard.empty()

    using(tmp_path, work)


def test_a_client_that_does_not_read_is_bounded(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with connected(host) as socket:
            await socket.hear("connected")
            socket.say(type="subscribe")
            await socket.hear("subscription_updated")
            socket.reads.clear()
            for number in range(MAX_CALLS + 4):
                socket.say(
                    type="execute_tool",
                    tool="calculator",
                    arguments={"expression": "1"},
                    request_id=str(number),
                )
            for number in range(1000):
                await host.memory.store("", "k", str(number))
            assert socket.heard.empty()
            socket.reads.set()
            lost = await socket.hear("error")
            assert lost["error"] == "events_lost"
            assert lost["details"]["lost"] >= 700

        async with connected(host, heartbeat=0.001) as socket:
            await socket.hear("heartbeat")

    using(tmp_path, work)


def test_more_calls_at_once_than_served_are_refused(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with connected(host) as socket:
            for number in range(MAX_CALLS + 1):
                socket.say(type="execute_tool", tool="hang", request_id=str(number))
            refusal = await socket.hear("tool_error")
            assert (refusal["error"], refusal["request_id"]) == ("agents_busy", str(MAX_CALLS))
        assert host.executor.counters.running == 0

    using(tmp_path, work, agent_tools_module="hostile_tools")


def test_who_may_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with connected(host, allow=False) as socket:
            await asyncio.sleep(0)
            assert socket.closed == agent_socket.UNAUTHORIZED
        async with connected(host, origin="http://evil.example", host="localhost:1") as socket:
            await asyncio.sleep(0)
            assert socket.closed == agent_socket.FORBIDDEN
        async with connected(host, origin="http://localhost:1", host="localhost:1") as socket:
            await socket.hear("connected")
        monkeypatch.setattr(agent_socket, "MAX_CONNECTIONS", 0)
        async with connected(host) as socket:
            await asyncio.sleep(0)
            assert socket.closed == agent_socket.TRY_LATER
        assert len(host.bus) == 0

    using(tmp_path, work)


@pytest.mark.parametrize("keyed", [False, True])
def test_origins(keyed: bool) -> None:
    for own in (b"localhost:30000", b"127.0.0.1:30000", b"[::1]:30000", b"10.1.2.3"):
        host = (b"host", own)
        assert not is_foreign([host], keyed=keyed)
        assert not is_foreign([host, (b"origin", b"http://" + own)], keyed=keyed)
        for origin in (b"http://evil.example", b"null", b"http://localhost:30001", b"http://[x"):
            assert is_foreign([host, (b"origin", origin)], keyed=keyed), origin
    # A name that points here may be the page's own: a server with keys knows who asks.
    rebound = [(b"host", b"evil.example:30000"), (b"origin", b"http://evil.example:30000")]
    assert is_foreign(rebound, keyed=keyed) != keyed


def test_a_page_of_another_site_reaches_no_tool(tmp_path: Path) -> None:
    """A browser sends it without asking, if it looks like a form; a key it does not have."""

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        body = json.dumps({"tool": "calculator", "arguments": {"expression": "1"}})
        page = {"origin": "http://evil.example", "content-type": "text/plain"}
        async with client_of(host, "one") as client:
            for method, path in (
                ("POST", "tools/execute"),
                ("POST", "memory/search"),
                ("GET", "runs"),
                ("GET", "runs/none/stream"),
            ):
                asking = client.request(method, f"/v1/agent/{path}", content=body, headers=page)
                if host.keyed:
                    assert (await asking).status_code != 403
                else:
                    await refused(asking, 403, "foreign_origin")
            await ok(client.post("/v1/agent/tools/execute", content=body))

    for keyed in (False, True):
        folder = tmp_path / str(keyed)
        folder.mkdir()
        using(folder, work, keyed=keyed)


# ---- MCP ----


@pytest.mark.parametrize("bridged", [False, True])
def test_the_official_client(tmp_path: Path, bridged: bool) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c", turns=2)
        saved = await server.service.save(tenant="", conversation_id="c")
        async with Client(mcp_server(host)) as near:
            if not bridged:
                await look(near, saved.snapshot_id)
                return
            async with Client(bridge(near)) as far:
                await look(far, saved.snapshot_id)

    async def look(client: Client, snapshot_id: str) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) > BUILT_IN
        assert tools["total"].input_schema["required"] == ["orders", "price"]
        result = await client.call_tool("calculator", {"expression": "6 * 7"})
        assert result.content[0].text == "42"  # type: ignore[union-attr]
        assert result.structured_content == {"result": 42}
        told: list[Any] = []

        async def progress(done: float, total: float | None, message: str | None) -> None:
            told.append((done, total, message))

        result = await client.call_tool(
            "steps", {}, progress_callback=progress, meta={CONVERSATION_META: "c"}
        )
        assert result.structured_content["conversation"] == "c"
        assert told[-1] == (1.0, 1.0, "step 2")
        result = await client.call_tool("fail", {"message": "no bread"})
        assert result.is_error
        assert result.structured_content["error"] == "tool_failed"
        assert "no bread" in result.content[0].text  # type: ignore[union-attr]
        result = await client.call_tool("calculator", {"sum": "1"})
        assert result.structured_content["error"] == "invalid_request"
        with pytest.raises(MCPError, match="no tool"):
            await client.call_tool("none", {})
        listed = await client.call_tool("checkpoint_list", {"conversation_id": "c"})
        assert listed.structured_content["result"][0]["snapshot_id"] == snapshot_id
        uris = [str(one.uri) for one in (await client.list_resources()).resources]
        assert uris == ["engram://conversations", "engram://conversations/c"]
        assert len((await client.list_resource_templates()).resource_templates) == 2
        for uri in (*uris[1:], f"engram://snapshots/{snapshot_id}"):
            read = await client.read_resource(uri)
            assert snapshot_id in read.contents[0].text  # type: ignore[union-attr]
        for uri in ("engram://snapshots/none", "engram://other", "file:///etc/passwd"):
            with pytest.raises(MCPError):
                await client.read_resource(uri)

    using(tmp_path, work, agent_tools_module="hostile_tools")


def test_the_database_holds_no_key(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        async with client_of(host, "very-secret") as client:
            body = {"key": "k", "value": "v"}
            await ok(client.post("/v1/agent/memory/store", json=body))

    using(tmp_path, work, keyed=True)
    with sqlite3.connect(tmp_path / "agents.sqlite") as connection:
        assert "very-secret" not in "\n".join(connection.iterdump())
