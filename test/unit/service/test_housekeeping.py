"""What the server removes by itself, and how it makes room for a save."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engram.conversation.turns import Tag
from engram.core.tokens import to_tokens
from engram.errors import StoreError, StoreFullError
from engram.retention import RetentionPolicy, plan
from unit.service.engine import Server, on_a_loop

DAY = 86_400.0


async def saved(server: Server, conversation: str, turns: int = 1, **tag: Any) -> list[int]:
    """Turns of a conversation, each saved; all its tokens."""
    tokens: list[int] = []
    for _ in range(turns):
        tokens = await server.chat(conversation, 1, tokens, **tag)
        await server.service.save(tenant="", conversation_id=conversation, **tag)
    return tokens


async def turns(server: Server, conversation: str) -> list[int]:
    rows = await server.service.list("", conversation)
    return [row.turn_number for row in rows]


def check_store(server: Server) -> None:
    """Every snapshot has all its files, and there is no file that no snapshot names."""
    named = set()
    for row in server.catalog.all_snapshots():
        manifest = server.store.get_manifest(row.snapshot_id, row.tenant)
        for rank, chain in enumerate(manifest.segments):
            named |= {(rank, ref.segment_id) for ref in chain}
    assert server.files() == named
    assert len(server.store.list_manifests()) == len(server.catalog.all_snapshots())
    assert server.catalog.unreferenced_segments() == []


def later(server: Server, seconds: float) -> None:
    """Time goes by for the housekeeper."""
    clock = server.service.housekeeper.clock
    server.service.housekeeper.clock = lambda: clock() + seconds


@pytest.fixture
def start(tmp_path: Path, rng: Random) -> Any:
    servers: list[Server] = []

    def new(**options: Any) -> Server:
        servers.append(Server.start(tmp_path / "store", rng, **options))
        return servers[-1]

    yield new
    for server in servers:
        server.stop()


@on_a_loop
async def test_the_newest_of_each_branch_stay(start: Any) -> None:
    server = start(snapshot_retention_count=2)
    await saved(server, "a", 5)
    await saved(server, "b", 1)
    await server.service.housekeeper.round()
    assert await turns(server, "a") == [4, 5]
    assert await turns(server, "b") == [1]
    check_store(server)
    report = server.service.housekeeper.report()
    assert report["removed"] == {"count": 3}
    assert [line.split(": ")[1] for line in report["last"]] == [
        "not among the newest 2 of branch 'main'"
    ] * 3
    await server.service.housekeeper.round()
    assert server.service.housekeeper.report()["removed"] == {"count": 3}


@on_a_loop
async def test_nothing_is_planned_while_nothing_has_changed_or_come_due(start: Any) -> None:
    server = start(conversation_cold_retention=DAY)
    keeper = server.service.housekeeper
    await saved(server, "a", 2)
    for _ in range(3):
        await keeper.round()
    assert (keeper.stats.rounds, keeper.stats.plans) == (3, 1)
    await saved(server, "b", 1)
    await keeper.round()
    assert keeper.stats.plans == 2
    later(server, 2 * DAY)
    await keeper.round()
    assert keeper.stats.plans == 3
    assert keeper.stats.removed == {"cold": 3}
    check_store(server)


@on_a_loop
async def test_a_conversation_in_use_is_not_cold(start: Any) -> None:
    server = start(conversation_cold_retention=DAY)
    await saved(server, "a", 1)
    await saved(server, "b", 1)
    used = {("", "a"): server.service.housekeeper.clock() + 2 * DAY}
    server.catalog.record_use(used)
    later(server, 2 * DAY)
    await server.service.housekeeper.round()
    assert {row.conversation_id for row in server.catalog.all_snapshots()} == {"a"}


@on_a_loop
async def test_last_use_is_recorded_by_requests_and_restores(start: Any) -> None:
    server = start()
    await saved(server, "a", 1)
    row = await server.service.find(tenant="", conversation_id="a")
    await server.service.housekeeper.round()
    first = server.catalog.last_use("", "a")
    assert first is not None
    await server.service.restore(row)
    await server.service.housekeeper.round()
    second = server.catalog.last_use("", "a")
    assert second is not None
    assert second > first
    await server.serve([1, 2, 3], Tag("a"))
    await server.service.close()
    third = server.catalog.last_use("", "a")
    assert third is not None
    assert third > second


@on_a_loop
async def test_what_changed_since_the_plan_stays(start: Any) -> None:
    server = start()
    for name in "abcd":
        await saved(server, name, 2)
    service, keeper = server.service, server.service.housekeeper
    now = keeper.clock() + 100 * DAY
    cold = plan(await keeper._inventory(), RetentionPolicy(cold_retention=DAY), now)
    assert len(cold.removals) == 8
    # a is used, b pinned, c has lost one of its two.
    service.context.conversations._uses["", "a"] = now + 1
    await service.change("", (await service.list("", "b"))[0].snapshot_id, pinned=True)
    await service.delete((await service.list("", "c"))[0])
    gone, freed = await service._remover.carry_out(cold.removals, now)
    assert {r.snapshot.conversation_id for r in gone} == {"b", "c", "d"}
    assert freed
    left = {(row.conversation_id, row.turn_number) for row in server.catalog.all_snapshots()}
    assert left == {("a", 1), ("a", 2), ("b", 1)}
    check_store(server)


@on_a_loop
async def test_count_and_quota_leave_the_last_even_if_the_plan_is_old(start: Any) -> None:
    server = start()
    await saved(server, "a", 3)
    keeper = server.service.housekeeper
    old = plan(await keeper._inventory(), RetentionPolicy(keep_last=1), keeper.clock())
    assert len(old.removals) == 2
    for row in (await server.service.list("", "a"))[1:]:
        await server.service.delete(row)
    assert (await server.service._remover.carry_out(old.removals, keeper.clock()))[0] == []
    assert await turns(server, "a") == [1]


@on_a_loop
async def test_a_save_over_the_quota_makes_room(start: Any) -> None:
    server = start()
    await saved(server, "a", 3)
    one = server.catalog.counts().segment_bytes
    server.stop()
    server = start(snapshot_disk_quota_gb=1.5 * one / 1e9)
    service = server.service
    tokens = await saved(server, "b", 1)
    while await service.context.quota.used() + 100 < 1.5 * one:
        tokens = await server.chat("b", 1, tokens)
        await service.save(tenant="", conversation_id="b")
        if service.housekeeper.stats.rooms_made:
            break
    assert service.housekeeper.stats.rooms_made
    assert server.catalog.counts().segment_bytes <= 1.5 * one
    assert await service.context.quota.used() == server.catalog.counts().segment_bytes
    newest = (await service.list("", "b"))[-1]
    assert newest.turn_number == server.service.context.tracker.newest(Tag("b"))
    assert await service.list("", "a")
    check_store(server)


@on_a_loop
async def test_without_room_a_save_is_refused_and_nothing_is_removed(start: Any) -> None:
    server = start()
    await saved(server, "a", 1)
    await saved(server, "b", 1)
    one = server.catalog.counts().segment_bytes
    server.stop()
    server = start(snapshot_disk_quota_gb=(one + 10) / 1e9)
    before = server.files()
    await server.chat("c", 1)
    with pytest.raises(StoreFullError, match="at its quota") as caught:
        await server.service.save(tenant="", conversation_id="c")
    assert caught.value.http_status == 507
    assert caught.value.details == {
        "needed": caught.value.details["needed"],
        "used": one,
        "quota": one + 10,
    }
    assert int(str(caught.value.details["needed"])) > 10
    assert server.files() == before
    assert server.service.context.stats.save_failures == 1
    # Room is made by hand, and the save is asked for again.
    await server.service.delete((await server.service.list("", "a"))[0])
    await server.service.save(tenant="", conversation_id="c")
    check_store(server)


@on_a_loop
async def test_a_lowered_quota_is_kept_in_the_background(start: Any) -> None:
    server = start()
    await saved(server, "a", 4)
    one = server.catalog.counts().segment_bytes
    server.stop()
    server = start(snapshot_disk_quota_gb=0.7 * one / 1e9, snapshot_retention_count=100)
    await server.service.housekeeper.round()
    assert server.catalog.counts().segment_bytes <= 0.7 * one
    assert server.service.housekeeper.stats.over_quota_bytes == 0
    check_store(server)


@on_a_loop
async def test_a_failed_removal_is_tried_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(conversation_cold_retention=DAY, tier_cleanup_interval=0.01)
    await saved(server, "a", 3)
    before = server.files()
    later(server, 2 * DAY)
    with monkeypatch.context() as patched:

        async def refuse(*_: object) -> None:
            raise StoreError("the disk is gone")

        patched.setattr(server.engine, "drop", refuse)
        with pytest.raises(StoreError):
            await server.service.housekeeper.round()
        assert server.files() == before
        assert server.catalog.all_snapshots() == []
    await saved(server, "b", 2)
    await server.service.housekeeper.round()
    assert server.files() == set()
    check_store(server)


@on_a_loop
async def test_a_failed_round_is_counted_and_the_next_one_goes_on(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(tier_cleanup_interval=0.01)
    keeper = server.service.housekeeper

    def broken() -> None:
        raise StoreError("the catalog is busy")

    with monkeypatch.context() as patched:
        patched.setattr(server.catalog, "inventory", broken)
        server.service.start()
        while keeper.stats.failed_rounds < 2:
            await asyncio.sleep(0.01)
    rounds = keeper.stats.plans
    while keeper.stats.plans == rounds:
        await asyncio.sleep(0.01)
    await server.service.close()
    assert "clean-up: the catalog is busy" in server.service.context.stats.last_failures


@on_a_loop
async def test_switched_off_it_does_nothing(start: Any) -> None:
    server = start(enable_tier_background_cleanup=False, tier_cleanup_interval=0.001)
    server.service.start()
    await asyncio.sleep(0.05)
    await server.service.close()
    assert server.service.housekeeper.stats.rounds == 0


@on_a_loop
async def test_saves_restores_and_clean_ups_at_once(start: Any, rng: Random) -> None:
    server = start(
        snapshot_retention_count=2,
        snapshot_trigger_policy="every_turn",
        tier_cleanup_interval=0.001,
        snapshot_durability="sync",
    )
    server.service.start()
    seen = []

    async def talk(name: str) -> None:
        tokens: list[int] = []
        for _ in range(12):
            tokens = await server.chat(name, 1, tokens)
            found = await server.service.save(tenant="", conversation_id=name)
            seen.append(found.snapshot_id)
            if rng.random() < 0.3:
                row = await server.service.find(tenant="", conversation_id=name)
                await server.service.restore(row)

    await asyncio.gather(*(talk(f"conversation-{n}") for n in range(6)))
    await server.service.close()
    await server.service.housekeeper.round()
    for number in range(6):
        assert await turns(server, f"conversation-{number}") == [11, 12]
    assert server.service.context.stats.corrupt == 0
    assert server.service.housekeeper.stats.removed["count"] == len(set(seen)) - 12
    check_store(server)


@on_a_loop
async def test_priority_is_durable_and_counts(start: Any) -> None:
    server = start()
    for name in ("low", "high"):
        await saved(server, name, 3)
    await server.service.set_priority("", "high", 100)
    await server.service.set_priority("", "low", 0)
    used = server.catalog.counts().segment_bytes
    server.stop()
    server.store.catalog_path.unlink()
    server = start(snapshot_disk_quota_gb=used * 0.9 / 1e9)
    assert await server.service.context.conversations.priority("", "high") == 100
    await server.service.housekeeper.round()
    assert len(await turns(server, "high")) == 3
    assert len(await turns(server, "low")) < 3


@on_a_loop
async def test_the_priority_of_a_conversation_that_is_no_more_goes(start: Any) -> None:
    server = start(conversation_cold_retention=DAY)
    await saved(server, "a", 1)
    await server.service.set_priority("", "a", 70)
    tag = replace(Tag("b"), priority=30)
    await server.serve([1, 2, 3], tag)
    await server.service.context.drain()
    assert {r.conversation_id for r in server.store.iter_conversations()} == {"a", "b"}
    later(server, 3 * DAY)
    for _ in range(3):
        await server.service.housekeeper.round()
    assert list(server.store.iter_conversations()) == []
    assert server.catalog.last_uses() == {}


@on_a_loop
async def test_files_that_nothing_named_were_never_in_the_quota(start: Any) -> None:
    server = start(snapshot_disk_quota_gb=1.0, conversation_cold_retention=1000 * DAY)
    await saved(server, "a", 2)
    await server.service.housekeeper.round()
    service = server.service
    used = await service.context.quota.used()
    assert used == server.catalog.counts().segment_bytes
    before = server.files()
    tokens = server.random_tokens(5)
    server.engine.computed([*tokens, 1])
    server.engine._write(to_tokens(tokens))
    assert server.files() > before
    later(server, DAY)
    await service.housekeeper.round()
    assert server.files() == before
    assert await service.context.quota.used() == used


async def two_turns_worth_nothing(server: Server) -> list[int]:
    """A conversation that room is made of first, from its newest turn on; the tokens of that."""
    tokens = await saved(server, "a", 2)
    (first, _) = await server.service.list("", "a")
    await server.service.change("", first.snapshot_id, pinned=True)
    await server.service.set_priority("", "a", 0)
    await saved(server, "b", 4)
    await server.service.set_priority("", "b", 100)
    return tokens


async def quota_for(server: Server, more: int) -> None:
    used = server.catalog.counts().segment_bytes
    server.service.context.quota.limit = used + more
    server.service.context.quota.recount()


@on_a_loop
async def test_what_a_branch_begins_on_stays_while_it_is_saved(start: Any) -> None:
    """The first turn of a branch stands on the newest of main, the least valuable of all."""
    server = start(snapshot_disk_quota_gb=1.0)
    tokens = await two_turns_worth_nothing(server)
    (_, base) = await server.service.list("", "a")
    await server.chat("a", 1, tokens, branch_name="x", priority=0)
    await quota_for(server, 10)
    await server.service.save(tenant="", conversation_id="a", branch_name="x")
    assert server.service.housekeeper.stats.rooms_made == 1
    left = {row.snapshot_id for row in server.catalog.all_snapshots()}
    assert base.snapshot_id in left
    counts = server.catalog.counts()
    assert counts.segment_bytes <= server.service.context.quota.limit
    check_store(server)


@on_a_loop
async def test_the_turn_that_is_gone_on_from_stays_while_the_next_is_saved(start: Any) -> None:
    """Not the newest of its branch: an older one was restored."""
    server = start(snapshot_disk_quota_gb=1.0)
    first = await saved(server, "a", 1)
    await server.chat("a", 1, first)
    await server.service.save(tenant="", conversation_id="a")
    await server.service.set_priority("", "a", 0)
    (older, _) = await server.service.list("", "a")
    await server.chat("a", 1, first, parent_snapshot=older.snapshot_id, priority=0)
    await saved(server, "b", 4)
    await quota_for(server, 10)
    await server.service.save(tenant="", conversation_id="a")
    assert server.service.housekeeper.stats.rooms_made == 1
    assert older.snapshot_id in {row.snapshot_id for row in server.catalog.all_snapshots()}
    assert server.catalog.counts().segment_bytes <= server.service.context.quota.limit
    check_store(server)


@on_a_loop
async def test_the_quota_holds_where_room_is_made_of_what_a_save_shares(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shares rows with a save without being below it may go: then the save writes them itself,
    and has room for that too."""
    server = start(snapshot_disk_quota_gb=1.0)
    tokens = await two_turns_worth_nothing(server)
    await server.chat("a", 1, tokens, branch_name="x", priority=0)
    await quota_for(server, 10)

    async def nothing(found: Any) -> list[Any]:
        return []

    monkeypatch.setattr(server.service._saver, "_below", nothing)
    base = (await server.service.list("", "a"))[-1]
    await server.service.save(tenant="", conversation_id="a", branch_name="x")
    assert base.snapshot_id not in {row.snapshot_id for row in server.catalog.all_snapshots()}
    assert server.catalog.counts().segment_bytes <= server.service.context.quota.limit
    check_store(server)


