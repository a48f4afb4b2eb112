"""Pins: what they keep in the tree under pressure, what they may hold, and what is told of it."""

from __future__ import annotations

from array import array
from random import Random

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from engram.errors import PinBudgetError
from engram.sglang_plugin.engine import SglangRanks
from unit.service.engine import on_a_loop
from unit.sglang_plugin.test_control import Wire, finished, random_tokens
from unit.sglang_plugin.tree import SLOTS, STATES, NewRank, Rank


def pressed(rank: Rank) -> None:
    """The tree must give up whatever it may."""
    rank.cache.evict(EvictParams(num_tokens=SLOTS, mamba_num=STATES))


def length(rank: Rank, tokens: list[int]) -> int:
    return rank.cache.resident(array("q", tokens), None, None).length


def pin(rank: Rank, owner: str, tokens: list[int]) -> bool:
    return rank.cache.pins.pin(owner, array("q", tokens), None, None)


def test_a_pinned_conversation_survives_pressure(rank: Rank, rng: Random) -> None:
    mine, other = random_tokens(rng, 30), random_tokens(rng, 30)
    rank.serve(mine)
    rank.serve(other)
    assert pin(rank, "mine", mine)
    pressed(rank)
    assert length(rank, other) == 0
    assert length(rank, mine) == 30
    served = rank.serve([*mine, *random_tokens(rng, 5)])
    assert (served.resident, served.loaded) == (30, 0)
    assert rank.cache.pins.unpin("mine")
    assert not rank.cache.pins.unpin("mine")
    pressed(rank)
    assert length(rank, mine) == 0
    rank.check_pools()


def test_a_pin_moves_with_its_conversation(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:20])
    pins = rank.cache.pins
    assert pin(rank, "a", tokens[:20])
    rank.serve(tokens[:40])
    assert pin(rank, "a", tokens[:40])
    assert pins.owners == ("a",)
    assert pins.pinned_bytes == 40 * pins.kv.slot_bytes + pins.states.slot_bytes
    # Not there yet: the one that is there stays.
    assert not pin(rank, "a", tokens)
    assert pins.pinned_bytes == 40 * pins.kv.slot_bytes + pins.states.slot_bytes
    pins.unpin("a")
    assert pins.pinned_bytes == 0
    rank.check_pools()


def test_what_two_share_counts_once(rank: Rank, rng: Random) -> None:
    start = random_tokens(rng, 30)
    rank.serve(start)
    ends = [[*start, *random_tokens(rng, 10)] for _ in range(2)]
    pins = rank.cache.pins
    for name, tokens in zip("ab", ends, strict=True):
        rank.serve(tokens)
        assert pin(rank, name, tokens)
    assert pins.pinned_bytes == 50 * pins.kv.slot_bytes + 2 * pins.states.slot_bytes
    pins.unpin("a")
    assert pins.pinned_bytes == 40 * pins.kv.slot_bytes + pins.states.slot_bytes
    pins.unpin("b")
    rank.check_pools()


def test_the_budget_refuses_and_keeps_what_there_is(rank: Rank, rng: Random) -> None:
    pins = rank.cache.pins
    first, second = random_tokens(rng, 30), random_tokens(rng, 30)
    rank.serve(first)
    rank.serve(second)
    one = 30 * pins.kv.slot_bytes + pins.states.slot_bytes
    pins.budget = 2 * one - 1
    assert pin(rank, "first", first)
    with pytest.raises(PinBudgetError) as caught:
        pin(rank, "second", second)
    assert caught.value.details == {"needed": one, "pinned": one, "budget": 2 * one - 1}
    assert pins.owners == ("first",)
    pins.budget = 2 * one
    assert pin(rank, "second", second)
    for name in pins.owners:
        pins.unpin(name)
    rank.check_pools()


