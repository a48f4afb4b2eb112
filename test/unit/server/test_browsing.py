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


async def post(app: FastAPI, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    async with client_of(app) as client:
        response = await client.post(path, json=body)
    found: dict[str, Any] = response.json()
    assert response.status_code == status, found
    return found


@on_a_loop
async def test_a_branch_of_a_branch_and_a_conversation_of_its_own(
    server: Server, app: FastAPI
) -> None:
    tokens = await server.chat("a", turns=2)
    first = (await post(app, "/v1/snapshots", conversation_id="a", turn_number=1))["snapshot_id"]
    files = server.files()
    one = await post(app, f"/v1/snapshots/{first}/branch", branch_name="b")
    two = await post(app, f"/v1/snapshots/{one['snapshot_id']}/branch", branch_name="c")
    new = await post(
        app, f"/v1/snapshots/{two['snapshot_id']}/branch", conversation_id="n", snapshot_id="start"
    )
    assert server.files() == files
    assert (new["conversation_id"], new["branch_name"], new["turn_number"]) == ("n", "main", 1)
    assert (new["snapshot_id"], new["unique_bytes"]) == ("start", 0)
    listed = await get(app, "/v1/snapshots/start")
    assert listed["metadata"]["fill_ids"] == tokens[: new["token_count"] + 1]
    restored = await post(app, "/v1/snapshots/start/restore")
    assert (restored["snapshot_id"], restored["verified"]) == ("start", True)
    again = await post(app, f"/v1/snapshots/{first}/branch", branch_name="b")
    assert again["snapshot_id"] == one["snapshot_id"]
    # The new conversation counts on from there, also on another server.
    server = server.restart()
    try:
        await server.chat("n", before=tokens)
        assert (await server.service.save(tenant="", conversation_id="n")).turn_number == 2
    finally:
        server.stop()


@on_a_loop
async def test_a_branch_that_has_turns_is_not_started_again(server: Server, app: FastAPI) -> None:
    await server.chat("a", turns=2)
    await server.chat("n")
    first, second = [await saved(server, "a", turn_number=turn) for turn in (1, 2)]
    await saved(server, "a", turn_number=1, branch_name="b")
    path = f"/v1/snapshots/{second}/branch"
    for place in ({"branch_name": "b"}, {"branch_name": "main"}, {"conversation_id": "n"}):
        assert (await post(app, path, 409, **place))["error"] == "already_exists"
    assert (await post(app, path, 409, branch_name="c", snapshot_id=first))["error"] == (
        "already_exists"
    )
    assert (await post(app, path, 422))["details"]["field"] == "branch_name"
    assert (await get(app, "/v1/conversations/a"))["branches"] == 2


@on_a_loop
async def test_conversations_may_be_kept_apart(tmp_path: Path) -> None:
    server = Server.start(tmp_path / "apart", seeded_random(), enable_cross_session_refs=False)
    app = FastAPI()
    app.include_router(browsing_router(server.service))
    await server.chat("a")
    name = await saved(server, "a")
    refused = await post(app, f"/v1/snapshots/{name}/branch", 422, conversation_id="n")
    assert refused["error"] == "unsupported"
    await post(app, f"/v1/snapshots/{name}/branch", branch_name="b", conversation_id="a")
    server.stop()


@on_a_loop
async def test_a_restore_by_id_that_generates(server: Server, app: FastAPI) -> None:
    tokens = await server.chat("a")
    name = await saved(server, "a")
    reply = await post(
        app, f"/v1/snapshots/{name}/restore", create_new_request=True, continuation_ids=[7],
        max_new_tokens=3,
    )  # fmt: skip
    assert len(reply["output_ids"]) == 3
    assert server.engine.generated[-1]["input_ids"] == [*tokens, 7]
    wrong = await post(app, f"/v1/snapshots/{name}/restore", 422, conversation_id="a")
    assert wrong["details"]["field"] == "conversation_id"


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
