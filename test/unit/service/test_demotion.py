"""Who leaves RAM, pins in VRAM, and what the tiers are told to hold."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from engram.conversation.turns import Tag
from engram.errors import NotFoundError, PinBudgetError
from engram.service.demotion import restore_owner
from engram.service.ports import ResidentSegment
from unit.service.engine import Server, on_a_loop
from unit.service.test_housekeeping import later, saved, start  # noqa: F401


def warm_up(server: Server) -> None:
    """All files are in RAM as well."""
    for found in server.store.iter_segments():
        server.engine.warm[found.shard.rank][found.segment_id] = found.bytes


def of(server: Server, conversation: str) -> set[str]:
    """Ids of rank 0's segments that a conversation's snapshots name."""
    rows = [r for r in server.catalog.all_snapshots() if r.conversation_id == conversation]
    manifests = [server.store.get_manifest(row.snapshot_id) for row in rows]
    return {ref.segment_id for manifest in manifests for ref in manifest.segments[0]}


@on_a_loop
async def test_the_idle_leave_and_those_in_use_stay(start: Any) -> None:  # noqa: F811
    server = start(conversation_warm_timeout=1000.0, conversation_active_timeout=10.0)
    for name in "abc":
        await saved(server, name, 2)
    warm_up(server)
    before = set(server.engine.warm[0])
    later(server, 2000)
    now = server.service.housekeeper.clock()
    server.catalog.record_use({("", "b"): now - 1})
    server.engine.held = set(list(of(server, "c"))[:1])
    await server.service.housekeeper.round()
    assert set(server.engine.warm[0]) == before - of(server, "a")
    assert server.service.housekeeper.report()["demoted"] == {"idle": 1}


@on_a_loop
async def test_too_many_leave_by_use_and_priority(start: Any) -> None:  # noqa: F811
    server = start(max_warm_conversations=2)
    for name in "abcd":
        await saved(server, name, 1)
    await server.service.set_priority("", "a", 100)
    warm_up(server)
    server.engine.warm[0]["nobody's"] = 7
    later(server, 400)
    await server.service.housekeeper.round()
    left = set(server.engine.warm[0])
    assert left == of(server, "a") | of(server, "d") | {"nobody's"}
    assert server.service.housekeeper.report()["demoted"] == {"count": 2}
    assert server.files(), "nothing leaves the disk"


@on_a_loop
async def test_what_another_needs_stays(start: Any) -> None:  # noqa: F811
    server = start(conversation_warm_timeout=1000.0)
    tokens = await saved(server, "a", 1)
    await server.chat("b", 1, tokens)
    await server.service.save(tenant="", conversation_id="b")
    warm_up(server)
    later(server, 2000)
    now = server.service.housekeeper.clock()
    server.catalog.record_use({("", "b"): now - 1})
    shared = of(server, "a") & of(server, "b")
    assert shared
    await server.service.housekeeper.round()
    assert set(server.engine.warm[0]) == of(server, "b")


@on_a_loop
async def test_switched_off_nothing_leaves(start: Any) -> None:  # noqa: F811
    server = start(enable_memory_tiers=False, max_warm_conversations=1)
    for name in "ab":
        await saved(server, name, 1)
    warm_up(server)
    before = dict(server.engine.warm[0])
    later(server, 1e6)
    await server.service.housekeeper.round()
    assert server.engine.warm[0] == before


@on_a_loop
async def test_by_request(start: Any) -> None:  # noqa: F811
    server = start()
    for name in "ab":
        await saved(server, name, 2)
    warm_up(server)
    rows = await server.service.list("", "a")
    await server.service.restore(rows[-1])
    freed = await server.service.demote(rows)
    assert freed > 0
    assert set(server.engine.warm[0]) == of(server, "b")
    # The lease of the restore is over.
    assert f"snapshot:/{rows[-1].snapshot_id}" in server.engine.abandoned
    assert await server.service.demote(rows) == 0


@on_a_loop
async def test_by_request_a_restore_under_way_goes_on(start: Any) -> None:  # noqa: F811
    server = start()
    await saved(server, "a")
    row = await server.service.find(tenant="", conversation_id="a")
    server.engine.promote_gate.shut()
    restoring = asyncio.ensure_future(server.service.restore(row))
    await server.engine.promote_gate.reached.wait()
    await server.service.demote([row])
    assert server.engine.abandoned == []
    server.engine.promote_gate.open.set()
    assert (await restoring).snapshot == row
    await server.service.demote([row])
    assert server.engine.abandoned == [restore_owner(row)]


@on_a_loop
async def test_a_pin_follows_its_branch(start: Any) -> None:  # noqa: F811
    server = start()
    tokens = await server.chat("a", 1)
    with pytest.raises(NotFoundError):
        await server.service.pin(Tag("unknown"))
    assert (await server.service.pin(Tag("a"))).resident
    owner = "pin:/a/main"
    assert server.engine.pins == {owner: len(tokens) - 1}
    tokens = await server.chat("a", 1, tokens)
    await server.service.context.drain()
    assert server.engine.pins == {owner: len(tokens) - 1}
    # Over the budget it stays where it is, and that is noted.
    server.engine.pin_error = PinBudgetError("full")
    longer = await server.chat("a", 1, tokens)
    await server.service.context.drain()
    assert server.engine.pins == {owner: len(tokens) - 1}
    assert "pin of a: full" in server.service.context.stats.last_failures
    with pytest.raises(PinBudgetError):
        await server.service.pin(Tag("a"))
    server.engine.pin_error = None
    assert await server.service.unpin(Tag("a"))
    assert not await server.service.unpin(Tag("a"))
    await server.chat("a", 1, longer)
    await server.service.context.drain()
    assert server.engine.pins == {}


@on_a_loop
async def test_what_vram_does_not_hold_is_pinned_at_its_next_turn(start: Any) -> None:  # noqa: F811
    server = start()
    tokens = await saved(server, "a", 1)
    server = server.restart()
    try:
        server.engine.forget()
        assert not (await server.service.pin(Tag("a"))).resident
        tiers = await server.service.tiers()
        assert tiers["vram"]["pins"] == [
            {"conversation_id": "a", "branch_name": "main", "resident": False}
        ]
        await server.chat("a", 1, tokens)
        await server.service.context.drain()
        tiers = await server.service.tiers()
        assert tiers["vram"]["pins"][0]["resident"] is True
        files = list(server.store.iter_segments())
        assert tiers["disk"]["bytes"] == sum(found.bytes for found in files)
        assert tiers["disk"]["segments"] == len(files)
        assert tiers["disk"]["named_bytes"] == tiers["disk"]["bytes"]
    finally:
        server.stop()


@on_a_loop
async def test_a_pin_that_is_taken_away_while_it_moves_is_gone(start: Any) -> None:  # noqa: F811
    """Nobody would ever let go of it."""
    server = start()
    tokens = await server.chat("a", 1)
    await server.service.pin(Tag("a"))
    pin, begun, go_on = server.engine.pin, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> bool:
        begun.set()
        await go_on.wait()
        return bool(await pin(*args))

    server.engine.pin = slow
    await server.chat("a", 1, tokens)
    await begun.wait()
    assert await server.service.unpin(Tag("a"))
    go_on.set()
    await server.service.context.drain()
    assert server.engine.pins == {}


@on_a_loop
async def test_parts_of_one_file_are_counted_together(start: Any) -> None:  # noqa: F811
    """Several conversations may each have the beginning of a file in RAM, as far as they use it."""
    server = start(conversation_warm_timeout=1000.0)
    await saved(server, "a", 1)
    warm_up(server)
    residents = server.engine.residents

    async def in_parts(namespace: str) -> list[list[ResidentSegment]]:
        found = await residents(namespace)
        return [
            [replace(one, bytes=size, held=held) for one in some for size, held in parts]
            for some in found
        ]

    parts = [(5, True), (3, False)]
    server.engine.residents = in_parts
    warm = await server.service.context.with_engine(server.service._demoter.warm)
    assert {(one.bytes, one.held) for one in warm.segments.values()} == {(8, True)}
