"""Saving a turn: what is acknowledged, in which order it is written, and what a crash leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engram.conversation.turns import RunningRequest, Tag
from engram.core.tokens import to_tokens
from engram.errors import (
    AlreadyExistsError,
    GenerationAbortedError,
    InvalidRequestError,
    NotFoundError,
    SnapshotCorruptError,
    StoreFullError,
)
from engram.snapshot.listing import manifest_name
from engram.snapshot.manifest import encode_manifest
from engram.store.layout import Layout
from engram.testing.faults import SimulatedCrash
from engram.testing.samples import seeded_random
from engram.testing.tamper import DAMAGES
from unit.service.engine import Server, on_a_loop


@on_a_loop
async def test_a_save_acknowledges_what_it_saved(server: Server) -> None:
    tokens = await server.chat("c")
    result = await server.service.save(tenant="", conversation_id="c")
    assert (result.turn_number, result.branch_name, result.durability) == (1, "main", "sync")
    assert (result.token_count, result.recompute_tokens) == (len(tokens) - 1, 1)
    assert not result.existing
    assert not result.recomputed
    row = server.catalog.get(result.snapshot_id)
    manifest = server.store.get_manifest(result.snapshot_id)
    assert (row.turn_number, row.token_count) == (1, len(tokens) - 1)
    assert list(manifest.pending_tokens) == tokens[-1:]
    assert (await server.service.tokens(row)).tolist() == tokens
    sizes = {s.segment_id: s.bytes for s in server.store.iter_segments()}
    assert result.bytes == result.unique_bytes == sum(sizes.values())


@on_a_loop
async def test_saving_what_is_saved_returns_it(server: Server) -> None:
    await server.chat("c", turns=2)
    first = await server.service.save(tenant="", conversation_id="c", turn_number=1)
    again = await server.service.save(tenant="", conversation_id="c", turn_number=1)
    assert again.existing
    assert again.snapshot_id == first.snapshot_id
    newest = await server.service.save(tenant="", conversation_id="c")
    assert newest.turn_number == 2
    assert newest.snapshot_id != first.snapshot_id
    assert (newest.bytes or 0) > (newest.unique_bytes or 0) > 0, "turn 1 is shared"


@on_a_loop
async def test_each_turn_stands_on_the_one_before(server: Server) -> None:
    await server.chat("c", turns=3)
    saved = [
        await server.service.save(tenant="", conversation_id="c", turn_number=n) for n in (1, 3, 2)
    ]
    parents = [server.catalog.get(s.snapshot_id).parent_snapshot for s in saved]
    assert parents == [None, saved[0].snapshot_id, saved[0].snapshot_id]


@on_a_loop
async def test_simultaneous_saves_of_a_turn_save_it_once(server: Server) -> None:
    await server.chat("c")
    results = await asyncio.gather(
        *(server.service.save(tenant="", conversation_id="c") for _ in range(6))
    )
    assert len({r.snapshot_id for r in results}) == 1
    assert sorted(r.existing for r in results) == [False] + [True] * 5
    assert len(server.store.list_manifests()) == 1
    assert server.service.context.stats.saves == 1


@on_a_loop
async def test_what_cannot_be_found_says_how_it_could_be(server: Server) -> None:
    with pytest.raises(NotFoundError) as caught:
        await server.service.save(tenant="", conversation_id="session-1")
    assert "x-override-conversation-id" in caught.value.hint
    assert '"rid"' in caught.value.hint
    await server.chat("c")
    with pytest.raises(NotFoundError, match="no turn 7"):
        await server.service.save(tenant="", conversation_id="c", turn_number=7)
    with pytest.raises(NotFoundError, match="'other'"):
        await server.service.save(
            tenant="", conversation_id="c", branch_name="other", turn_number=7
        )
    with pytest.raises(NotFoundError):
        await server.service.save(tenant="t", conversation_id="c")
    with pytest.raises(InvalidRequestError):
        await server.service.save(tenant="")
    assert server.files() == set()


# ---- by the id of a request ----


@on_a_loop
async def test_an_untagged_request_is_saved_by_its_rid(server: Server) -> None:
    _, tokens = await server.serve(server.random_tokens(5), rid="r")
    adopted = await server.service.save(tenant="", rid="r", conversation_id="session-1")
    assert (adopted.conversation_id, adopted.turn_number) == ("session-1", 1)
    assert server.catalog.get(adopted.snapshot_id).rid == "r"
    again = await server.service.save(tenant="", rid="r")
    assert (again.snapshot_id, again.existing) == (adopted.snapshot_id, True)
    with pytest.raises(AlreadyExistsError, match="'session-1'"):
        await server.service.save(tenant="", rid="r", conversation_id="session-2")
    with pytest.raises(NotFoundError):
        await server.service.save(tenant="t", rid="r")
    assert len(tokens) == adopted.token_count + adopted.recompute_tokens


@on_a_loop
async def test_a_request_in_no_conversation_starts_one_under_its_own_id(server: Server) -> None:
    await server.serve(server.random_tokens(5), rid="r")
    saved = await server.service.save(tenant="", rid="r")
    assert (saved.conversation_id, saved.turn_number) == ("r", 1)


@pytest.mark.parametrize("tagged_first", [True, False], ids=["tagged", "untagged"])
@on_a_loop
async def test_a_rid_used_again_names_the_newer_request(server: Server, tagged_first: bool) -> None:
    await server.serve(server.random_tokens(5), Tag("c") if tagged_first else None, rid="r")
    first = await server.service.save(tenant="", rid="r")
    _, tokens = await server.serve(server.random_tokens(9), rid="r")
    second = await server.service.save(tenant="", rid="r", conversation_id="d")
    assert not second.existing
    assert second.snapshot_id != first.snapshot_id
    assert second.token_count + second.recompute_tokens == len(tokens)
    await server.serve(server.random_tokens(7), Tag("e"), rid="r")
    assert (await server.service.save(tenant="", rid="r")).conversation_id == "e"


@on_a_loop
async def test_a_rid_is_known_after_a_restart(server: Server) -> None:
    await server.serve(server.random_tokens(5), Tag("c"), rid="r")
    saved = await server.service.save(tenant="", rid="r")
    after = server.restart()
    again = await after.service.save(tenant="", rid="r")
    assert (again.snapshot_id, again.existing) == (saved.snapshot_id, True)
    assert (await after.service.find(tenant="", rid="r")).snapshot_id == saved.snapshot_id
    after.stop()


# ---- names ----


@on_a_loop
async def test_a_snapshot_id_names_one_turn(server: Server) -> None:
    await server.chat("c", turns=2)
    first = await server.service.save(
        tenant="", conversation_id="c", turn_number=1, snapshot_id="mine"
    )
    assert first.snapshot_id == "mine"
    same = await server.service.save(
        tenant="", conversation_id="c", turn_number=1, snapshot_id="mine"
    )
    assert same.existing
    with pytest.raises(AlreadyExistsError, match="'mine'"):
        await server.service.save(tenant="", conversation_id="c", snapshot_id="mine")
    with pytest.raises(AlreadyExistsError, match="'mine'"):
        await server.service.save(
            tenant="", conversation_id="c", snapshot_id="mine", durability="async"
        )
    assert [row.turn_number for row in await server.service.list("", "c")] == [1]


# ---- branches ----


@on_a_loop
async def test_a_branch_costs_no_state(server: Server) -> None:
    tokens = await server.chat("c", turns=2)
    origin = await server.service.save(tenant="", conversation_id="c", turn_number=1)
    await server.service.save(tenant="", conversation_id="c")
    before, generated = server.files(), len(server.engine.generated)
    branch = await server.service.save(
        tenant="", conversation_id="c", branch_name="try", turn_number=1
    )
    assert (branch.branch_name, branch.turn_number, branch.existing) == ("try", 1, False)
    assert (branch.unique_bytes, branch.bytes) == (0, origin.bytes)
    assert server.files() == before
    assert len(server.engine.generated) == generated
    row = server.catalog.get(branch.snapshot_id)
    assert row.parent_snapshot == origin.snapshot_id
    assert (await server.service.tokens(row)).tolist() == tokens[: origin.token_count + 1]
    again = await server.service.save(
        tenant="", conversation_id="c", branch_name="try", turn_number=1
    )
    assert again.existing


@on_a_loop
async def test_a_branch_counts_on_from_where_it_starts(server: Server) -> None:
    await server.chat("c", turns=3)
    start = await server.service.save(
        tenant="", conversation_id="c", branch_name="try", turn_number=2
    )
    tokens = (await server.service.tokens(server.catalog.get(start.snapshot_id))).tolist()
    await server.chat("c", before=tokens, branch_name="try")
    saved = await server.service.save(tenant="", conversation_id="c", branch_name="try")
    assert saved.turn_number == 3
    assert server.catalog.get(saved.snapshot_id).parent_snapshot == start.snapshot_id


# ---- asynchronous saves ----


@on_a_loop
async def test_an_asynchronous_save_answers_before_it_is_durable(server: Server) -> None:
    tokens = await server.chat("c")
    server.engine.persist_gate.shut()
    result = await server.service.save(
        tenant="", conversation_id="c", snapshot_id="mine", durability="async"
    )
    assert (result.durability, result.bytes, result.snapshot_id) == ("async", None, "mine")
    assert (result.token_count, result.recompute_tokens) == (len(tokens) - 1, 1)
    await server.engine.persist_gate.reached.wait()
    with pytest.raises(NotFoundError):
        server.catalog.get("mine")
    server.engine.persist_gate.open.set()
    await server.service.context.drain()
    assert server.catalog.get("mine").token_count == result.token_count


@on_a_loop
async def test_an_asynchronous_save_that_fails_is_noted(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.chat("c")

    async def full(*_: Any) -> None:
        raise StoreFullError.of(needed=5, free=1, where="the store")

    monkeypatch.setattr(server.engine, "persist", full)
    await server.service.save(
        tenant="", conversation_id="c", snapshot_id="mine", durability="async"
    )
    await server.service.context.drain()
    stats = server.service.context.stats
    assert stats.save_failures == 1
    assert "mine" in stats.last_failures[0]
    with pytest.raises(StoreFullError):
        await server.service.save(tenant="", conversation_id="c")
    assert server.store.list_manifests() == []


@on_a_loop
async def test_a_client_that_goes_away_tears_nothing(server: Server) -> None:
    await server.chat("c")
    server.engine.persist_gate.shut()
    asked = asyncio.ensure_future(server.service.save(tenant="", conversation_id="c"))
    await server.engine.persist_gate.reached.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    server.engine.persist_gate.open.set()
    await server.service.close()
    assert [row.turn_number for row in await server.service.list("", "c")] == [1]


# ---- state that is gone ----


@on_a_loop
async def test_a_state_that_is_gone_is_computed_again(server: Server) -> None:
    tokens = await server.chat("c", turns=2)
    server.engine.forget()
    saved = await server.service.save(tenant="", conversation_id="c")
    assert saved.recomputed
    assert (saved.turn_number, saved.token_count) == (2, len(tokens) - 1)
    assert server.engine.generated[-1]["input_ids"] == tokens[:-1]
    assert server.engine.generated[-1]["params"]["max_new_tokens"] == 1
    assert (await server.service.tokens(server.catalog.get(saved.snapshot_id))).tolist() == tokens
    assert server.service.context.tracker.newest(Tag("c")) == 2, "computing again is no turn"


@on_a_loop
async def test_computing_again_can_be_aborted(server: Server) -> None:
    await server.chat("c")
    server.engine.forget()
    server.engine.abort = "the queue is full"
    with pytest.raises(GenerationAbortedError, match="the queue is full"):
        await server.service.save(tenant="", conversation_id="c")
    assert server.store.list_manifests() == []
    server.engine.abort = None
    assert (await server.service.save(tenant="", conversation_id="c")).recomputed


# ---- order, and what a crash leaves ----


@on_a_loop
async def test_segments_then_manifest_then_catalog(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            events.append(name)
            return result

        monkeypatch.setattr(owner, name, call)

    noted(server.store, "put_segment")
    noted(server.store, "put_manifest")
    noted(server.catalog, "insert")
    await server.chat("c", turns=2)
    for turn in (1, 2):
        await server.service.save(tenant="", conversation_id="c", turn_number=turn)
    assert events == [*["put_segment"] * 4, "put_manifest", "insert"] * 2


@on_a_loop
async def test_a_crash_between_manifest_and_catalog_is_healed_at_the_next_start(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = await server.chat("c")

    def crash(*_: Any) -> None:
        raise SimulatedCrash("insert")

    monkeypatch.setattr(server.catalog, "insert", crash)
    with pytest.raises(SimulatedCrash):
        await server.service.save(tenant="", conversation_id="c", snapshot_id="mine")
    after = server.restart()
    assert after.catalog.report.added == 1
    row = await after.service.find(tenant="", conversation_id="c")
    assert row.snapshot_id == "mine"
    restored = await after.service.restore(row)
    assert restored.token_count == len(tokens) - 1
    await after.chat("c", before=tokens)
    assert (await after.service.save(tenant="", conversation_id="c")).turn_number == 2
    after.stop()


@on_a_loop
async def test_a_failed_row_takes_its_manifest_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.chat("c")

    def fail(*_: Any) -> None:
        raise StoreFullError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(server.catalog, "insert", fail)
        with pytest.raises(StoreFullError):
            await server.service.save(tenant="", conversation_id="c", snapshot_id="mine")
    assert server.store.list_manifests() == []
    saved = await server.service.save(tenant="", conversation_id="c", snapshot_id="mine")
    assert not saved.existing


@on_a_loop
async def test_a_crash_before_the_manifest_leaves_only_orphans(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = await server.chat("c", turns=2)
    kept = await server.service.save(tenant="", conversation_id="c", turn_number=1)

    def crash(*_: Any, **__: Any) -> None:
        raise SimulatedCrash("put_manifest")

    monkeypatch.setattr(server.store, "put_manifest", crash)
    with pytest.raises(SimulatedCrash):
        await server.service.save(tenant="", conversation_id="c")
    after = server.restart()
    assert [r.snapshot_id for r in await after.service.list("", "c")] == [kept.snapshot_id]
    row = await after.service.find(tenant="", conversation_id="c")
    assert (await after.service.tokens(row)).tolist() == tokens[: kept.token_count + 1]
    assert (await after.service.restore(row)).verified
    after.stop()


@on_a_loop
async def test_a_manifest_that_cannot_be_written_fails_the_save_alone(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server.start(tmp_path / "store", rng)
    await server.chat("c")

    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError.of(needed=5, free=1, where="the store")

    with monkeypatch.context() as patched:
        patched.setattr(server.store, "put_manifest", full)
        with pytest.raises(StoreFullError):
            await server.service.save(tenant="", conversation_id="c")
    assert server.service.context.stats.save_failures == 1
    assert not (await server.service.save(tenant="", conversation_id="c")).existing
    server.stop()


@on_a_loop
async def test_an_asynchronous_save_joins_one_under_way(server: Server) -> None:
    await server.chat("c")
    first, second = await asyncio.gather(
        server.service.save(tenant="", conversation_id="c"),
        server.service.save(tenant="", conversation_id="c", durability="async"),
    )
    assert second.snapshot_id == first.snapshot_id


@pytest.mark.parametrize("damage", ["truncated", "deleted", "emptied"])
@pytest.mark.parametrize("file", ["manifest", "segment"])
@on_a_loop
async def test_what_was_damaged_since_is_not_acknowledged_again(
    server: Server, damage: str, file: str
) -> None:
    """Neither for the turn itself nor for a branch that would start at it."""
    await server.chat("c", turns=2)
    saved = await server.service.save(tenant="", conversation_id="c")
    manifest = server.store.get_manifest(saved.snapshot_id)
    layout = Layout(server.store.root)
    path = layout.manifest(manifest_name(saved.snapshot_id, ""))
    if file == "segment":
        path = layout.segment(server.engine.shard(1), manifest.segments[1][0].segment_id)
    DAMAGES[damage](path)
    for branch in (None, "other"):
        with pytest.raises(SnapshotCorruptError) as caught:
            await server.service.save(
                tenant="", conversation_id="c", turn_number=2, branch_name=branch
            )
        assert path.stem in str(caught.value.details["file"])
        assert "save the turn again" in caught.value.hint
    assert server.service.context.stats.corrupt == 2
    row = server.catalog.get(saved.snapshot_id)
    await server.service.delete(row)


@on_a_loop
async def test_many_branches_take_no_more_room_than_one(server: Server) -> None:
    """A branch is a manifest: no state is copied, whatever its length."""
    await server.serve(server.random_tokens(8192), Tag("c"))
    first = await server.service.save(tenant="", conversation_id="c")
    before = server.files()
    for number in range(100):
        branch = await server.service.save(
            tenant="", conversation_id="c", turn_number=1, branch_name=f"b{number}"
        )
        assert (branch.unique_bytes, branch.token_count) == (0, first.token_count)
    assert server.files() == before
    assert sum(s.bytes for s in server.store.iter_segments()) == first.bytes
    assert server.catalog.counts().segment_bytes == first.bytes
    assert len(server.catalog.branches("", "c")) == 101
    names = [server.store.get_manifest(row.snapshot_id) for row in server.catalog.all_snapshots()]
    assert max(len(encode_manifest(manifest)) for manifest in names) < 4096


@on_a_loop
async def test_a_snapshot_deleted_meanwhile_is_not_taken_for_a_damaged_one(server: Server) -> None:
    await server.chat("c")
    saved = await server.service.save(tenant="", conversation_id="c")
    row = server.catalog.get(saved.snapshot_id)
    await server.service.delete(row)
    with pytest.raises(NotFoundError):
        server.service._saver.manifests.check_whole(row)
    assert server.service.context.stats.corrupt == 0


@pytest.mark.parametrize("branch", [None, "other"])
@on_a_loop
async def test_what_is_deleted_while_it_is_saved_does_not_come_back(
    tmp_path: Path, branch: str | None
) -> None:
    server = Server.start(tmp_path / "store", seeded_random(), snapshot_trigger_policy="every_turn")
    service, gate = server.service, server.engine.persist_gate
    named = {} if branch is None else {"branch_name": branch}
    await server.chat("kept")
    await server.chat("c", **named)
    await service.context.drain()
    gate.shut()
    # Being written, waiting behind it for its turn, and asked for.
    tokens = await server.chat("c", **named)
    await server.chat("c", 2, tokens, **named)
    await server.chat("kept")
    await gate.reached.wait()
    asked = asyncio.ensure_future(
        service.save(tenant="", conversation_id="c", turn_number=3, **named)
    )
    while not service.context.saves.waiting:
        await asyncio.sleep(0)
    if branch is None:
        deleting = asyncio.ensure_future(service.delete_conversation("", "c"))
    else:
        deleting = asyncio.ensure_future(service.delete_branch(Tag("c", branch)))
    while service.context.tracker.knows_conversation("", "c"):
        await asyncio.sleep(0)
    assert not deleting.done(), "a save that may be committing is waited for"
    gate.open.set()
    assert await deleting == 1
    with pytest.raises(NotFoundError, match="was deleted while its turn 3"):
        await asked
    await service.context.drain()
    assert service.context.saves.running == 0
    assert not service.context.tracker.knows_conversation("", "c")
    assert (await service.page("", "c", None, 9, None)).snapshots == ()
    assert len((await service.page("", "kept", None, 9, None)).snapshots) == 2
    # What comes next is another conversation.
    await server.chat("c", **named)
    await service.context.drain()
    assert [row.turn_number for row in (await service.page("", "c", None, 9, None)).snapshots] == [
        1
    ]
    server.stop()


@on_a_loop
async def test_a_turn_that_waits_for_its_number_is_deleted_with_its_conversation(
    server: Server,
) -> None:
    """Its branch was not asked for yet when it finished."""
    tracker = server.service.context.tracker
    for name in ("c", "d"):
        tag = Tag(name)
        tracker.begin(RunningRequest(name, to_tokens([1, 2]), tag))
        assert tracker.finish(name, [3]) is None
    tracker.forget_conversation("", "c")
    assert (tracker.unnumbered("c"), tracker.unnumbered("d")) == (None, Tag("d"))
    tracker.forget_branch(Tag("d", "other"))
    assert tracker.unnumbered("d") == Tag("d")
    tracker.forget_branch(Tag("d"))
    assert tracker.unnumbered("d") is None
