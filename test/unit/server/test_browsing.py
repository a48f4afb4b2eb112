"""Lists, trees, comparisons and deletions over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from engram.server.browsing import browsing_router
from engram.testing.samples import seeded_random
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
    app.include_router(browsing_router(server.service))
    return app


async def saved(server: Server, name: str, **place: Any) -> str:
    result = await server.service.save(tenant="", conversation_id=name, **place)
    return result.snapshot_id


async def get(app: FastAPI, path: str, status: int = 200, method: str = "GET") -> dict[str, Any]:
    async with client_of(app) as client:
        response = await client.request(method, path)
    body: dict[str, Any] = response.json()
    assert response.status_code == status, body
    assert body["success"] is (status == 200)
    return body


async def pages(app: FastAPI, path: str, name: str, limit: int) -> list[list[dict[str, Any]]]:
    found, after = [], ""
    while True:
        body = await get(app, f"{path}limit={limit}{after}")
        found.append(body[name])
        if body["after"] is None:
            return found
        after = f"&after={body['after']}"


@on_a_loop
async def test_conversations_come_in_pages(server: Server, app: FastAPI) -> None:
    names = [f"c-{n}" for n in range(5)]
    for name in names:
        await server.chat(name, turns=2)
        await saved(server, name, turn_number=1)
        await saved(server, name)
    found = await pages(app, "/v1/conversations?", "conversations", 2)
    assert [[one["conversation_id"] for one in page] for page in found] == [
        ["c-0", "c-1"],
        ["c-2", "c-3"],
        ["c-4"],
    ]
    one = found[0][0]
    assert (one["snapshots"], one["branches"], one["newest_turn"]) == (2, 1, 2)
    described = await get(app, "/v1/conversations/c-0")
    assert {**one, "success": True, "priority": 50} == described
    await server.service.set_priority("", "c-0", 70)
    assert (await get(app, "/v1/conversations/c-0"))["priority"] == 70
    assert (await get(app, "/v1/conversations?limit=5"))["after"] is None


@on_a_loop
async def test_bytes_of_a_conversation_are_those_of_its_files(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=3)
    for turn in (1, 2, 3):
        await saved(server, "a", turn_number=turn)
    await saved(server, "a", turn_number=2, branch_name="b")
    found = await get(app, "/v1/conversations/a")
    assert found["bytes"] == sum(one.bytes for one in server.store.iter_segments())


@on_a_loop
async def test_snapshots_come_in_pages_and_by_branch(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=3)
    names = [await saved(server, "a", turn_number=turn) for turn in (1, 2, 3)]
    branch = await saved(server, "a", turn_number=2, branch_name="b")
    await server.chat("other")
    other = await saved(server, "other")
    found = await pages(app, "/v1/snapshots?", "snapshots", 3)
    assert [one["snapshot_id"] for page in found for one in page] == [*names, branch, other]
    assert [len(page) for page in found] == [3, 2]
    of_a = await get(app, "/v1/snapshots?conversation_id=a&branch=b")
    assert [one["snapshot_id"] for one in of_a["snapshots"]] == [branch]
    assert "fill_ids" not in of_a["snapshots"][0]
    assert (await get(app, "/v1/snapshots?conversation_id=nobody"))["snapshots"] == []


@on_a_loop
async def test_a_tree_has_parents_before_children(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=3)
    first, second = [await saved(server, "a", turn_number=turn) for turn in (1, 2)]
    branch = await saved(server, "a", turn_number=1, branch_name="b")
    third = await saved(server, "a", turn_number=3)
    tree = await get(app, "/v1/conversations/a/tree")
    assert [one["branch_name"] for one in tree["branches"]] == ["b", "main"]
    parents = {one["snapshot_id"]: one["parent_snapshot"] for one in tree["snapshots"]}
    assert parents == {first: None, second: first, third: second, branch: first}
    order = list(parents)
    assert all(
        parent is None or order.index(parent) < order.index(own) for own, parent in parents.items()
    )
    assert order == [first, second, third, branch]


@on_a_loop
async def test_one_snapshot_and_its_tokens(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("a")
    name = await saved(server, "a")
    found = (await get(app, f"/v1/snapshots/{name}"))["metadata"]
    assert found["fill_ids"] == tokens
    assert (found["tier"], found["damaged"]) == ("vram", None)


@on_a_loop
async def test_two_branches_are_compared(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=1)
    one = await saved(server, "a")
    start = (await server.service.tokens(await server.service.get("", one))).tolist()
    await server.chat("a", before=start)
    longer = await saved(server, "a")
    await server.chat("b", before=start[:-2])
    other = await saved(server, "b")
    found = await get(app, f"/v1/snapshots/{one}/compare?to={longer}")
    assert found["common_tokens"] == len(start)
    manifests = [server.store.get_manifest(name) for name in (one, longer)]
    files = [
        {
            (rank, ref.segment_id): ref.bytes
            for rank, chain in enumerate(m.segments)
            for ref in chain
        }
        for m in manifests
    ]
    both = set(files[0]) & set(files[1])
    assert both
    assert found["shared_bytes"] == sum(files[0][file] for file in both)
    apart = await get(app, f"/v1/snapshots/{one}/compare?to={other}")
    assert apart["common_tokens"] == len(start) - 2
    assert [one["snapshot_id"] for one in apart["snapshots"]] == [one, other]
    same = await get(app, f"/v1/snapshots/{one}/compare?to={one}")
    assert (same["common_tokens"], same["shared_bytes"]) == (len(start), manifests[0].bytes)


@on_a_loop
async def test_deleting_by_name(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=2)
    first, second = [await saved(server, "a", turn_number=turn) for turn in (1, 2)]
    await server.chat("b")
    kept = await saved(server, "b")
    await get(app, f"/v1/snapshots/{second}", method="DELETE")
    assert (await get(app, f"/v1/snapshots/{second}", 404))["error"] == "not_found"
    assert (await get(app, "/v1/conversations/a", method="DELETE"))["snapshots"] == 1
    for path in (f"/v1/snapshots/{first}", "/v1/conversations/a", "/v1/conversations/a/tree"):
        assert (await get(app, path, 404))["error"] == "not_found"
    left = await get(app, "/v1/snapshots")
    assert [one["snapshot_id"] for one in left["snapshots"]] == [kept]
    assert server.files() == {
        (rank, ref.segment_id)
        for rank, chain in enumerate(server.store.get_manifest(kept).segments)
        for ref in chain
    }


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("conversations?limit=0", "limit"),
        ("conversations?limit=1001", "limit"),
        ("conversations?limit=x", "limit"),
        ("conversations?surprise=1", "surprise"),
        ("conversations?after=.x", "after"),
        ("conversations?limit=1&limit=2", "limit"),
        ("snapshots?after=nonsense", ""),
        ("snapshots/x/compare", "to"),
        ("snapshots/.x", "snapshot_id"),
    ],
)
@on_a_loop
async def test_what_is_wrong_is_named(server: Server, app: FastAPI, query: str, field: str) -> None:
    await server.chat("x")
    await server.service.save(tenant="", conversation_id="x", snapshot_id="x")
    body = await get(app, f"/v1/{query}", 422)
    assert body["details"].get("field", "") == field
