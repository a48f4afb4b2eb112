"""Triggers carried out: which turns are saved by themselves, and that none due is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engram.conversation.turns import Tag
from engram.errors import NotFoundError, StoreFullError
from unit.service.engine import Server, on_a_loop

LONG = 3600.0

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path, rng: Random) -> Iterator[Start]:
    made: list[Server] = []

    def new(**options: Any) -> Server:
        made.append(Server.start(tmp_path / "store", rng, **options))
        return made[-1]

    yield new
    for server in made:
        server.stop()


async def saved_turns(server: Server, conversation_id: str = "c") -> list[int]:
    try:
        return [row.turn_number for row in await server.service.list("", conversation_id)]
    except NotFoundError:
        return []


@on_a_loop
async def test_every_turn_is_saved(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn")
    await server.chat("c", turns=3)
    await server.serve(server.random_tokens(4))
    await server.service.context.drain()
    assert await saved_turns(server) == [1, 2, 3]
    assert len(server.store.list_manifests()) == 3, "what is in no conversation is not saved"


@on_a_loop
async def test_every_nth_turn_is_saved(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_n_turns", snapshot_every_n_turns=2)
    await server.chat("c", turns=5)
    await server.service.close()
    assert await saved_turns(server) == [2, 4]


@pytest.mark.parametrize("policy", ["manual_only", "on_tool_call"])
@on_a_loop
async def test_manual_policies_save_nothing(start: Start, policy: str) -> None:
    server = start(snapshot_trigger_policy=policy)
    await server.chat("c", turns=3)
    await server.service.close()
    assert server.store.list_manifests() == []


@on_a_loop
async def test_the_interval_never_costs_the_last_turn(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn", snapshot_min_interval_seconds=LONG)
    tokens = await server.chat("c", turns=1)
    await asyncio.sleep(0)
    await server.chat("c", turns=3, before=tokens)
    await server.chat("d", turns=1)
    await server.service.close()
    assert await saved_turns(server) == [1, 4], "those in between give way to the last"
    assert await saved_turns(server, "d") == [1], "each conversation has its own clock"


@on_a_loop
async def test_a_deleted_turn_does_not_come_back_when_the_interval_is_over(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn", snapshot_min_interval_seconds=LONG)
    tokens = await server.chat("c")
    await server.service.context.drain()  # 1 is saved at once, 2 is put off
    await server.chat("c", before=tokens)
    assert await saved_turns(server) == [1]
    await server.service.save(tenant="", conversation_id="c", turn_number=2)
    await server.service.delete(await server.service.find(tenant="", conversation_id="c"))
    await server.service.close()
    assert await saved_turns(server) == [1]


@on_a_loop
async def test_the_interval_saves_by_itself_when_it_is_over(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn", snapshot_min_interval_seconds=0.2)
    tokens = await server.chat("c", turns=1)
    await asyncio.sleep(0)
    await server.chat("c", turns=2, before=tokens)
    await server.service.context.drain()
    assert (await saved_turns(server))[-1] == 3


@on_a_loop
async def test_a_turn_due_is_not_lost_to_a_later_one_that_is_not(start: Start) -> None:
    server = start(
        snapshot_trigger_policy="every_n_turns",
        snapshot_every_n_turns=2,
        snapshot_min_interval_seconds=LONG,
    )
    tokens = await server.chat("c", turns=2)
    await asyncio.sleep(0)
    await server.chat("c", turns=3, before=tokens)  # 4 is due, and put off; 5 is not due
    await server.service.close()
    assert await saved_turns(server) == [2, 4]


@on_a_loop
async def test_synchronous_durability_puts_nothing_off(start: Start) -> None:
    server = start(
        snapshot_trigger_policy="every_turn",
        snapshot_min_interval_seconds=LONG,
        snapshot_durability="sync",
    )
    tokens: list[int] = []
    for turn in range(1, 4):
        rid, tokens = await server.serve([*tokens, *server.random_tokens(4)], Tag("c"))
        await server.service.gate.settled(rid)
        assert await saved_turns(server) == list(range(1, turn + 1))
    await server.service.gate.settled("unknown")


@on_a_loop
async def test_a_save_that_fails_is_noted_and_the_next_one_is_tried(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(snapshot_trigger_policy="every_turn")

    async def full(*_: Any) -> None:
        raise StoreFullError.of(needed=5, free=1, where="the store")

    with monkeypatch.context() as patched:
        patched.setattr(server.engine, "persist", full)
        tokens = await server.chat("c")
        await server.service.context.drain()
    stats = server.service.context.stats
    assert (stats.save_failures, stats.saves) == (1, 0)
    assert "turn 1 of c/main" in stats.last_failures[0]
    await server.chat("c", before=tokens)
    await server.service.context.drain()
    assert await saved_turns(server) == [2]


@on_a_loop
async def test_closing_waits_for_the_saves_under_way(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn")
    server.engine.persist_gate.shut()
    await server.chat("c")
    closing = asyncio.ensure_future(server.service.close())
    await server.engine.persist_gate.reached.wait()
    assert not closing.done()
    server.engine.persist_gate.open.set()
    await closing
    assert await saved_turns(server) == [1]
