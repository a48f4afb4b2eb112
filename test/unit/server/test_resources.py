"""What clients change of snapshots and conversations, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from engram.server.resources import resources_router
from engram.testing.samples import seeded_random
from refusals import refusal
from unit.server.test_compatible import client_of
from unit.service.engine import Server, on_a_loop


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


@pytest.fixture
def app(server: Server) -> FastAPI:
    app = FastAPI()
    app.include_router(resources_router(server.service))
    return app


async def snapshot(server: Server, name: str = "c") -> str:
    await server.chat(name)
    return (await server.service.save(tenant="", conversation_id=name)).snapshot_id


@on_a_loop
async def test_pin_expiry_and_metadata_are_durable(server: Server, app: FastAPI) -> None:
    name = await snapshot(server)
    async with client_of(app) as client:

        async def patch(**fields: Any) -> dict[str, Any]:
            response = await client.patch(f"/v1/snapshots/{name}", json=fields)
            assert response.status_code == 200, response.text
            body = response.json()
            manifest = server.store.get_manifest(name)
            row = server.catalog.get(name)
            for field in ("pinned", "expires_at", "user_metadata"):
                assert body[field] == getattr(manifest, field) == getattr(row, field)
            assert isinstance(body, dict)
            return body

        assert (await patch(pinned=True))["pinned"] is True
        assert (await patch(user_metadata={"a": [1, {"b": None}]}))["pinned"] is True
        now = time.time()
        found = await patch(ttl_seconds=60)
        assert now + 60 <= found["expires_at"] <= time.time() + 60
        assert found["user_metadata"] == {"a": [1, {"b": None}]}
        assert (await patch(expires_at=5))["expires_at"] == 5.0
        assert (await patch(expires_at=None, pinned=False, user_metadata={}))["expires_at"] is None
    row = await server.service.find(tenant="", conversation_id="c")
    await server.service.restore(row)


@on_a_loop
async def test_what_expired_goes_and_what_is_pinned_stays(server: Server, app: FastAPI) -> None:
    names = [await snapshot(server, name) for name in "abc"]
    async with client_of(app) as client:
        for name, fields in zip(
            names, ({"expires_at": 5.0}, {"expires_at": 5.0, "pinned": True}, {}), strict=True
        ):
            if fields:
                await client.patch(f"/v1/snapshots/{name}", json=fields)
    await server.service.housekeeper.round()
    assert {row.snapshot_id for row in server.catalog.all_snapshots()} == set(names[1:])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, None),
        ({"pinned": 1}, "pinned"),
        ({"pinned": None}, "pinned"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": -1}, "expires_at"),
        ({"ttl_seconds": 1e300}, "ttl_seconds"),
        ({"ttl_seconds": None}, None),
        ({"ttl_seconds": 1, "expires_at": 1}, None),
        ({"user_metadata": []}, "user_metadata"),
        ({"user_metadata": {"a": "x" * 70_000}}, None),
        ({"turn_number": 3}, "turn_number"),
    ],
    ids=lambda value: str(value)[:40],
)
@on_a_loop
async def test_what_is_malformed_changes_nothing(
    server: Server, app: FastAPI, fields: dict[str, Any], field: str | None
) -> None:
    name = await snapshot(server)
    before = server.store.get_manifest(name)
    async with client_of(app) as client:
        response = await client.patch(f"/v1/snapshots/{name}", json=fields)
    assert response.status_code == 422
    assert refusal(response)["error"] == "invalid_request"
    assert refusal(response)["details"].get("field", "").split(".")[0] == (field or "")
    assert server.store.get_manifest(name) == before


@on_a_loop
async def test_what_is_unknown(server: Server, app: FastAPI) -> None:
    async with client_of(app) as client:
        for path, fields, status in (
            ("/v1/snapshots/none", {"pinned": True}, 404),
            ("/v1/snapshots/.a", {"pinned": True}, 422),
            ("/v1/conversations/none", {"priority": 80}, 404),
            ("/v1/conversations/a%20b", {"priority": 80}, 422),
        ):
            response = await client.patch(path, json=fields)
            assert (response.status_code, response.json()["success"]) == (status, False)


@on_a_loop
async def test_a_snapshot_that_was_deleted_does_not_come_back(server: Server, app: FastAPI) -> None:
    name = await snapshot(server)
    row = server.catalog.get(name)
    await server.service.delete(row)
    async with client_of(app) as client:
        assert (
            await client.patch(f"/v1/snapshots/{name}", json={"pinned": True})
        ).status_code == 404
    assert server.store.list_manifests() == []


@on_a_loop
async def test_the_priority_of_a_conversation(server: Server, app: FastAPI) -> None:
    await server.chat("c")  # not saved yet: it is known all the same
    async with client_of(app) as client:
        for priority in (0, 80, 100):
            response = await client.patch("/v1/conversations/c", json={"priority": priority})
            assert response.json()["priority"] == priority
            [record] = server.store.iter_conversations()
            assert (record.conversation_id, record.priority) == ("c", priority)
        assert (await client.patch("/v1/conversations/c", json={"priority": 50})).status_code == 200
        assert list(server.store.iter_conversations()) == []
        for bad in (101, -1, 5.5, "80", None, True):
            response = await client.patch("/v1/conversations/c", json={"priority": bad})
            assert response.status_code == 422, bad
            assert refusal(response)["details"]["field"] == "priority"