@on_a_loop
async def test_a_save_has_room_for_what_was_removed_after_it_was_measured(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may remove what a save counts on: no policy holds that back."""
    server = start(snapshot_disk_quota_gb=1.0)
    tokens = await saved(server, "a")
    await server.chat("b", 1, tokens)
    row = await server.service.find(tenant="", conversation_id="a")
    unlinked, go_on = threading.Event(), threading.Event()
    remove = server.catalog.remove_snapshots

    def late(names: Any) -> Any:
        unlinked.set()
        go_on.wait(60)
        return remove(names)

    monkeypatch.setattr(server.catalog, "remove_snapshots", late)
    deleting = asyncio.ensure_future(server.service.delete(row))
    await asyncio.to_thread(unlinked.wait, 60)
    server.engine.persist_gate.shut()
    saving = asyncio.ensure_future(server.service.save(tenant="", conversation_id="b"))
    await asyncio.wait([saving], timeout=0.1)
    go_on.set()
    await deleting
    await server.engine.persist_gate.reached.wait()
    reserved = server.service.context.quota._reserved
    server.engine.persist_gate.open.set()
    assert (await saving).unique_bytes == reserved
    check_store(server)


@on_a_loop
async def test_what_is_saved_while_the_bytes_are_counted_is_not_missed(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(snapshot_disk_quota_gb=1.0)
    quota, count = server.service.context.quota, server.catalog.counts
    await saved(server, "a")
    await server.chat("b")
    server.engine.persist_gate.shut()
    saving = asyncio.ensure_future(server.service.save(tenant="", conversation_id="b"))
    await server.engine.persist_gate.reached.wait()
    counted, go_on = threading.Event(), threading.Event()

    def late() -> Any:
        found = count()
        counted.set()
        go_on.wait(60)
        return found

    monkeypatch.setattr(server.catalog, "counts", late)
    quota.recount()
    counting = asyncio.ensure_future(quota.used())
    await asyncio.to_thread(counted.wait, 60)
    server.engine.persist_gate.open.set()
    await saving
    go_on.set()
    assert await counting == count().segment_bytes


@on_a_loop
async def test_what_is_being_restored_stays_until_it_is_done(start: Any) -> None:
    server = start(conversation_cold_retention=DAY)
    await saved(server, "a", 1)
    await saved(server, "b", 1)
    later(server, 2 * DAY)
    row = await server.service.find(tenant="", conversation_id="a")
    server.engine.promote_gate.shut()
    restore = asyncio.ensure_future(server.service.restore(row))
    await server.engine.promote_gate.reached.wait()
    await server.service.housekeeper.round()
    assert {one.conversation_id for one in server.catalog.all_snapshots()} == {"a"}
    server.engine.promote_gate.open.set()
    assert (await restore).token_count == row.token_count
    # It was used just now by the clock of the machine, and days ago by the housekeeper's.
    await server.service.housekeeper.round()
    assert server.catalog.all_snapshots() == []
    check_store(server)
