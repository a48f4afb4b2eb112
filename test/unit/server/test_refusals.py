"""Every route tells what is wrong in one form: `{error: {code, message, hint, details}}`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI

from engram.agents.host import AgentHost
from engram.server.agent import agent_router
from engram.server.chat import chat_router
from engram.server.prefixes import prefixes_router
from engram.server.refusing import REFUSED_ROUTES, RefusingMiddleware
from engram.server.tagging import GENERATION_ROUTES, TaggingMiddleware
from engram.testing.samples import seeded_random
from refusals import refusal
from unit.agents.scripted import host_of, server_in
from unit.client.live import ROUTERS, Prompts
from unit.server.test_chat import Engine
from unit.server.test_compatible import client_of
from unit.service.engine import Server, on_a_loop

SURPRISE: dict[str, Any] = {"json": {"surprise": 1}}
UNKNOWN: dict[str, Any] = {"params": {"surprise": "1"}}
NOTHING: dict[str, Any] = {}
SNAPSHOT, CONVERSATION = "/v1/snapshots/{snapshot_id}", "/v1/conversations/{conversation_id}"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "POST /save_snapshot": (SURPRISE, "invalid_request"),
    "POST /restore_snapshot": (SURPRISE, "invalid_request"),
    "POST /list_snapshots": (SURPRISE, "invalid_request"),
    "POST /get_snapshot_info": ({"json": {"conversation_id": "none"}}, "not_found"),
    "POST /delete_snapshot": ({"content": b"{"}, "invalid_request"),
    "POST /v1/snapshots": ({"json": {"rid": "none"}}, "not_found"),
    "GET /v1/snapshots": (UNKNOWN, "invalid_request"),
    f"GET {SNAPSHOT}": (NOTHING, "not_found"),
    f"DELETE {SNAPSHOT}": (NOTHING, "not_found"),
    f"PATCH {SNAPSHOT}": (SURPRISE, "invalid_request"),
    f"POST {SNAPSHOT}/restore": ({"json": {}}, "not_found"),
    f"POST {SNAPSHOT}/branch": ({"json": {}}, "invalid_request"),
    f"GET {SNAPSHOT}/compare": ({"params": {"to": "none"}}, "not_found"),
    f"GET {SNAPSHOT}/export": (NOTHING, "not_found"),
    "POST /v1/snapshots/import": ({"content": b"no archive"}, "invalid_request"),
    "GET /v1/conversations": (UNKNOWN, "invalid_request"),
    f"GET {CONVERSATION}": (NOTHING, "not_found"),
    f"DELETE {CONVERSATION}": (NOTHING, "not_found"),
    f"PATCH {CONVERSATION}": ({"json": {"priority": 101}}, "invalid_request"),
    f"GET {CONVERSATION}/tree": (NOTHING, "not_found"),
    f"POST {CONVERSATION}/chat": ({"json": {"messages": []}}, "invalid_request"),
    f"POST {CONVERSATION}/regenerate": (SURPRISE, "invalid_request"),
    f"POST {CONVERSATION}/continue": (SURPRISE, "invalid_request"),
    "POST /v1/prefixes": ({"json": {"name": "a"}}, "invalid_request"),
    "GET /v1/prefixes": (UNKNOWN, "invalid_request"),
    "GET /v1/prefixes/{name}": (NOTHING, "not_found"),
    "DELETE /v1/prefixes/{name}": (NOTHING, "not_found"),
    "GET /v1/requests/{rid}": (NOTHING, "not_found"),
    "GET /v1/memory/tiers": (UNKNOWN, "invalid_request"),
    "GET /v1/memory/health": (UNKNOWN, "invalid_request"),
    "POST /v1/memory/promote": ({"json": {}}, "invalid_request"),
    "POST /v1/memory/demote": ({"json": {"snapshot_id": "none"}}, "not_found"),
    "POST /v1/memory/pin": (SURPRISE, "invalid_request"),
    "POST /v1/memory/unpin": (SURPRISE, "invalid_request"),
}
BAD_OF_AGENTS: dict[str, tuple[dict[str, Any], str]] = {
    "GET health": (UNKNOWN, "invalid_request"),
    "GET stats": (UNKNOWN, "invalid_request"),
    "GET tools": (UNKNOWN, "invalid_request"),
    "GET tools/{name}": (NOTHING, "not_found"),
    "POST tools/execute": ({"json": {"tool": "none"}}, "not_found"),
    "POST memory/store": (SURPRISE, "invalid_request"),
    "POST memory/recall": ({"json": {"key": "none"}}, "not_found"),
    "POST memory/search": (SURPRISE, "invalid_request"),
    "POST memory/delete": ({"json": {"key": "none"}}, "not_found"),
    "GET conversations": ({"params": {"limit": "0"}}, "invalid_request"),
    "GET conversations/{conversation_id}": (NOTHING, "not_found"),
    "POST conversations/checkpoint": ({"json": {"conversation_id": "none"}}, "not_found"),
    "POST conversations/restore": ({"json": {"conversation_id": "none"}}, "not_found"),
    "POST conversations/branch": (SURPRISE, "invalid_request"),
    "POST conversations/compare": (SURPRISE, "invalid_request"),
    "GET tiers": (UNKNOWN, "invalid_request"),
    "POST tiers/promote": ({"json": {"conversation_id": "none"}}, "not_found"),
    "POST tiers/demote": ({"json": {"conversation_id": "none"}}, "not_found"),
    "POST runs": (SURPRISE, "invalid_request"),
    "GET runs": ({"params": {"limit": "x"}}, "invalid_request"),
    "GET runs/{run_id}": (NOTHING, "not_found"),
    "GET runs/{run_id}/stream": ({"params": {"after": "x"}}, "invalid_request"),
    "POST runs/{run_id}/cancel": (NOTHING, "not_found"),
    "POST runs/{run_id}/resume": ({"json": {}}, "not_found"),
    "DELETE runs/{run_id}": (NOTHING, "not_found"),
    "POST explorations": (SURPRISE, "invalid_request"),
    "GET explorations/{exploration_id}": (NOTHING, "not_found"),
    "POST explorations/{exploration_id}/keep": (SURPRISE, "invalid_request"),
    "DELETE explorations/{exploration_id}": (NOTHING, "not_found"),
}


def app_of(server: Server) -> FastAPI:
    app = FastAPI()
    for make in ROUTERS:
        app.include_router(make(server.service))
    app.include_router(prefixes_router(server.service, Prompts()))
    app.include_router(chat_router(Engine()))
    return app


def routes_of(app: FastAPI) -> set[str]:
    return {
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }


async def ask(app: FastAPI, route: str, given: dict[str, Any], code: str) -> None:
    method, path = route.split()
    fields = ("snapshot_id", "conversation_id", "name", "rid", "run_id", "exploration_id")
    names = dict.fromkeys(fields, "none")
    async with client_of(app) as client:
        response = await client.request(method, path.format(**names), **given)
    assert refusal(response)["error"] == code, route


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


@on_a_loop
async def test_a_bad_request_to_every_route(server: Server) -> None:
    app = app_of(server)
    assert routes_of(app) == set(BAD)
    for route, (given, code) in BAD.items():
        await ask(app, route, given, code)


@on_a_loop
async def test_a_bug_in_any_route(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody thought of is told in the same form."""
    app = app_of(server)
    engine = Engine()
    engine.error = KeyError("a bug")
    broken = FastAPI()
    broken.include_router(chat_router(engine))
    said = {"json": {"messages": [{"role": "user", "content": "a"}]}}
    await ask(broken, f"POST {CONVERSATION}/chat", said, "internal_error")
    for name in ("get", "stats", "page"):

        async def fail(*_: Any, **__: Any) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(server.service, name, fail)
    for route in (f"GET {SNAPSHOT}", f"GET {SNAPSHOT}/export", "GET /v1/memory/health"):
        await ask(app, route, NOTHING, "internal_error")


