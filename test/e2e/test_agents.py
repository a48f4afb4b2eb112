"""Agents on a real server: runs that were killed, tools over every way in, memory that stays."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import psutil
import pytest
import websockets
from mcp import Client as McpClient
from mcp import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from e2e.agents_world import (
    HEADERS,
    KEY,
    WHERE,
    answered,
    begin,
    events,
    finished,
    forced,
    forget,
    get,
    until,
)
from e2e.worlds import World
from engram.agents.database import AGENT_FILE, AgentDatabase
from engram.agents.journal import Journal
from engram.agents.memory import MemoryStore
from engram.agents.owners import owner_of
from fences import blocks
from refusals import refusal

EXECUTE, MEMORY = "/v1/agent/tools/execute", "/v1/agent/memory/store"
EVERY_TOOL: dict[str, dict[str, Any]] = {
    "memory_store": {"key": "k", "value": "an old station"},
    "memory_recall": {"key": "k"},
    "memory_search": {"query": "station"},
    "checkpoint_list": {"conversation_id": "killed"},
    "checkpoint_save": {"conversation_id": "killed"},
    "checkpoint_restore": {"conversation_id": "killed"},
    "conversation_branch": {"conversation_id": "killed", "turn_number": 1, "branch_name": "other"},
    "conversation_compare": {"conversation_id": "killed", "other_branch_name": "other"},
    "conversation_explore": {"conversation_id": "killed", "prompts": ["a", "b"], "max_tokens": 4},
    "conversation_keep": {},
    "calculator": {"expression": "6 * 7"},
    "count": {"by": 3},
    "paint": {"colour": "red"},
    "gated": {"part": 1},
    "careless": {"part": 1},
    "report": {"steps": 2},
    "misbehave": {"how": "write"},
    "shout": {},
    "price": {"article": "milk"},
}
FAILING = {"hang": {}}


def said(run: dict[str, Any]) -> list[Any]:
    """What the model wrote and was told, without the ids that differ from run to run."""
    return [
        (
            step["message"].get("content"),
            [
                (call["function"]["name"], call["function"]["arguments"])
                for call in step["message"].get("tool_calls", ())
            ],
            [call["outcome"] for call in step["calls"]],
        )
        for step in run["steps"]
    ]


# ---- runs ----


def test_a_run_uses_three_tools(agents: World) -> None:
    run = agents.facts["whole in a tool"]
    assert run["status"] == "completed"
    assert [step["calls"][0]["tool"] for step in run["steps"][:3]] == ["count", "paint", "gated"]
    assert all("result" in step["calls"][0]["outcome"] for step in run["steps"][:3])
    assert run["steps"][3]["calls"] == []
    assert run["result"]["content"] == run["steps"][3]["message"]["content"]
    assert len(agents.facts["counts of whole"]) == 2 * len(WHERE)


@pytest.mark.parametrize("where", WHERE)
def test_a_killed_run_ends_as_one_that_was_not(agents: World, where: str) -> None:
    whole, resumed = (agents.facts[f"{which} {where}"] for which in ("whole", "resumed"))
    assert resumed["status"] == "completed"
    assert said(resumed) == said(whole)
    assert resumed["result"] == whole["result"]


def test_both_were_killed_where_they_should_be(agents: World) -> None:
    between, inside = (agents.facts[f"killed {where}"] for where in WHERE)
    assert between["status"] == inside["status"] == "interrupted"
    assert between["steps"][0]["calls"][0]["state"] == "done"
    assert len(between["steps"]) < 3
    assert inside["steps"][2]["calls"][0]["state"] == "started"


def test_no_side_effect_is_repeated(agents: World) -> None:
    calls = [
        call["call_id"]
        for where in WHERE
        for step in agents.facts[f"resumed {where}"]["steps"]
        for call in step["calls"]
        if call["tool"] in ("count", "gated")
    ]
    counted = agents.facts["counts of killed"]
    assert len(counted) == len(set(counted)) == 4
    assert set(counted) == set(calls)


@pytest.mark.parametrize("where", WHERE)
def test_what_a_resumed_run_computes_is_only_what_is_new(agents: World, where: str) -> None:
    steps = agents.facts[f"resumed {where}"]["steps"]
    for before, step in itertools.pairwise(steps):
        assert step["snapshot_id"]
        recorded = before["prompt_tokens"] + before["completion_tokens"]
        assert step["cached_tokens"] == recorded - 1, step


def test_a_call_of_unknown_outcome_is_reported(agents: World) -> None:
    """The tool may not be repeated, and its run was cancelled in the middle of it."""
    http, tools = agents.client.http, agents.facts["tools"]
    forget(tools)
    run_id = begin(
        http,
        messages=[{"role": "user", "content": "Be careless."}],
        tools=["careless"],
        tool_choice=forced("careless"),
        max_tokens=160,
        temperature=0,
    )
    until(tools / "gated")
    cancelled = answered(http.post(f"/v1/agent/runs/{run_id}/cancel"))
    assert cancelled["status"] == "cancelled"
    answered(http.post(f"/v1/agent/runs/{run_id}/resume", json={}))
    run = finished(http, run_id)
    assert run["status"] == "completed"
    assert run["steps"][0]["calls"][0]["outcome"]["error"]["error"] == "outcome_unknown"
    assert len((tools / "counts").read_text().splitlines()) == 1
    kinds = [event["event"] for event in events(http, run_id)]
    assert kinds[0] == "run_started"
    assert {"tool_start", "run_resumed", "tool_error"} <= set(kinds)
    assert kinds[-1] == "run_finished"
    response = http.post(f"/v1/agent/runs/{run_id}/resume", json={})
    assert (response.status_code, refusal(response)["error"]) == (409, "run_conflict")


def test_a_run_ends_at_its_limit(agents: World) -> None:
    http = agents.client.http
    run_id = begin(
        http,
        messages=[{"role": "user", "content": "Paint as much as you can."}],
        tools=["paint"],
        tool_choice=forced("paint")[0],
        max_iterations=2,
        max_tokens=160,
        temperature=0,
    )
    run = finished(http, run_id)
    assert run["status"] == "limit_reached", run
    assert [[call["tool"] for call in step["calls"]] for step in run["steps"]] == [["paint"]] * 2


def test_a_run_is_seen_while_it_is_written_and_then_forgotten(agents: World) -> None:
    """Over SSE and over the WebSocket; its parts are the text of the reply."""
    http = agents.client.http
    ask: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Write, please."}],
        "tools": [],
        "conversation_id": "written",
        "max_tokens": 24,
        "temperature": 0,
    }

    async def watch() -> tuple[str, str]:
        async with websockets.connect(ws(agents), additional_headers=HEADERS) as socket:
            subscribe = {"type": "subscribe", "events": ["run_tokens", "run_event"]}
            await socket.send(json.dumps(subscribe | {"conversation_ids": ["written"]}))
            heard: list[dict[str, Any]] = []
            while not heard or heard[-1]["type"] != "subscription_updated":
                heard.append(json.loads(await socket.recv()))
            run_id = await asyncio.to_thread(begin, http, **ask)
            while heard[-1].get("event") != "run_finished":
                heard.append(json.loads(await socket.recv()))
            parts = [one for one in heard if one["type"] == "run_tokens"]
            assert [one["offset"] for one in parts] == list(
                itertools.accumulate((len(one["text"]) for one in parts[:-1]), initial=0)
            )
            return run_id, "".join(one["text"] for one in parts)

    run_id, text = asyncio.run(watch())
    content = get(http, run_id)["steps"][0]["message"]["content"]
    assert text == content
    again = begin(http, **ask | {"conversation_id": "rewritten"})
    heard = events(http, again, tokens=True)
    kinds = [one["event"] for one in heard]
    assert kinds.index("run_tokens") < kinds.index("run_step")
    assert "".join(one["text"] for one in heard if one["event"] == "run_tokens") == content
    assert "run_tokens" not in {one["event"] for one in events(http, again)}
    answered(http.delete(f"/v1/agent/runs/{again}"))
    assert http.get(f"/v1/agent/runs/{again}").status_code == 404
    assert http.delete(f"/v1/agent/runs/{again}").status_code == 404


def test_branches_are_explored_and_one_is_kept(agents: World) -> None:
    """All begin at one turn, whose state none of them computes; the conversation goes on."""
    http = agents.client.http
    chat = {"max_tokens": 12, "temperature": 0}
    where = "/v1/conversations/explored/chat"
    first = {"messages": [{"role": "user", "content": "Where shall we go?"}], **chat}
    usage = http.post(where, json=first).json()["usage"]
    recorded = usage["prompt_tokens"] + usage["completion_tokens"]
    ways = ["To the sea.", "To the hills.", "Home."]
    asked = {
        "conversation_id": "explored",
        "branches": [
            {"messages": [{"role": "user", "content": way}], "tools": [], **chat} for way in ways
        ],
    }
    made = answered(http.post("/v1/agent/explorations", json=asked))
    path = f"/v1/agent/explorations/{made['exploration_id']}"
    runs = [finished(http, branch["run_id"]) for branch in made["branches"]]
    assert [run["status"] for run in runs] == ["completed"] * 3
    for run in runs:
        assert run["steps"][0]["cached_tokens"] == recorded - 1
    found = answered(http.get(path))
    assert found["status"] == "over"
    assert recorded <= found["common_tokens"] < min(one["tokens"] for one in found["branches"])
    chosen = found["branches"][1]
    kept = answered(http.post(path + "/keep", json={"branch_name": chosen["branch_name"]}))
    assert kept["kept"]["branch_name"] == chosen["branch_name"]
    listed = answered(http.get("/v1/agent/conversations/explored"))["result"]
    assert {one["branch_name"] for one in listed} == {"main", chosen["branch_name"]}
    assert http.get(path).status_code == 404
    # What was tried on a branch is what a plain chat says there.
    plain = {"messages": [{"role": "user", "content": ways[1]}], **chat}
    plain |= {"continue_from": {"turn_number": 1}, "branch_name": "plain"}
    reply = http.post(where, json=plain).json()
    assert reply["choices"][0]["message"]["content"] == chosen["result"]["content"]
    then = {"messages": [{"role": "user", "content": "And then?"}], **chat}
    then |= {"continue_from": {"branch_name": chosen["branch_name"]}}
    usage = http.post(where, json=then).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == chosen["tokens"] - 1


def test_a_graph_goes_back_with_its_model(agents: World, tmp_path: Path) -> None:
    """A fork says what the graph would have said there, and computes only what is new."""
    pytest.importorskip("langgraph", reason="the extra langgraph is not installed")
    from e2e.agents_graph import forked

    found = forked(agents.server.url, KEY, tmp_path / "graph.sqlite")
    assert found["forked"] == found["straight"]
    assert found["cached"] == found["covered"]


# ---- memory ----


def test_memory_survives_kill_9(agents: World) -> None:
    http = agents.client.http
    found = answered(http.post("/v1/agent/memory/recall", json={"key": "before"}))
    assert found["memory"]["value"] == "kept through a kill"
    for search in (
        {"query": "kill"},
        {"category": "facts"},
        {"query": "kept", "category": "facts"},
    ):
        found = answered(http.post("/v1/agent/memory/search", json=search))
        assert [one["key"] for one in found["memories"]] == ["before"], search
    assert answered(http.post("/v1/agent/memory/search", json={"category": "x"}))["memories"] == []


# ---- tools that misbehave ----


@pytest.mark.parametrize(
    ("tool", "arguments", "status", "code"),
    [
        ("hang", {}, 504, "tool_timeout"),
        ("misbehave", {"how": "raise"}, 502, "tool_failed"),
        ("misbehave", {"how": "large"}, 502, "tool_result_too_large"),
        ("misbehave", {"how": "exit"}, 502, "tool_crashed"),
        ("misbehave", {"how": "fork"}, 200, None),
        ("misbehave", {"how": "write"}, 200, None),
        ("misbehave", {"how": "sing"}, 422, "invalid_request"),
        ("nothing", {}, 404, "not_found"),
    ],
)
def test_a_tool_that_misbehaves_leaves_the_server_unharmed(
    agents: World, tool: str, arguments: dict[str, Any], status: int, code: str | None
) -> None:
    http = agents.client.http
    body = {"tool": tool, "arguments": arguments}
    response = http.post("/v1/agent/tools/execute", json=body)
    assert response.status_code == status, response.text[:500]
    assert (refusal(response)["error"] if code else None) == code
    assert http.get("/v1/agent/health").json()["status"] == "ok"
    assert len(agents.client.generate([10, 11, 12], 2).tokens) == 2


# ---- keys ----


def test_every_way_in_asks_for_the_key(agents: World) -> None:
    url = agents.server.url
    for path in ("/v1/agent/health", "/v1/agent/tools", "/v1/agent/runs", "/mcp"):
        assert httpx.get(url + path).status_code == 401, path
    assert httpx.post(url + "/mcp", json={}).status_code == 401

    async def knock(headers: dict[str, str]) -> int | None:
        try:
            async with websockets.connect(ws(agents), additional_headers=headers):
                return None
        except websockets.InvalidStatus as refused:
            return refused.response.status_code

    assert asyncio.run(knock({})) == 403
    assert asyncio.run(knock({"Authorization": "Bearer wrong"})) == 403
    assert asyncio.run(knock({**HEADERS, "Origin": "http://elsewhere.example"})) == 403
    assert asyncio.run(knock(HEADERS)) is None


# ---- MCP ----


def mcp_over_http(world: World) -> Any:
    http = httpx2.AsyncClient(headers=HEADERS, timeout=120)
    return streamable_http_client(world.server.url + "/mcp", http_client=http)


def mcp_over_stdio(world: World) -> Any:
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "engram.cli.main", "mcp", "--url", world.server.url],
        env={**os.environ, "ENGRAM_API_KEY": KEY},
    )


@pytest.mark.parametrize("way", [mcp_over_http, mcp_over_stdio])
def test_the_official_client_lists_and_calls_every_tool(agents: World, way: Any) -> None:
    (agents.facts["tools"] / "gate").touch()

    async def work() -> None:
        async with McpClient(way(agents)) as client:
            listed = {tool.name for tool in (await client.list_tools()).tools}
            assert listed == set(EVERY_TOOL) | set(FAILING)
            last: dict[str, Any] = {}
            for name, arguments in EVERY_TOOL.items():
                if name == "conversation_keep":
                    arguments = {
                        "exploration_id": last["exploration_id"],
                        "branch_name": last["branches"][0]["branch_name"],
                    }
                result = await client.call_tool(name, arguments)
                assert not result.is_error, (name, result)
                assert result.structured_content is not None, name
                last = result.structured_content
            assert (await client.call_tool("calculator", {"expression": "6*7"})).content[
                0
            ].text == "42"
            failed = await client.call_tool("hang", {})
            assert failed.is_error
            assert failed.structured_content["error"] == "tool_timeout"
            resources = (await client.list_resources()).resources
            uris = {str(resource.uri) for resource in resources}
            assert "engram://conversations/killed" in uris
            read = await client.read_resource("engram://conversations/killed")
            rows = json.loads(read.contents[0].text)
            one = await client.read_resource(f"engram://snapshots/{rows[0]['snapshot_id']}")
            assert json.loads(one.contents[0].text) == rows[0]

    asyncio.run(work())


# ---- OpenAI ----


def test_the_openai_client_does_a_tool_call_round_trip(agents: World) -> None:
    client = openai.OpenAI(base_url=agents.server.url + "/v1", api_key=KEY)
    spec = answered(agents.client.http.get("/v1/agent/tools/paint"))["tool"]
    function = {name: spec[name] for name in ("name", "description", "parameters")}
    messages: list[Any] = [{"role": "user", "content": "Paint it."}]
    common: dict[str, Any] = {
        "model": "tiny",
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 160,
        "temperature": 0,
        "extra_body": {"conversation_id": "openai"},
    }
    choice: Any = {"type": "function", "function": {"name": "paint"}}
    reply = client.chat.completions.create(messages=messages, tool_choice=choice, **common)
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.type == "function"
    executed = answered(
        agents.client.http.post(
            "/v1/agent/tools/execute",
            json={
                "tool": call.function.name,
                "arguments": json.loads(call.function.arguments),
                "conversation_id": "openai",
            },
        )
    )
    messages.append(reply.choices[0].message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": executed["result"]})
    last = client.chat.completions.create(messages=messages, tool_choice="none", **common)
    assert last.choices[0].message.content
    saved = agents.client.save(conversation_id="openai")
    assert saved["turn_number"] == 2


# ---- WebSocket ----

CLIENTS = 32


def ws(world: World) -> str:
    return world.server.url.replace("http", "ws") + "/v1/agent/ws"


def test_32_clients_hear_only_of_their_own(agents: World) -> None:
    async def client(number: int) -> list[dict[str, Any]]:
        mine = f"ws-{number}"
        heard: list[dict[str, Any]] = []

        async def ask(socket: Any, answer: str, **message: Any) -> dict[str, Any]:
            await socket.send(json.dumps(message))
            while True:
                heard.append(json.loads(await socket.recv()))
                if heard[-1]["type"] == answer:
                    return heard[-1]

        async with websockets.connect(ws(agents), additional_headers=HEADERS) as socket:
            assert json.loads(await socket.recv())["type"] == "connected"
            told = await ask(
                socket, "subscription_updated", type="subscribe", conversation_ids=[mine]
            )
            assert told["conversation_ids"] == [mine]
            for step in range(3):
                where = {"conversation_id": mine, "request_id": f"{number}-{step}"}
                result = await ask(
                    socket, "tool_result", type="execute_tool", tool="report", **where
                )
                assert result["result"] == {"conversation_id": mine}
                assert result["request_id"] == f"{number}-{step}"
                arguments = {"key": "k", "value": mine}
                await ask(
                    socket,
                    "tool_result",
                    type="execute_tool",
                    tool="memory_store",
                    arguments=arguments,
                    **where,
                )
            await ask(socket, "heartbeat", type="ping")
            error = await ask(socket, "error", type="sing")
            assert error["error"] == "invalid_request"
        return heard

    async def all_of_them() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(client(number) for number in range(CLIENTS)))

    for number, heard in enumerate(asyncio.run(all_of_them())):
        assert {one.get("conversation_id") for one in heard} <= {f"ws-{number}", None}
        kinds = [one["type"] for one in heard]
        assert kinds.count("memory_update") == 3
        assert kinds.count("tool_result") == 6
        assert "tool_progress" in kinds


def test_a_client_that_does_not_read_is_bounded(agents: World) -> None:
    """It is told how much it has missed; the others are served meanwhile."""
    http = agents.client.http

    async def work() -> dict[str, Any]:
        sleepy = websockets.connect(
            ws(agents), additional_headers=HEADERS, max_queue=1, max_size=1 << 22, compression=None
        )
        async with sleepy as socket:
            await socket.send(json.dumps({"type": "subscribe", "conversation_ids": ["loud"]}))
            while json.loads(await socket.recv())["type"] != "subscription_updated":
                pass
            shout = {"tool": "shout", "conversation_id": "loud"}
            for _ in range(48):  # more than any buffer on the way holds
                answered(await asyncio.to_thread(http.post, EXECUTE, json=shout))
            store = {"key": "k", "value": "v", "conversation_id": "loud"}
            for _ in range(400):
                answered(await asyncio.to_thread(http.post, MEMORY, json=store))
            while True:
                heard: dict[str, Any] = json.loads(await socket.recv())
                if heard["type"] == "error":
                    return heard

    told = asyncio.run(asyncio.wait_for(work(), 120))
    assert told["error"] == "events_lost"
    assert told["details"]["lost"] > 0


# ---- documents ----


def test_the_commands_of_the_document(agents: World, tmp_path: Path) -> None:
    found = blocks("agents")
    assert len(found) == 5
    said = []
    for block in found:
        code = block.code.replace("localhost:30000", f"127.0.0.1:{agents.server.port}")
        command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        result = subprocess.run(
            [*command[block.language], code],
            cwd=tmp_path,
            env={
                **os.environ,
                "ENGRAM_API_KEY": KEY,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
        said.append(result.stdout)
    assert json.loads(said[0])["result"] == 5.0
    run = json.loads(said[1][said[1].rindex("\n\n") :])
    assert run["status"] == "completed"
    assert "result" in run["steps"][0]["calls"][0]["outcome"]
    assert "event: run_finished" in said[1]
    assert "opens at seven" in said[2]
    explored, end = json.JSONDecoder().raw_decode(said[3])
    kept = json.loads(said[3][end:])
    assert [branch["status"] for branch in explored["branches"]] == ["completed"] * 2
    assert kept["kept"]["branch_name"] == explored["branches"][0]["branch_name"]
    assert kept["dropped"] == [explored["branches"][1]["branch_name"]]


def test_routes_are_described(agents: World) -> None:
    paths = agents.client.http.get("/openapi.json").json()["paths"]
    assert {"/v1/agent/runs", "/v1/agent/tools/execute", "/v1/agent/memory/search"} <= set(paths)
    described = paths["/v1/agent/runs"]["post"]["requestBody"]["content"]["application/json"]
    assert "messages" in described["schema"]["properties"]


def test_no_tool_process_outlives_its_server(agents: World, tmp_path: Path) -> None:
    """Those of the server that was killed are gone."""
    assert agents.server.process is not None
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "engram.agents.worker" in (process.info["cmdline"] or ())
        and "agent_tools" in process.info["cmdline"]
        and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert {worker.ppid() for worker in workers} <= {agents.server.process.pid}
    run_id = agents.facts["resumed in a tool"]["run_id"]
    assert get(agents.client.http, run_id)["status"] == "completed"


OTHER = "secret-of-somebody-else"


def test_under_another_key_nothing_of_the_first_is_seen(agents: World, tmp_path: Path) -> None:
    """The last test here: the server has another key then. What it has, a command hands on."""
    http, server = agents.client.http, agents.server
    store = server.args[server.args.index("--snapshot-dir") + 1]
    chat: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    say = {"messages": [{"role": "user", "content": "Apart."}]}
    assert http.post("/v1/conversations/apart/chat", json={**say, **chat}).status_code == 200
    task = {**say, **chat, "tools": []}
    made = answered(
        http.post(
            "/v1/agent/explorations", json={"conversation_id": "apart", "branches": [task, task]}
        )
    )
    runs = [finished(http, branch["run_id"])["run_id"] for branch in made["branches"]]
    memory = {"key": "apart", "value": "a secret station", "conversation_id": "apart"}
    answered(http.post(MEMORY, json=memory))

    server.kill()
    server.args[server.args.index(KEY)] = OTHER
    server.start()
    assert http.get("/v1/agent/runs").status_code == 401
    http.headers["Authorization"] = f"Bearer {OTHER}"
    where = {"conversation_id": "apart"}
    recall = http.post("/v1/agent/memory/recall", json={"key": "apart", **where})
    exploration = f"/v1/agent/explorations/{made['exploration_id']}"
    keep = {"branch_name": made["branches"][0]["branch_name"]}
    for response in (
        recall,
        http.post("/v1/agent/memory/delete", json={"key": "apart", **where}),
        http.post(EXECUTE, json={"tool": "memory_recall", "arguments": {"key": "apart"}, **where}),
        http.get(exploration),
        http.post(exploration + "/keep", json=keep),
        http.delete(exploration),
        *(http.get(f"/v1/agent/runs/{run}{what}") for run in runs for what in ("", "/stream")),
        *(http.post(f"/v1/agent/runs/{runs[0]}/{what}", json={}) for what in ("cancel", "resume")),
        http.delete(f"/v1/agent/runs/{runs[0]}"),
    ):
        assert (response.status_code, refusal(response)["error"]) == (404, "not_found")
    assert answered(http.get("/v1/agent/runs"))["runs"] == []
    assert answered(http.get("/v1/agent/stats"))["memories"] == 0
    search = {"query": "station", **where}
    assert answered(http.post("/v1/agent/memory/search", json=search))["memories"] == []

    async def heard() -> list[dict[str, Any]]:
        """All that is told to somebody who asks for the first one's by name."""
        told: list[dict[str, Any]] = []
        key = {"Authorization": f"Bearer {OTHER}"}
        async with websockets.connect(ws(agents), additional_headers=key) as socket:
            subscribe = {"type": "subscribe", "run_ids": runs, "conversation_ids": ["apart"]}
            for message in (subscribe, {"type": "ping"}):
                await socket.send(json.dumps(message))
            while not told or told[-1]["type"] != "heartbeat":
                told.append(json.loads(await socket.recv()))
        return told

    kinds = [one["type"] for one in asyncio.run(heard())]
    assert kinds == ["connected", "subscription_updated", "heartbeat"]

    files = [tmp_path / "old", tmp_path / "new"]
    for file, key in zip(files, (KEY, OTHER), strict=True):
        file.write_text(key)
    rekey = [sys.executable, "-m", "engram.cli.main", "agents", "rekey", "--dir", store]
    rekey += ["--old", str(files[0]), "--new", str(files[1])]
    refused = subprocess.run(rekey, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "another server uses" in refused.stderr
    server.kill()
    done = subprocess.run(rekey, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    async def handed_on() -> tuple[str, list[str]]:
        database = AgentDatabase(Path(store) / AGENT_FILE)
        owner = owner_of(f"Bearer {OTHER}", keyed=True)
        found = await MemoryStore(database).recall(owner, "apart", conversation_id="apart")
        explored = await Journal(database).explored(owner, made["exploration_id"])
        database.close()
        return found.value, explored

    assert asyncio.run(handed_on()) == ("a secret station", runs)
