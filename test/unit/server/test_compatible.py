"""The five routes over HTTP: replies, refusals, and what OpenAPI says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engram.errors import StoreFullError, walk_error_classes
from engram.server import wire
from engram.server.compatible import compatible_router
from engram.server.wire import error_response
from engram.testing.samples import seeded_random
from refusals import refusal
from unit.service.engine import Server, on_a_loop

ROUTES = (
    "/save_snapshot",
    "/restore_snapshot",
    "/list_snapshots",
    "/get_snapshot_info",
    "/delete_snapshot",
)


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def server(tmp_path: Path, rng: Random) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", rng)
    yield server
    server.stop()


@pytest.fixture
def app(server: Server) -> FastAPI:
    app = FastAPI()
    app.include_router(compatible_router(server.service))
    return app


@asynccontextmanager
async def client_of(app: FastAPI) -> Any:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://engram"
    ) as client:
        yield client


@on_a_loop
async def test_a_conversation_from_save_to_delete(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("c", turns=2)
    async with client_of(app) as client:
        saved = await client.post("/save_snapshot", json={"conversation_id": "c"})
        assert saved.status_code == 200
        body = saved.json()
        assert body["success"] is True
        assert (body["turn_number"], body["token_count"]) == (2, len(tokens) - 1)
        assert (body["durability"], body["recompute_tokens"]) == ("sync", 1)
        assert "turn 2 of c/main" in body["message"]
        again = (await client.post("/save_snapshot", json={"conversation_id": "c"})).json()
        assert again["snapshot_id"] == body["snapshot_id"]
        assert "already" in again["message"]

        info = (await client.post("/get_snapshot_info", json={"conversation_id": "c"})).json()
        metadata = info["metadata"]
        assert metadata["fill_ids"] == tokens
        assert metadata["recompute_tokens"] == len(tokens) - metadata["token_count"]
        assert metadata["layer_config"] == {"num_layers": 4, "model_type": "toy"}
        assert (metadata["tier"], metadata["durability"]) == ("vram", "sync")
        listed = (await client.post("/list_snapshots", json={"conversation_id": "c"})).json()
        assert listed == {"success": True, "snapshots": [metadata]}

        restored = (await client.post("/restore_snapshot", json={"conversation_id": "c"})).json()
        assert (restored["success"], restored["verified"]) == (True, True)
        assert restored["token_count"] == len(tokens) - 1
        assert [restored[n] for n in ("rid", "output_ids", "mamba_pool_idx")] == [None] * 3
        continued = await client.post(
            "/restore_snapshot",
            json={
                "conversation_id": "c",
                "create_new_request": True,
                "continuation_ids": [5, 6],
                "max_new_tokens": 3,
                "sampling_params": {"max_new_tokens": 99, "temperature": 0.5},
                "request_id": "mine",
            },
        )
        assert continued.json()["rid"] == "mine"
        assert len(continued.json()["output_ids"]) == 3
        assert server.engine.generated[-1]["input_ids"] == [*tokens, 5, 6]
        assert server.engine.generated[-1]["params"] == {"max_new_tokens": 3, "temperature": 0.5}

        deleted = await client.post("/delete_snapshot", json={"conversation_id": "c"})
        assert deleted.json()["success"] is True
        gone = await client.post("/get_snapshot_info", json={"conversation_id": "c"})
        assert gone.status_code == 404
        assert refusal(gone)["error"] == "not_found"


@on_a_loop
async def test_an_asynchronous_save_says_so(server: Server, app: FastAPI) -> None:
    await server.chat("c")
    async with client_of(app) as client:
        body = {"conversation_id": "c", "durability": "async", "snapshot_id": "mine"}
        saved = (await client.post("/save_snapshot", json=body)).json()
        assert (saved["durability"], saved["bytes"], saved["snapshot_id"]) == (
            "async",
            None,
            "mine",
        )
        assert "is being saved" in saved["message"]
        await server.service.context.drain()
        info = await client.post("/get_snapshot_info", json={"conversation_id": "c"})
        assert info.json()["metadata"]["snapshot_id"] == "mine"


ID = "conversation_id"
GO_ON = {ID: "c", "create_new_request": True, "continuation_ids": [1], "max_new_tokens": 1}
HOSTILE: list[tuple[str, Any, str]] = [
    *((route, {ID: value}, ID) for route in ROUTES for value in ("", ".hidden", "a/b", "a\n", 5)),
    *((route, {ID: value}, ID) for route in ROUTES for value in ("x" * 256, "é", None, ["c"], {})),
    *((route, {ID: "c", "unknown": 1}, "unknown") for route in ROUTES),
    *((route, {ID: "c", "__proto__": {}}, "__proto__") for route in ROUTES),
    *(
        (route, {ID: "c", "turn_number": value}, "turn_number")
        for route in ("/save_snapshot", "/restore_snapshot", "/get_snapshot_info")
        for value in (0, -1, 1.5, "1", True, [1], 2**63, 10**40)
    ),
    *(
        (route, {ID: "c", "branch_name": value}, "branch_name")
        for route in ("/save_snapshot", "/restore_snapshot", "/delete_snapshot")
        for value in ("", "../main", 7, "a b")
    ),
    ("/save_snapshot", {}, ID),
    ("/restore_snapshot", {}, ID),
    ("/list_snapshots", {}, ID),
    ("/get_snapshot_info", {}, ID),
    ("/delete_snapshot", {"rid": "r"}, ID),
    ("/save_snapshot", {"rid": ""}, "rid"),
    ("/save_snapshot", {"rid": "r" * 256}, "rid"),
    ("/save_snapshot", {"rid": 5}, "rid"),
    ("/save_snapshot", {ID: "c", "snapshot_id": "../x"}, "snapshot_id"),
    ("/save_snapshot", {ID: "c", "durability": "eventually"}, "durability"),
    ("/save_snapshot", {ID: "c", "durability": None}, "durability"),
    ("/restore_snapshot", {ID: "c", "create_new_request": "yes"}, "create_new_request"),
    ("/restore_snapshot", {ID: "c", "create_new_request": 1}, "create_new_request"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": []}, "continuation_ids"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": [1, -1]}, "continuation_ids.1"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": [2**32]}, "continuation_ids.0"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": [1.0]}, "continuation_ids.0"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": [True]}, "continuation_ids.0"),
    ("/restore_snapshot", {**GO_ON, "continuation_ids": "abc"}, "continuation_ids"),
    ("/restore_snapshot", {**GO_ON, "max_new_tokens": 0}, "max_new_tokens"),
    ("/restore_snapshot", {**GO_ON, "sampling_params": []}, "sampling_params"),
    ("/restore_snapshot", {**GO_ON, "request_id": ""}, "request_id"),
]


@pytest.mark.parametrize(("route", "body", "field"), HOSTILE, ids=str)
def test_a_body_that_is_not_right_names_the_field(
    app: FastAPI, server: Server, route: str, body: Any, field: str
) -> None:
    @on_a_loop
    async def ask() -> None:
        async with client_of(app) as client:
            reply = await client.post(route, json=body)
        assert reply.status_code == 422, reply.text
        answer = refusal(reply)
        assert answer["error"] == "invalid_request"
        assert answer["details"]["field"] == field

    ask()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({ID: "c", "create_new_request": True}, "continuation_ids and max_new_tokens"),
        ({ID: "c", "create_new_request": True, "max_new_tokens": 1}, "continuation_ids"),
        ({ID: "c", "continuation_ids": [1]}, "continuation_ids"),
        ({ID: "c", "max_new_tokens": 1}, "max_new_tokens"),
        ({ID: "c", "sampling_params": {}}, "sampling_params"),
        ({ID: "c", "request_id": "r"}, "request_id"),
    ],
    ids=str,
)
def test_a_continuation_is_whole_or_absent(app: FastAPI, body: Any, named: str) -> None:
    @on_a_loop
    async def ask() -> None:
        async with client_of(app) as client:
            reply = await client.post("/restore_snapshot", json=body)
        assert reply.status_code == 422
        assert named in reply.json()["message"]

    ask()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"c"', b"\xff\xfe", b'{"conversation_id": "\\ud800"}']
)
def test_what_is_no_json_object_is_refused(app: FastAPI, route: str, content: bytes) -> None:
    @on_a_loop
    async def ask() -> None:
        async with client_of(app) as client:
            reply = await client.post(route, content=content)
        assert reply.status_code == 422, reply.text
        assert refusal(reply)

    ask()


@on_a_loop
async def test_a_body_over_the_bound_is_413_and_is_not_read_to_its_end(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 1000)
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 10**6:
            sent += 600
            yield b" " * 600

    async with client_of(app) as client:
        fits = await client.post("/list_snapshots", content=b'{"conversation_id": "c"}'.ljust(1000))
        assert fits.status_code == 404
        reply = await client.post("/list_snapshots", content=endless())
    assert reply.status_code == 413
    assert refusal(reply)["error"] == "body_too_large"
    assert "1000" in reply.json()["message"]
    assert sent == 1200


@on_a_loop
async def test_an_error_of_the_store_has_its_own_status(
    server: Server, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.chat("c")

    async def full(*_: Any) -> None:
        raise StoreFullError.of(needed=5, free=1, where="the store")

    async def broken(*_: Any) -> None:
        raise ValueError("a bug")

    async with client_of(app) as client:
        monkeypatch.setattr(server.engine, "persist", full)
        reply = await client.post("/save_snapshot", json={ID: "c"})
        assert reply.status_code == 507
        assert refusal(reply)["details"] == {"needed": 5, "free": 1, "where": "the store"}
        monkeypatch.setattr(server.engine, "persist", broken)
        reply = await client.post("/save_snapshot", json={ID: "c"})
        assert reply.status_code == 500
        assert refusal(reply)


def test_every_error_has_a_reply_of_one_shape() -> None:
    for kind in walk_error_classes():
        reply = error_response(kind("what", hint="do", details={"field": "f"}))
        assert reply.status_code == kind.http_status >= 400
        assert b'"success":false' in reply.body


@on_a_loop
async def test_only_post_is_served(app: FastAPI) -> None:
    async with client_of(app) as client:
        for route in ROUTES:
            assert (await client.get(route)).status_code == 405


def test_openapi_has_the_five_routes_and_their_bodies(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    assert set(paths) == set(ROUTES)
    for route in ROUTES:
        operation = paths[route]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert "conversation_id" in schema["properties"]
        assert schema["additionalProperties"] is False
        assert operation["summary"]
        assert "parameters" not in operation
    restore = paths["/restore_snapshot"]["post"]["requestBody"]["content"]["application/json"]
    assert set(restore["schema"]["properties"]) == {
        "conversation_id",
        "rid",
        "turn_number",
        "branch_name",
        "create_new_request",
        "continuation_ids",
        "max_new_tokens",
        "sampling_params",
        "request_id",
    }


@on_a_loop
async def test_a_damaged_snapshot_does_not_hide_the_others(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("c", turns=2)
    async with client_of(app) as client:
        for turn in (1, 2):
            body = {"conversation_id": "c", "turn_number": turn}
            assert (await client.post("/save_snapshot", json=body)).status_code == 200
        rows = await server.service.list("", "c")
        newest = server.store.get_manifest(rows[1].snapshot_id).segments[0][-2]
        path = next(p for p in server.root.rglob("*") if newest.segment_id in p.name)
        path.write_bytes(path.read_bytes()[:-1])
        reply = await client.post("/list_snapshots", json={"conversation_id": "c"})
        assert reply.status_code == 200
        first, second = reply.json()["snapshots"]
        assert (first["turn_number"], first["damaged"]) == (1, None)
        assert first["fill_ids"] == tokens[: len(first["fill_ids"])]
        assert (second["turn_number"], second["fill_ids"]) == (2, None)
        assert newest.segment_id in second["damaged"]
        info = await client.post("/get_snapshot_info", json={"conversation_id": "c"})
        assert (info.status_code, refusal(info)["error"]) == (409, "snapshot_corrupt")
