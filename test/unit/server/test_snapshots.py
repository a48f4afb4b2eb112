"""Snapshots and conversations as resources, prefixes, and files that travel, over HTTP."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import FileResponse

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.errors import AlreadyExistsError, SaveQueueFullError, StoreFullError
from engram.server.prefixes import prefixes_router
from engram.server.snapshots import snapshots_router
from engram.server.tagging import HoldingMiddleware
from engram.service import prefixes as prefixes_module
from engram.testing.samples import seeded_random
from refusals import refusal
from unit.server.test_compatible import client_of
from unit.service.engine import Server, on_a_loop


class Prompts:
    """A prompt's tokens are its characters."""

    async def prefix_of_messages(self, _: Any, messages: Any, tools: Any) -> list[int]:
        return await self.prefix_of_text(_, "".join(m["content"] for m in messages) + str(tools))

    async def prefix_of_text(self, _: Any, text: str) -> list[int]:
        return [ord(one) for one in text]


def app_of(server: Server) -> FastAPI:
    app = FastAPI()
    app.include_router(snapshots_router(server.service))
    app.include_router(prefixes_router(server.service, Prompts()))
    return app


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


@pytest.fixture
def app(server: Server) -> FastAPI:
    return app_of(server)


async def ok(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert response.status_code == 200, body
    assert body["success"] is True
    return body


async def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body = refusal(response)
    assert (response.status_code, body["error"]) == (status, code), body
    return body


async def saved(server: Server, name: str, turns: int = 1) -> list[str]:
    """The ids of that many saved turns."""
    ids, tokens = [], []
    for _ in range(turns):
        tokens = await server.chat(name, before=tokens)
        ids.append((await server.service.save(tenant="", conversation_id=name)).snapshot_id)
    return ids


@on_a_loop
async def test_lists_come_in_pages(server: Server, app: FastAPI) -> None:
    ids = [*await saved(server, "a", 3), *await saved(server, "b", 2)]
    async with client_of(app) as client:
        found, after, pages = [], None, 0
        while after is not None or not pages:
            query = {"limit": 2, **({"after": after} if after else {})}
            body = await ok(await client.get("/v1/snapshots", params=query))
            found += [one["snapshot_id"] for one in body["snapshots"]]
            after, pages = body["after"], pages + 1
        assert (found, pages) == (ids, 3)
        of_a = await ok(await client.get("/v1/snapshots", params={"conversation_id": "a"}))
        assert [one["snapshot_id"] for one in of_a["snapshots"]] == ids[:3]
        first = await ok(await client.get("/v1/conversations", params={"limit": 1}))
        assert [one["conversation_id"] for one in first["conversations"]] == ["a"]
        second = await ok(await client.get("/v1/conversations", params={"after": first["after"]}))
        assert [one["conversation_id"] for one in second["conversations"]] == ["b"]
        assert second["after"] is None
        for query in ({"limit": "0"}, {"limit": "501"}, {"limit": "x"}, {"page": "1"}):
            await refused(await client.get("/v1/snapshots", params=query), 422, "invalid_request")
        await refused(
            await client.get("/v1/snapshots", params={"after": "nonsense"}), 422, "invalid_request"
        )


@on_a_loop
async def test_one_snapshot_is_saved_described_restored_and_deleted(
    server: Server, app: FastAPI
) -> None:
    tokens = await server.chat("a")
    async with client_of(app) as client:
        made = await ok(await client.post("/v1/snapshots", json={"conversation_id": "a"}))
        path = f"/v1/snapshots/{made['snapshot_id']}"
        described = (await ok(await client.get(path)))["snapshot"]
        assert described["fill_ids"] == tokens
        restored = await ok(await client.post(path + "/restore", json={}))
        assert restored["token_count"] == made["token_count"]
        body = {"create_new_request": True}
        await refused(await client.post(path + "/restore", json=body), 422, "invalid_request")
        await ok(await client.delete(path))
        for method in ("GET", "DELETE"):
            await refused(await client.request(method, path), 404, "not_found")


@on_a_loop
async def test_a_snapshot_begins_branches_and_conversations(server: Server, app: FastAPI) -> None:
    ids = await saved(server, "a", 2)
    before = server.files()
    async with client_of(app) as client:
        path = f"/v1/snapshots/{ids[0]}/branch"
        side = await ok(await client.post(path, json={"branch_name": "side"}))
        other = await ok(await client.post(path, json={"conversation_id": "b"}))
        assert (side["conversation_id"], side["branch_name"], side["turn_number"]) == (
            "a",
            "side",
            1,
        )
        assert (other["conversation_id"], other["branch_name"]) == ("b", "main")
        assert other["unique_bytes"] == side["unique_bytes"] == 0
        assert server.files() == before
        for taken in ({"branch_name": "side"}, {"conversation_id": "b"}, {"branch_name": "main"}):
            await refused(await client.post(path, json=taken), 409, "already_exists")
        await refused(await client.post(path, json={}), 422, "invalid_request")
        tree = await ok(await client.get("/v1/conversations/a/tree"))
        parents = {one["snapshot_id"]: one["parent_snapshot"] for one in tree["turns"]}
        assert parents == {ids[0]: None, ids[1]: ids[0], side["snapshot_id"]: ids[0]}
        assert [one["branch_name"] for one in tree["branches"]] == ["main", "side"]
    # Both go on from there, counted on.
    for tag in (Tag("a", "side"), Tag("b")):
        start = await server.service.recorded.start("", *tag.branch[1:], None)
        assert start.source is not None
        assert start.source.number == 1
        await server.serve([*start.source.tokens.tolist(), 1], start.tag)
        assert server.service.context.tracker.newest(tag) == 2


@on_a_loop
async def test_a_conversation_is_described_and_deleted(server: Server, app: FastAPI) -> None:
    await saved(server, "a", 2)
    await saved(server, "ab")
    await server.chat("unsaved")
    async with client_of(app) as client:
        found = await ok(await client.get("/v1/conversations/a"))
        assert (found["snapshots"], found["newest_turn"], found["priority"]) == (2, 2, 50)
        unsaved = await ok(await client.get("/v1/conversations/unsaved"))
        assert (unsaved["snapshots"], unsaved["branches"]) == (0, [])
        assert (await ok(await client.delete("/v1/conversations/a")))["snapshots"] == 2
        assert (await ok(await client.delete("/v1/conversations/unsaved")))["snapshots"] == 0
        for name in ("a", "unsaved", "none"):
            for method in ("GET", "DELETE"):
                response = await client.request(method, f"/v1/conversations/{name}")
                await refused(response, 404, "not_found")
        await ok(await client.get("/v1/conversations/ab"))
    assert {row.conversation_id for row in server.catalog.all_snapshots()} == {"ab"}
    assert (await server.service.recorded.start("", "a", None, None)).source is None


@on_a_loop
async def test_a_file_takes_a_conversation_to_another_server(
    server: Server, app: FastAPI, tmp_path: Path
) -> None:
    tokens = await server.chat("a")
    made = await server.service.save(tenant="", conversation_id="a")
    other = Server.start(tmp_path / "other", server.rng)
    try:
        async with client_of(app) as client:
            response = await client.get(f"/v1/snapshots/{made.snapshot_id}/export")
            assert response.status_code == 200
            archive = response.content
            await refused(await client.get("/v1/snapshots/none/export"), 404, "not_found")
        async with client_of(app_of(other)) as client:
            url = "/v1/snapshots/import"
            for damaged in (archive[:-1], archive[:-9] + b"x" + archive[-8:]):
                await refused(await client.post(url, content=damaged), 409, "snapshot_corrupt")
            response = await client.post(url, content=b"no archive at all")
            await refused(response, 422, "invalid_request")
            assert other.catalog.all_snapshots() == []
            body = await ok(await client.post(url, content=archive))
            assert [one["snapshot_id"] for one in body["snapshots"]] == [made.snapshot_id]
            await refused(await client.post(url, content=archive), 409, "already_exists")
            copy = await ok(await client.post(url + "?conversation_id=copy", content=archive))
            assert copy["new_bytes"] == 0
            await refused(
                await client.post(url + "?conversation_id=.a", content=archive),
                422,
                "invalid_request",
            )
        for name in ("a", "copy"):
            start = await other.service.recorded.start("", name, None, None)
            assert start.source is not None
            assert start.source.tokens.tolist() == tokens
            row = await other.service.find(tenant="", conversation_id=name)
            await other.service.restore(row)
    finally:
        other.stop()
    assert list((tmp_path / "temporary").iterdir()) == []


@on_a_loop
async def test_an_archive_on_its_way_that_finds_no_room(
    server: Server, app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [name] = await saved(server, "a")
    opened = Path.open

    def on_a_full_disk(path: Path, *args: Any, **kw: Any) -> Any:
        return opened(Path("/dev/full") if path.name == "archive" else path, *args, **kw)

    async with client_of(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", on_a_full_disk)
            for size in (10, 1 << 20):  # found when the file is closed, and while it is written
                response = await client.post("/v1/snapshots/import", content=b"x" * size)
                body = await refused(response, 507, "store_full")
                assert body["details"]["needed"] == size
        assert list((tmp_path / "temporary").iterdir()) == []
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        response = await client.post("/v1/snapshots/import", content=b"x")
        await refused(response, 500, "store_error")
        await refused(await client.get(f"/v1/snapshots/{name}/export"), 500, "store_error")


@on_a_loop
async def test_a_client_that_leaves_a_download_leaves_no_file(
    server: Server, app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the last part of a reply all that it holds is let go: here the client leaves before.
    monkeypatch.setattr(FileResponse, "chunk_size", 1000)
    [name] = await saved(server, "a")
    path = f"/v1/snapshots/{name}/export"
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
    }

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # the client says nothing more
        raise AssertionError("not here")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            assert message["more_body"]
            assert list((tmp_path / "temporary").iterdir())
            raise OSError("the client has gone")

    with pytest.raises(OSError, match="gone"):
        await HoldingMiddleware(app)(scope, receive, send)
    assert list((tmp_path / "temporary").iterdir()) == []


@on_a_loop
async def test_a_damaged_snapshot_is_not_exported(
    server: Server, app: FastAPI, tmp_path: Path
) -> None:
    [name] = await saved(server, "a")
    segment = next((tmp_path / "store" / "segments").rglob("*.seg"))
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    async with client_of(app) as client:
        await refused(await client.get(f"/v1/snapshots/{name}/export"), 409, "snapshot_corrupt")
    assert list((tmp_path / "temporary").iterdir()) == []


@on_a_loop
async def test_a_prefix_is_computed_once_and_pinned(server: Server, app: FastAPI) -> None:
    async with client_of(app) as client:
        body = {"name": "guide", "text": "You are a guide."}
        made = await ok(await client.post("/v1/prefixes", json=body))
        assert (made["token_count"], made["usable"], made["expires_at"]) == (16, True, None)
        assert server.catalog.get(made["snapshot_id"]).pinned
        again = await ok(await client.post("/v1/prefixes", json=body))
        assert again["snapshot_id"] == made["snapshot_id"]
        assert len(server.engine.generated) == 1
        await refused(
            await client.post("/v1/prefixes", json={**body, "text": "Another."}),
            409,
            "already_exists",
        )
        ids = await ok(await client.post("/v1/prefixes", json={"name": "ids", "input_ids": [1, 2]}))
        assert ids["token_count"] == 2
        listed = await ok(await client.get("/v1/prefixes", params={"limit": 1}))
        assert ([one["name"] for one in listed["prefixes"]], listed["after"]) == (
            ["guide"],
            "guide",
        )
        rest = await ok(await client.get("/v1/prefixes", params={"after": "guide"}))
        assert [one["name"] for one in rest["prefixes"]] == ["ids"]
        # A request of nobody's starts from it, also on another process.
        server = server.restart()
        await server.serve([*(ord(one) for one in body["text"]), 7, 8])
        assert len(server.engine.promoted) == 1
    async with client_of(app_of(server)) as client:
        await ok(await client.delete("/v1/prefixes/guide"))
        for method in ("GET", "DELETE"):
            await refused(await client.request(method, "/v1/prefixes/guide"), 404, "not_found")
    server.stop()


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a"},
        {"name": ".a", "text": "x"},
        {"name": "marked.a", "text": "x"},
        {"name": "a" * 241, "text": "x"},
        {"name": "a", "text": ""},
        {"name": "a", "text": "x", "input_ids": [1]},
        {"name": "a", "text": "x", "tools": []},
        {"name": "a", "input_ids": [-1]},
        {"name": "a", "messages": []},
        {"text": "x"},
    ],
)
@on_a_loop
async def test_a_malformed_prefix_is_refused(
    server: Server, app: FastAPI, body: dict[str, Any]
) -> None:
    async with client_of(app) as client:
        await refused(await client.post("/v1/prefixes", json=body), 422, "invalid_request")
    assert server.engine.generated == []


@on_a_loop
async def test_no_client_writes_to_the_conversation_of_a_prefix(
    server: Server, app: FastAPI
) -> None:
    """Else the prefix would be another one, unpinned, and the same one again refused."""
    [name] = await saved(server, "a")
    async with client_of(app) as client:
        body = {"name": "guide", "text": "You are a guide."}
        made = await ok(await client.post("/v1/prefixes", json=body))
        rid, _ = await server.serve([7, 8])
        await server.serve([7, 8, 9], rid="prefix:rid")
        archive = (await client.get(f"/v1/snapshots/{name}/export")).content
        prefix, other = f"/v1/snapshots/{made['snapshot_id']}", f"/v1/snapshots/{name}"
        generating = {"create_new_request": True, "continuation_ids": [1], "max_new_tokens": 1}
        for path, sent, field in (
            ("/v1/snapshots", {"rid": rid, "conversation_id": "prefix:b"}, "conversation_id"),
            ("/v1/snapshots", {"rid": "prefix:rid"}, "rid"),
            (
                "/v1/snapshots",
                {"conversation_id": "prefix:guide", "branch_name": "b"},
                "conversation_id",
            ),
            (f"{other}/branch", {"conversation_id": "prefix:b"}, "conversation_id"),
            (f"{prefix}/branch", {"branch_name": "b"}, "conversation_id"),
            (f"{prefix}/restore", generating, "create_new_request"),
        ):
            response = await client.post(path, json=sent)
            body_of = await refused(response, 422, "invalid_request")
            assert body_of["details"]["field"] == field, sent
        response = await client.post(
            "/v1/snapshots/import", params={"conversation_id": "prefix:b"}, content=archive
        )
        await refused(response, 422, "invalid_request")
        listed = await ok(await client.get("/v1/prefixes"))
        assert [one["name"] for one in listed["prefixes"]] == ["guide"]
        # What writes nothing there goes.
        await ok(await client.post(f"{prefix}/restore", json={}))
        await ok(await client.post(f"{prefix}/branch", json={"conversation_id": "c"}))
        again = await ok(await client.post("/v1/prefixes", json=body))
        assert again["snapshot_id"] == made["snapshot_id"]
    assert server.catalog.get(made["snapshot_id"]).pinned
    assert len(server.engine.generated) == 1


@on_a_loop
async def test_a_mark_is_kept_until_it_expires(server: Server) -> None:
    prefixes, context = server.service.prefixes, server.service.context

    async def marked(seconds: float) -> SnapshotRow:
        await prefixes.mark("", [1, 2, 3], seconds)
        await context.drain()
        (found,), _ = await prefixes.list("", 9, None)
        return found.row

    first, again = await marked(300), await marked(3600)
    assert again.snapshot_id == first.snapshot_id
    assert not again.pinned
    assert first.expires_at is not None
    assert again.expires_at is not None
    assert again.expires_at >= first.expires_at + 3000
    assert (await marked(5)).expires_at == again.expires_at


@on_a_loop
async def test_a_mark_waits_for_its_state_and_not_for_the_store(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, context, engine = server.service.prefixes, server.service.context, server.engine
    let_go = asyncio.Event()
    persist = engine.persist

    async def blocked(*args: Any) -> Any:
        await let_go.wait()
        return await persist(*args)

    monkeypatch.setattr(engine, "persist", blocked)
    for count in (1, 1, 2):
        # Another prefix is not kept waiting by the first, nor is the same one once more.
        await prefixes.mark("", [count, 2, 3], 300)
        assert len(engine.generated) == count
    assert await prefixes.list("", 9, None) == ([], None)
    let_go.set()
    await context.drain()
    assert len((await prefixes.list("", 9, None))[0]) == 2
    assert len(engine.generated) == 2


@on_a_loop
async def test_a_mark_that_cannot_be_stored_is_told_and_costs_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, context = server.service.prefixes, server.service.context

    async def failing(*args: Any) -> Any:
        raise StoreFullError("no room")

    monkeypatch.setattr(server.engine, "persist", failing)
    await prefixes.mark("", [1, 2, 3], 300)
    await context.drain()
    assert "no room" in str(context.stats)
    monkeypatch.undo()
    await prefixes.mark("", [1, 2, 3], 300)
    await context.drain()
    assert len((await prefixes.list("", 9, None))[0]) == 1


@on_a_loop
async def test_marks_are_written_one_at_a_time_and_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is held in RAM on every rank."""
    prefixes, context, engine = server.service.prefixes, server.service.context, server.engine
    monkeypatch.setattr(prefixes_module, "MAX_MARKS", 3)
    persist, running, most = engine.persist, 0, 0

    async def counted(*args: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await persist(*args)
        finally:
            running -= 1

    monkeypatch.setattr(engine, "persist", counted)
    engine.persist_gate.shut()
    for count in (1, 2, 3):
        await prefixes.mark("", [count, 2, 3], 300)
    await engine.persist_gate.reached.wait()
    with pytest.raises(SaveQueueFullError):
        await prefixes.mark("", [4, 2, 3], 300)
    await prefixes.mark("", [3, 2, 3], 300)  # on its way already
    assert len(engine.generated) == 3
    # The states of those that wait leave memory: they are computed again.
    engine.forget()
    engine.persist_gate.open.set()
    await context.drain()
    assert most == 1
    assert len((await prefixes.list("", 9, None))[0]) == 3
    assert len(engine.generated) == 5
    await prefixes.mark("", [4, 2, 3], 300)
    await context.drain()
    assert len((await prefixes.list("", 9, None))[0]) == 4


@on_a_loop
async def test_a_mark_waits_for_a_blocked_catalog_as_long_as_a_request_is_held(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server.restart(snapshot_promote_timeout=0.2)
    prefixes, context = server.service.prefixes, server.service.context
    await context.engine()
    let_go = threading.Event()
    find = server.catalog.find

    def waits(*args: Any) -> Any:
        let_go.wait(30)
        return find(*args)

    monkeypatch.setattr(server.catalog, "find", waits)
    waited = await prefixes.mark("", [1, 2, 3], 300)
    assert waited >= 0.2
    assert server.engine.generated == [], "the request computes it itself"
    let_go.set()
    await context.drain()
    assert "prefix marked with cache_control" in context.stats.last_failures[-1]
    await prefixes.mark("", [1, 2, 3], 300)
    await context.drain()
    assert len((await prefixes.list("", 9, None))[0]) == 1
    server.stop()


@pytest.mark.parametrize("marked", [False, True])
@on_a_loop
async def test_a_prefix_that_was_found_damaged_is_computed_again(
    server: Server, marked: bool
) -> None:
    async def keep(server: Server) -> SnapshotRow:
        prefixes = server.service.prefixes
        if marked:
            await prefixes.mark("", [1, 2, 3], 300)
        else:
            await prefixes.keep("", "a", [1, 2, 3])
        await server.service.context.drain()
        ((found,), _) = await prefixes.list("", 9, None)
        return found.row

    first = await keep(server)
    segment = server.store.get_manifest(first.snapshot_id).segments[0][-1].segment_id
    (file,) = (server.root / "segments").rglob(f"{segment}*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    server = server.restart()
    await server.serve([1, 2, 3, 4])
    assert server.service.context.stats.hold_failures == 1
    second = await keep(server)
    assert second.snapshot_id != first.snapshot_id
    assert second.pinned == first.pinned
    assert len(server.engine.generated) == 1
    assert (await keep(server)).snapshot_id == second.snapshot_id
    if not marked:
        with pytest.raises(AlreadyExistsError):
            await server.service.prefixes.keep("", "a", [1, 2])
    server = server.restart()
    await server.serve([1, 2, 3, 4])
    assert (len(server.engine.promoted), server.service.context.stats.hold_failures) == (1, 0)
    server.stop()


@on_a_loop
async def test_a_prefix_of_another_model_is_computed_again(server: Server) -> None:
    made = await server.service.prefixes.keep("", "a", [1, 2, 3])
    server.engine.change_weights("others")
    server.service.context.forget_engine()
    assert not (await server.service.prefixes.get("", "a")).usable
    again = await server.service.prefixes.keep("", "a", [1, 2, 3])
    assert again.row.snapshot_id != made.row.snapshot_id
    assert (await server.service.prefixes.get("", "a")).usable


def test_openapi_shows_every_route_with_an_example(app: FastAPI) -> None:
    for path, methods in app.openapi()["paths"].items():
        for method, said in methods.items():
            assert said["summary"], (method, path)
            content = said["responses"]["200"]["content"]
            assert path.endswith("/export") or "example" in content["application/json"], path
