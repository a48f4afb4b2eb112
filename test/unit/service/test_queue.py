"""Backpressure: how many saves write, who waits, who is refused and what is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.errors import NotFoundError, SaveQueueFullError
from engram.service import automatic as automatic_module
from engram.service import queue as queue_module
from engram.service.queue import SAVES_AT_ONCE, SaveQueue, Ticket
from unit.service.engine import Server, on_a_loop

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path, rng: Random) -> Iterator[Start]:
    made: list[Server] = []

    def new(**options: object) -> Server:
        made.append(Server.start(tmp_path / "store", rng, **options))
        return made[-1]

    yield new
    for server in made:
        server.stop()


async def turns_saved(server: Server, conversation_id: str) -> list[int]:
    try:
        return [row.turn_number for row in await server.service.list("", conversation_id)]
    except NotFoundError:
        return []


def admitted(*tickets: Ticket) -> list[bool]:
    return [ticket.ready for ticket in tickets]


@on_a_loop
async def test_few_write_and_those_asked_for_go_first() -> None:
    queue = SaveQueue()
    running = [queue.ask_behind() for _ in range(SAVES_AT_ONCE)]
    automatic, first, second = queue.ask_behind(), queue.ask(), queue.ask()
    assert all(admitted(*running))
    assert admitted(automatic, first, second) == [False, False, False]
    assert (queue.running, queue.waiting) == (SAVES_AT_ONCE, 2)
    running[0].__exit__(None, None, None)
    assert admitted(automatic, first, second) == [False, True, False]
    second.__exit__(None, None, None)  # gone before its turn came
    running[1].__exit__(None, None, None)
    assert admitted(automatic) == [True]
    first.__exit__(None, None, None)
    automatic.__exit__(None, None, None)
    assert (queue.running, queue.waiting) == (0, 0)


@on_a_loop
async def test_too_many_that_wait_are_refused_and_say_so(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "MAX_WAITING_SAVES", 3)
    server = start()
    save = server.service.save
    for number in range(7):
        await server.chat(f"c{number}")
    server.engine.persist_gate.shut()
    asked = [asyncio.ensure_future(save(tenant="", conversation_id=f"c{n}")) for n in range(4)]
    while server.service.context.saves.waiting < 2:
        await asyncio.sleep(0.01)
    later = await save(tenant="", conversation_id="c4", durability="async")
    assert later.durability == "async", "there is room in the queue"
    for durability in ("sync", "async"):
        with pytest.raises(SaveQueueFullError) as caught:
            await save(tenant="", conversation_id="c5", durability=durability)  # type: ignore[arg-type]
        assert caught.value.details == {"waiting": 3, "limit": 3}
        assert caught.value.hint
    stats = server.service.context.stats
    assert (stats.refused_saves, stats.save_failures) == (2, 1)
    queues = (await server.service.stats())["queues"]
    assert (queues["saves_running"], queues["saves_waiting"]) == (2, 3)
    _, tokens = await server.serve(server.random_tokens(5), Tag("c6"))
    assert tokens, "serving goes on"
    server.engine.persist_gate.open.set()
    await asyncio.gather(*asked)
    await server.service.context.drain()
    saved = [await turns_saved(server, f"c{n}") for n in range(6)]
    assert saved == [[1]] * 5 + [[]]
    await save(tenant="", conversation_id="c5")
    assert await turns_saved(server, "c5") == [1]


@on_a_loop
async def test_what_is_saved_already_needs_no_place(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    await server.chat("c")
    first = await server.service.save(tenant="", conversation_id="c")
    monkeypatch.setattr(queue_module, "MAX_WAITING_SAVES", 0)
    again = await server.service.save(tenant="", conversation_id="c")
    assert (again.snapshot_id, again.existing) == (first.snapshot_id, True)
    branch = await server.service.save(
        tenant="", conversation_id="c", branch_name="try", turn_number=1
    )
    assert branch.unique_bytes == 0, "a branch writes no state"


@on_a_loop
async def test_an_asynchronous_save_of_a_turn_under_way_answers_at_once(start: Start) -> None:
    server = start(snapshot_trigger_policy="every_turn")
    server.engine.persist_gate.shut()
    await server.chat("c")
    await server.engine.persist_gate.reached.wait()
    result = await server.service.save(tenant="", conversation_id="c", durability="async")
    assert result.durability == "async"
    server.engine.persist_gate.open.set()
    await server.service.context.drain()
    [row] = await server.service.list("", "c")
    assert row.snapshot_id == result.snapshot_id


@pytest.mark.parametrize("aborted", [False, True])
@on_a_loop
async def test_an_acknowledged_save_whose_state_leaves_ram_is_computed_again_or_told(
    start: Start, aborted: bool
) -> None:
    """What waits is not held in RAM: the promise is kept all the same, or its end is to be seen."""
    server = start()
    server.engine.persist_gate.shut()
    for number in range(SAVES_AT_ONCE + 1):
        await server.chat(f"c{number}")
    promised = [
        await server.service.save(tenant="", conversation_id=f"c{number}", durability="async")
        for number in range(SAVES_AT_ONCE + 1)
    ]
    await server.engine.persist_gate.reached.wait()
    server.engine.forget()
    server.engine.abort = "the queue is full" if aborted else None
    server.engine.persist_gate.open.set()
    await server.service.context.drain()
    stats = server.service.context.stats
    found = {row.snapshot_id for n in range(len(promised)) for row in await listed(server, n)}
    gone = {one.snapshot_id for one in promised} - found
    if not aborted:
        assert not gone
        assert stats.recomputed_saves > 0
    else:
        assert stats.save_failures == len(gone) > 0
        told = " ".join(stats.last_failures)
        assert all(snapshot_id in told for snapshot_id in gone)


async def listed(server: Server, number: int) -> list[SnapshotRow]:
    try:
        return list(await server.service.list("", f"c{number}"))
    except NotFoundError:
        return []


@on_a_loop
async def test_what_waits_is_told_to_the_ranks_and_what_does_not_is_not(start: Start) -> None:
    """So that its state does not leave RAM before what nobody asked to keep."""
    server = start(snapshot_trigger_policy="every_turn")
    server.engine.persist_gate.shut()
    for rid in ("one", "two", "waits"):
        await server.serve(server.random_tokens(5), Tag(rid), rid=rid)
    await server.serve(server.random_tokens(5), rid="asked")
    asked = asyncio.ensure_future(server.service.save(tenant="", rid="asked"))
    while len(server.engine.located) < 2:
        await asyncio.sleep(0.01)
    assert sorted(server.engine.located) == ["asked", "waits"]
    server.engine.persist_gate.open.set()
    await asked
    await server.service.close()
    assert sorted(server.engine.located) == ["asked", "waits"]


# ---- automatic saves ----


@on_a_loop
async def test_an_older_turn_gives_way_to_a_newer_one_and_last_turns_to_none(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_module, "MAX_WAITING_TURNS", 4)
    server = start(snapshot_trigger_policy="every_turn")
    server.engine.persist_gate.shut()
    await server.chat("x")
    await server.chat("y")
    while server.service.context.saves.running < 2:
        await asyncio.sleep(0)
    queues = server.service.stats
    tokens = await server.chat("a", turns=3)
    await server.chat("b")
    assert (await queues())["queues"]["automatic_saves_waiting"] == 4
    tokens = await server.chat("a", before=tokens)  # a1 gives way to a4
    await server.chat("c")  # a2 gives way, which a3 contains
    await server.chat("d")  # and a3: each branch has its last turn waiting now
    await server.chat("e")  # left out itself
    await server.chat("a", before=tokens)  # a4 gives way to a5
    stats = server.service.context.stats
    assert stats.left_out_saves == 5
    noted = [note.split(":")[0].removeprefix("automatic save of ") for note in stats.last_failures]
    assert noted == [
        "turn 1 of a/main",
        "turn 2 of a/main",
        "turn 3 of a/main",
        "turn 1 of e/main",
        "turn 4 of a/main",
    ]
    assert (await queues())["queues"]["automatic_saves_waiting"] == 4
    server.engine.persist_gate.open.set()
    await server.service.close()
    found = {name: await turns_saved(server, name) for name in "xyabcde"}
    assert found == {"x": [1], "y": [1], "a": [5], "b": [1], "c": [1], "d": [1], "e": []}
    assert (await queues())["queues"]["automatic_saves_waiting"] == 0
    saved = await server.service.save(tenant="", conversation_id="e")
    assert saved.turn_number == 1, "what was left out can still be saved by request"


@on_a_loop
async def test_a_reply_that_waits_for_its_save_is_let_go_when_that_is_left_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_module, "MAX_WAITING_TURNS", 1)
    server = start(snapshot_trigger_policy="every_turn", snapshot_durability="sync")
    server.engine.persist_gate.shut()
    for name in "xy":
        await server.chat(name)
    while server.service.context.saves.running < 2:
        await asyncio.sleep(0)
    first, tokens = await server.serve(server.random_tokens(4), Tag("a"))
    settled = asyncio.ensure_future(server.service.gate.settled(first))
    await asyncio.sleep(0)
    assert not settled.done()
    second, _ = await server.serve([*tokens, 1], Tag("a"))
    await settled
    third, _ = await server.serve(server.random_tokens(4), Tag("b"))
    await server.service.gate.settled(third)
    server.engine.persist_gate.open.set()
    await server.service.gate.settled(second)
    assert await turns_saved(server, "a") == [2]
    await server.service.close()


# ---- a catalog that does not answer ----


@on_a_loop
async def test_turns_that_finish_before_the_catalog_answers_are_numbered_later(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    tokens = await server.chat("c", turns=2)
    await server.service.save(tenant="", conversation_id="c")
    after = server.restart(snapshot_trigger_policy="every_turn", snapshot_promote_timeout=0.2)
    await after.service.context.engine()
    gate = asyncio.Event()
    in_catalog = after.service.context.in_catalog

    async def slow(*args: object, **kwargs: object) -> object:
        await gate.wait()
        return await in_catalog(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(after.service.context, "in_catalog", slow)
        rid, grown = await after.serve([*tokens, 5], Tag("c"))
        assert after.service.context.tracker.turn_of(rid) is None
        gate.set()
        await after.service.context.drain()
    stats = after.service.context.stats
    assert (stats.hold_timeouts, stats.lost_turns) == (1, 0)
    assert await turns_saved(after, "c") == [2, 3]
    row = await after.service.find(tenant="", conversation_id="c")
    assert (await after.service.tokens(row)).tolist() == grown
    after.stop()