def test_half_of_each_pool_is_for_requests(rank: Rank, rng: Random) -> None:
    pins = rank.cache.pins
    pins.budget = 1 << 40
    half = pins.states.slots // 2
    some = [random_tokens(rng, 3) for _ in range(half + 1)]
    for number, tokens in enumerate(some):
        rank.serve(tokens)
        if number < half:
            assert pin(rank, str(number), tokens)
    with pytest.raises(PinBudgetError, match="more than half of a pool"):
        pin(rank, "more", some[-1])
    pressed(rank)
    assert [length(rank, tokens) for tokens in some] == [*([3] * half), 0]
    for name in pins.owners:
        pins.unpin(name)
    tokens = random_tokens(rng, SLOTS // 2 + 10)
    rank.serve(tokens)
    with pytest.raises(PinBudgetError, match="more than half of a pool"):
        pin(rank, "long", tokens)
    rank.check_pools()


def test_the_default_is_a_quarter_of_the_kv_pool(rank: Rank) -> None:
    pools = rank.linker.device_pools
    kv = sum(b.tensor.nbytes for b in pools.buffers if b.name[0] in "kv")
    assert rank.cache.pins.budget == kv // 4
    everything = sum(b.tensor.nbytes for b in pools.buffers)
    assert rank.cache.pins.report()["capacity_bytes"] == everything


def test_emptying_the_tree_ends_the_pins(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 30)
    rank.serve(tokens)
    pins = rank.cache.pins
    assert pin(rank, "a", tokens)
    rank.clear_vram()
    assert pins.owners == ()
    assert pins.report()["bytes"] == 0
    assert not pins.unpin("a")
    assert not pin(rank, "a", tokens)
    rank.serve([*tokens, 1])
    assert pin(rank, "a", [*tokens, 1])
    pins.unpin("a")
    rank.check_pools()


def test_what_is_told_is_what_the_tree_holds(rank: Rank, rng: Random) -> None:
    pins = rank.cache.pins
    for number in range(30):
        if number % 7 == 6:
            pressed(rank)
        rank.serve(random_tokens(rng, rng.randrange(2, 40)))
        report = pins.report()
        held = SLOTS - rank.slots.available_size()
        states = STATES - rank.requests.mamba_allocator.available_size()
        assert (report["tokens"], report["states"]) == (held, states)
        assert report["bytes"] == held * report["token_bytes"] + states * report["state_bytes"]


@on_a_loop
async def test_over_the_wire(new_rank: NewRank, rng: Random) -> None:
    rank = new_rank()
    tokens = random_tokens(rng, 30)
    rank.serve(tokens, rid="a")
    ranks = SglangRanks(Wire(rank).client)
    request = finished([*tokens, 7], "a")
    assert await ranks.pin(rank.namespace, request, 30, "owner")
    [stats] = await ranks.stats()
    assert stats["vram"]["pinned"] == ["owner"]
    assert await ranks.unpin("owner")
    assert not await ranks.unpin("owner")
    rank.cache.pins.budget = 5
    with pytest.raises(PinBudgetError, match="allows 5"):
        await ranks.pin(rank.namespace, request, 30, "owner")
    unknown = finished(random_tokens(rng, 9), "b")
    assert not await ranks.pin(rank.namespace, unknown, 8, "owner")


@on_a_loop
async def test_segments_leave_ram_and_come_back_from_disk(new_rank: NewRank, rng: Random) -> None:
    rank = new_rank()
    ranks = SglangRanks(Wire(rank).client)
    tokens = random_tokens(rng, 40)
    rank.serve(tokens[:20], rid="a")
    first = await ranks.persist(rank.namespace, finished([*tokens[:20], 7], "a"), 20)
    rank.serve(tokens, rid="b")
    rank.serve(random_tokens(rng, 9), rid="c")
    ram = rank.tiers.ram
    [found] = await ranks.residents(rank.namespace)
    assert {one.segment_id for one in found} == {ref.segment_id for ref in first.chains[0]}
    assert not any(one.held for one in found)
    # The unsaved turn stands on the rows of the first: they stay, its own state goes.
    before = ram.used
    every = [[one.segment_id for one in found]]
    state = next(one for one in found if one.segment_id == first.chains[0][-1].segment_id)
    assert await ranks.demote(rank.namespace, every) == state.bytes == before - ram.used
    second = await ranks.persist(rank.namespace, finished([*tokens, 7], "b"), 40)
    ids = {ref.segment_id for ref in (*first.chains[0], *second.chains[0])}
    assert await ranks.demote(rank.namespace, [list(ids)]) > 0
    assert [one for one in (await ranks.residents(rank.namespace))[0]] == []  # noqa: C416
    left = sum(node.nbytes for node in [*ram._unwanted, *ram._wanted])
    assert ram.used == left > 0, "what is on no disk stays"
    [stats] = await ranks.stats()
    assert (stats["ram_bytes"], stats["demoted"]) == (left, 4)
    rank.clear_vram()
    brought = await ranks.promote(
        rank.namespace, second.chains, owner="x", seconds=9, exact=True, timeout=60
    )
    assert brought.source_tier == "disk"
    [held] = await ranks.residents(rank.namespace)
    assert all(one.held for one in held)
    assert await ranks.demote(rank.namespace, [list(ids)]) == 0, "it is leased"
    assert rank.serve([*tokens, 1]).loaded == 40