@on_a_loop
async def test_a_bad_request_to_every_route_of_agents(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    host, _ = host_of(server, lambda *_: "done", tmp_path / "agents.sqlite", keyed=False)
    await host.start()
    try:
        app = FastAPI()
        app.include_router(agent_router(host))
        routes = {f"{m} {p.removeprefix('/v1/agent/')}" for m, p in map(str.split, routes_of(app))}
        assert routes == set(BAD_OF_AGENTS)
        for route, (given, code) in BAD_OF_AGENTS.items():
            await ask(app, route.replace(" ", " /v1/agent/"), given, code)
    finally:
        await host.close()
        server.stop()


@on_a_loop
async def test_what_engram_says_on_routes_of_sglang() -> None:
    app = RefusingMiddleware(TaggingMiddleware(cast(Any, FastAPI())))
    for route in GENERATION_ROUTES:
        await ask(
            cast(Any, app), f"POST {route}", {"json": {"conversation_id": "/"}}, "invalid_request"
        )
    for route in REFUSED_ROUTES:
        await ask(cast(Any, app), f"POST {route}", {"json": {}}, "unsupported")


def test_no_router_is_left_out(server: Server) -> None:
    """Those that `mount` puts on an application are those looked at here."""
    from engram.sglang_plugin.http import mount

    app = FastAPI()
    mount(app, server.service)
    assert routes_of(app) == set(BAD)
    agents = FastAPI()
    agents.include_router(agent_router(cast(AgentHost, None)))
    assert len(routes_of(agents)) == len(BAD_OF_AGENTS)
