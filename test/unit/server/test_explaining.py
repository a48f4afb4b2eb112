"""Where snapshots part and why prompts were cached, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from engram.conversation.turns import Tag
from engram.server.explaining import explaining_router
from engram.service.explaining import MAX_SERVED
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
    app.include_router(explaining_router(server.service))
    return app


async def saved(server: Server, name: str) -> str:
    return (await server.service.save(tenant="", conversation_id=name)).snapshot_id


async def get(app: FastAPI, path: str, status: int = 200) -> dict[str, Any]:
    async with client_of(app) as client:
        response = await client.get(path)
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json() if status == 200 else refusal(response)
    return body


@on_a_loop
async def test_two_snapshots_are_compared(server: Server, app: FastAPI) -> None:
    start = await server.chat("a")
    one = await saved(server, "a")
    await server.chat("a", before=start)
    longer = await saved(server, "a")
    await server.chat("b", before=start[:-2])
    other = await saved(server, "b")
    found = await get(app, f"/v1/snapshots/{one}/compare?to={longer}")
    assert found["common_tokens"] == len(start)
    files = [
        {
            (rank, ref.segment_id): ref.bytes
            for rank, chain in enumerate(server.store.get_manifest(name).segments)
            for ref in chain
        }
        for name in (one, longer)
    ]
    both = set(files[0]) & set(files[1])
    assert both
    assert found["shared_bytes"] == sum(files[0][file] for file in both)
    apart = await get(app, f"/v1/snapshots/{one}/compare?to={other}")
    assert apart["common_tokens"] == len(start) - 2
    assert [one["snapshot_id"] for one in apart["snapshots"]] == [one, other]
    same = await get(app, f"/v1/snapshots/{one}/compare?to={one}")
    manifest = server.store.get_manifest(one)
    assert (same["common_tokens"], same["shared_bytes"]) == (len(start), manifest.bytes)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("snapshots/x/compare", 422, "to"),
        ("snapshots/x/compare?to=.y", 422, "to"),
        ("snapshots/x/compare?to=x&surprise=1", 422, "surprise"),
        ("snapshots/.x/compare?to=x", 422, "snapshot_id"),
        ("snapshots/x/compare?to=nobody", 404, "nobody"),
        ("requests/nobody", 404, "nobody"),
    ],
)
@on_a_loop
async def test_what_is_wrong_is_named(
    server: Server, app: FastAPI, path: str, status: int, field: str
) -> None:
    await server.chat("x")
    await server.service.save(tenant="", conversation_id="x", snapshot_id="x")
    body = await get(app, f"/v1/{path}", status)
    assert field in (*body["details"].values(),)


@on_a_loop
async def test_requests_are_remembered_up_to_a_number(server: Server, app: FastAPI) -> None:
    gate = server.service.gate
    first, _ = await server.serve([1, 2, 3])
    gate.served.cached(first, 0, None, None)
    assert (await get(app, f"/v1/requests/{first}"))["prompt_tokens"] == 3
    for _ in range(MAX_SERVED):
        await server.serve([1])
    await get(app, f"/v1/requests/{first}", 404)


@on_a_loop
async def test_a_request_is_explained_when_it_has_finished(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("c")
    rid, _ = await server.serve([*tokens, 5], Tag("c"))
    await get(app, f"/v1/requests/{rid}", 404)
    server.service.gate.served.cached(rid, 3, 2, 1)
    found = await get(app, f"/v1/requests/{rid}")
    assert (found["turn_number"], found["cached_tokens"]) == (2, 3)
    assert (found["vram_tokens"], found["ram_tokens"]) == (2, 1)
    assert found["earlier"] == {
        "branch_name": "main",
        "turn_number": 1,
        "snapshot_id": None,
        "token_count": None,
        "tokens": len(tokens),
        "common_tokens": len(tokens),
        "difference": None,
    }


@on_a_loop
async def test_why_a_stored_prefix_was_not_used_is_told(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("c")
    await saved(server, "c")
    await server.service.context.engine()
    server.engine.promote_error = RuntimeError("the disk is on fire")
    rid, _ = await server.serve([*tokens, 5], Tag("c"))
    server.service.gate.served.cached(rid, 0, None, None)
    found = await get(app, f"/v1/requests/{rid}")
    assert "on fire" in found["problem"]
    assert (found["fetched_tokens"], found["fetched_from"]) == (0, None)


@on_a_loop
async def test_the_turn_before_is_found_however_far_back(server: Server, app: FastAPI) -> None:
    """Turns between are not saved, or were removed; numbers come from archives too."""
    tokens = await server.chat("c")
    name = await saved(server, "c")
    far = Tag("c", after_turn=10**12)
    served = server.service.gate.served
    for before in (1, 10**12 + 1):
        rid, tokens = await server.serve([*tokens, 5], far)
        served.cached(rid, 0, None, None)
        earlier = (await get(app, f"/v1/requests/{rid}"))["earlier"]
        assert earlier["turn_number"] == before
        assert earlier["snapshot_id"] == (name if before == 1 else None)
    alone, _ = await server.serve([1, 2], Tag("d", after_turn=10**12))
    served.cached(alone, 0, None, None)
    assert (await get(app, f"/v1/requests/{alone}"))["earlier"] is None
