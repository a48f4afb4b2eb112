"""The control plane: a rank's answers over a real tree, and the client that collects them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from engram.conversation.turns import FinishedRequest, Tag
from engram.core.tokens import to_tokens
from engram.errors import (
    CaptureLostError,
    DeadlineError,
    EngramError,
    GenerationAbortedError,
    InvalidRequestError,
    SnapshotCorruptError,
    StateUnhealthyError,
    StoreFullError,
)
from engram.server.tagging import CURRENT_TAG
from engram.sglang_plugin.chat import WAITED
from engram.sglang_plugin.control import RankClient, RankControl
from engram.sglang_plugin.engine import SglangGenerator, SglangRanks
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.messages import REQUESTS, DescribeRequest, EngramReply, StatsRequest
from unit.service.engine import on_a_loop
from unit.sglang_plugin.tree import STATE_LAYERS, NewRank, Rank, Served, ToyRequest

WAIT_S = 60


class Wire:
    """A tokenizer manager and its ranks in one process: messages are packed and unpacked."""

    def __init__(self, *ranks: Rank) -> None:
        self.loop = asyncio.get_running_loop()
        self.client = RankClient(self, len(ranks))
        self.controls = [RankControl(rank.cache, self) for rank in ranks]  # type: ignore[arg-type]
        self.silent = False

    def auto_create_handle_loop(self) -> None:
        pass

    def _dispatch_to_scheduler(self, request: Any) -> None:
        if self.silent:
            return
        data = msgspec.msgpack.encode(request)
        for control in self.controls:
            kind = type(request)
            control.handlers[kind](msgspec.msgpack.decode(data, type=kind))

    def send(self, reply: EngramReply) -> None:
        data = msgspec.msgpack.encode(reply)
        decoded = msgspec.msgpack.decode(data, type=EngramReply)
        self.loop.call_soon_threadsafe(self.client.on_reply, decoded)


def finished(tokens: list[int], rid: str = "rid-1") -> FinishedRequest:
    return FinishedRequest(rid, to_tokens(tokens), 0.0)


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(2**31) for _ in range(count)]


@on_a_loop
async def test_a_reply_that_cannot_be_written_is_an_error_of_its_caller(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(rank)
    monkeypatch.setattr(
        type(rank.linker.rank), "describe", lambda _: {"path": os.fsdecode(b"a\xff")}
    )
    with pytest.raises(EngramError, match="cannot be sent"):
        await wire.client.ask(DescribeRequest, timeout=10)
    assert rank.stats.contained_errors == 1


@on_a_loop
async def test_saved_by_one_process_and_served_by_the_next(new_rank: NewRank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    first = new_rank()
    first.serve(tokens[:20], rid="a")
    first.serve(tokens[:40], rid="b")
    ranks = SglangRanks(Wire(first).client)
    turn = finished([*tokens[:40], 7], "b")
    located = await ranks.locate(first.namespace, turn, 40)
    assert located.needed is None
    measured = await ranks.locate(first.namespace, turn, 40, measure=True)
    assert (located.boundary, located.key) == (40, page_keys(tokens[:40], 1)[-1])
    stored = await ranks.persist(first.namespace, finished([*tokens[:40], 7], "b"), 40)
    assert stored.boundary == 40
    assert [(ref.start, ref.end) for ref in stored.chains[0]] == [(0, 20), (20, 40), (40, 40)]
    assert stored.bytes == stored.unique_bytes == sum(r.bytes for r in stored.chains[0])
    assert measured.needed == stored.unique_bytes
    assert (await ranks.locate(first.namespace, turn, 40, measure=True)).needed == 0
    again = await ranks.persist(first.namespace, finished([*tokens[:40], 7], "b"), 40)
    assert (again.chains, again.unique_bytes) == (stored.chains, 0)

    second = new_rank()
    ranks = SglangRanks(Wire(second).client)
    prefix = to_tokens(tokens[:40])
    assert await ranks.tier(second.namespace, located.key, prefix) == "disk"
    brought = await ranks.promote(
        second.namespace,
        stored.chains,
        owner="x",
        seconds=9,
        exact=True,
        timeout=WAIT_S,
        tokens=prefix,
    )
    assert (brought.source_tier, brought.in_vram, brought.state_slot) == ("disk", False, None)
    assert brought.bytes == stored.bytes
    assert await ranks.tier(second.namespace, located.key, prefix) == "ram"
    assert second.serve(tokens) == Served(0, 40, False)
    second.clear_vram()
    second.serve(tokens[:40])
    assert await ranks.tier(second.namespace, located.key, prefix) == "vram"
    brought = await ranks.promote(
        second.namespace,
        stored.chains,
        owner="x",
        seconds=9,
        exact=True,
        timeout=WAIT_S,
        tokens=prefix,
    )
    assert (brought.source_tier, brought.in_vram, brought.read_bytes) == ("ram", True, 0)
    assert brought.state_slot is not None
    [stats] = await ranks.stats()
    assert stats["promoted_segments"] == 3
    assert stats["ram_bytes"] == second.tiers.ram.used


@on_a_loop
async def test_who_the_engine_is(rank: Rank) -> None:
    info = await SglangRanks(Wire(rank).client).describe()
    assert info.namespace == rank.linker.rank.namespace
    assert (info.world_size, info.page_size, info.model_type) == (1, 1, "toy")


@on_a_loop
async def test_what_only_vram_has_is_captured_when_it_is_saved(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 30)
    rank.serve(tokens, rid="r")
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[-1])
    assert boundary is not None
    for segment in reversed(boundary.chain()):
        rank.tiers.ram._evict(segment)
    ranks = SglangRanks(Wire(rank).client)
    stored = await ranks.persist(rank.namespace, finished([*tokens, 7], "r"), 30)
    assert [(ref.start, ref.end) for ref in stored.chains[0]] == [(0, 30), (30, 30)]
    rank.settle()
    rank.check_pools()


@on_a_loop
@pytest.mark.parametrize("layer", STATE_LAYERS)
async def test_a_state_with_a_nan_is_not_saved(rank: Rank, rng: Random, layer: int) -> None:
    tokens = random_tokens(rng, 30)
    request = ToyRequest("r", tokens)
    rank.admit(request)
    rank.forward(request, 0)
    slot = int(request.kv.mamba_pool_idx)
    state = rng.choice([*rank._state_buffers(layer).values()])[slot].view(-1)
    state[rng.randrange(len(state))] = float("nan")
    rank.finish(request)
    rank.settle()
    ranks = SglangRanks(Wire(rank).client)
    with pytest.raises(StateUnhealthyError, match=rf"token 30 .*\.{layer} holds a NaN"):
        await ranks.persist(rank.namespace, finished([*tokens, 7], "r"), 30)
    assert list(rank.store.iter_segments()) == []
    rank.settle()
    rank.check_pools()


@on_a_loop
async def test_what_will_be_saved_is_wanted_before_its_turn_comes(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 30)
    for end in (10, 20, 30):
        rank.serve(tokens[:end], rid=f"r{end}")

    def wanted(*, states: bool) -> list[bool]:
        keys = page_keys(tokens, 1)
        found = [rank.tiers.ram.get(keys[end - 1], states) for end in (10, 20, 30)]
        return [segment is not None and segment.wanted for segment in found]

    assert wanted(states=True) == wanted(states=False) == [False, False, False]
    ranks = SglangRanks(Wire(rank).client)
    await ranks.locate(rank.namespace, finished([*tokens[:20], 7], "r20"), 20)
    assert wanted(states=False) == [True, True, False]
    assert wanted(states=True) == [False, True, False], "a state below is no part of it"
    await ranks.persist(rank.namespace, finished([*tokens, 7], "r30"), 30)
    assert wanted(states=False) == [True, True, True]
    assert wanted(states=True) == [False, True, True]


@on_a_loop
async def test_a_promotion_that_was_given_up_takes_no_reader(
    new_rank: NewRank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, tokens = new_rank(), [random_tokens(rng, 20) for _ in range(3)]
    ranks = SglangRanks(Wire(first).client)
    stored = []
    for number, one in enumerate(tokens):
        first.serve(one, rid=f"r{number}")
        stored.append(await ranks.persist(first.namespace, finished([*one, 7], f"r{number}"), 20))
    second, go = new_rank(), threading.Event()
    read = second.store.read_segment
    monkeypatch.setattr(
        second.store, "read_segment", lambda *args: (go.wait(WAIT_S), read(*args))[1]
    )
    ranks = SglangRanks(Wire(second).client)
    asked = [
        asyncio.ensure_future(
            ranks.promote(
                second.namespace, one.chains, owner=f"o{n}", seconds=9, exact=True, timeout=WAIT_S
            )
        )
        for n, one in enumerate(stored)
    ]
    await asyncio.sleep(0)
    ranks.abandon("o2")
    with pytest.raises(DeadlineError, match="given up"):
        await asked[2]
    go.set()
    assert [one.source_tier for one in await asyncio.gather(*asked[:2])] == ["disk", "disk"]
    [stats] = await ranks.stats()
    assert (stats["promotions"], stats["promoted_segments"]) == (0, 4)


@on_a_loop
async def test_what_nobody_has_is_lost_and_says_where(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 30)
    ranks = SglangRanks(Wire(rank).client)
    for ask in (ranks.persist, ranks.locate):
        with pytest.raises(CaptureLostError) as caught:
            await ask(rank.namespace, finished([*tokens, 7], "unknown"), 30)
        assert caught.value.details == {"boundary": 30}
    rank.serve(tokens, rid="r")
    with pytest.raises(EngramError, match="not those of its state"):
        await ranks.persist(rank.namespace, finished([*reversed(tokens), 7], "r"), 30)


@on_a_loop
async def test_a_turn_shorter_than_a_page_says_why_it_cannot_be_saved(
    rank: Rank, rng: Random
) -> None:
    rank.linker.rank.page_size = 16
    ranks = SglangRanks(Wire(rank).client)
    with pytest.raises(CaptureLostError, match="9 tokens fill no page of 16") as caught:
        await ranks.persist(rank.namespace, finished(random_tokens(rng, 9), "short"), 0)
    assert "--page-size 1" in caught.value.hint
    assert caught.value.details == {"boundary": 0}


@on_a_loop
async def test_errors_of_a_rank_arrive_as_what_they_are(
    new_rank: NewRank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 30)
    rank = new_rank()
    rank.serve(tokens, rid="r")
    ranks = SglangRanks(Wire(rank).client)

    def full(*_: Any) -> str:
        raise StoreFullError.of(needed=5, free=1, where="the store")

    with monkeypatch.context() as patched:
        patched.setattr(rank.store, "put_segment", full)
        with pytest.raises(StoreFullError) as caught:
            await ranks.persist(rank.namespace, finished([*tokens, 7], "r"), 30)
    assert caught.value.details == {"needed": 5, "free": 1, "where": "the store"}
    stored = await ranks.persist(rank.namespace, finished([*tokens, 7], "r"), 30)
    await ranks.drop(rank.namespace, [[ref.segment_id for ref in chain] for chain in stored.chains])
    other = SglangRanks(Wire(new_rank()).client)
    with pytest.raises(SnapshotCorruptError, match=stored.chains[0][0].segment_id):
        await other.promote(
            rank.namespace, stored.chains, owner="x", seconds=9, exact=True, timeout=WAIT_S
        )

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(type(rank.cache), "resident", broken)
    with pytest.raises(EngramError, match="a bug of ours"):
        await ranks.tier(rank.namespace, "00" * 32, to_tokens([1]))


@on_a_loop
async def test_copies_are_let_go_of_while_the_engine_is_paused(rank: Rank, rng: Random) -> None:
    """A paused scheduler polls nothing, but requests still arrive."""
    ranks = SglangRanks(Wire(rank).client)
    await ranks.stats()
    check = rank.cache.check_hicache_events
    rank.cache.check_hicache_events = lambda: None
    rank.serve(random_tokens(rng, 30))
    assert len(rank.cache._locks) == 1
    await ranks.stats()
    assert len(rank.cache._locks) == 0
    rank.cache.check_hicache_events = check
    rank.settle()
    rank.check_pools()


@on_a_loop
async def test_every_rank_must_answer(new_rank: NewRank) -> None:
    wire = Wire(new_rank())
    wire.client = RankClient(wire, ranks=2)
    with pytest.raises(DeadlineError, match="StatsRequest"):
        await wire.client.ask(StatsRequest, timeout=0.05)
    wire.silent = True
    asked = asyncio.ensure_future(wire.client.ask(StatsRequest, timeout=WAIT_S))
    await asyncio.sleep(0)
    [call_id] = wire.client._calls
    for rank in (1, 0):
        wire.client.on_reply(EngramReply(call_id=call_id, rank=rank, result={"rank": rank}))
    assert await asked == [{"rank": 0}, {"rank": 1}], "in the order of ranks"
    assert wire.client._calls == {}
    wire.client.on_reply(EngramReply(call_id=call_id, rank=0, result={}))  # late, and no error


def test_every_request_has_a_handler(rank: Rank) -> None:
    control = RankControl(rank.cache, None)  # type: ignore[arg-type]
    assert set(control.handlers) == set(REQUESTS)


# ---- the generator ----


class Manager:
    """SGLang's front, as far as a generation goes."""

    def __init__(self, answer: Callable[[Any], dict[str, Any]]) -> None:
        self.answer = answer
        self.tags: list[Tag | None] = []
        self.waited: list[float] = []
        self.model_config = SimpleNamespace(vocab_size=1000)
        self.sampling_params_class = SamplingParams

    async def generate_request(self, request: Any, raw: Any) -> Any:
        self.tags.append(CURRENT_TAG.get())
        self.waited.append(WAITED.get())
        yield self.answer(request)


@on_a_loop
async def test_a_generation_is_tagged_and_untagged_again() -> None:
    def answer(request: Any) -> dict[str, Any]:
        meta = {"id": request.rid, "cached_tokens": 5, "finish_reason": {"type": "stop"}}
        return {"output_ids": [*request.input_ids, 9], "text": "text", "meta_info": meta}

    manager = Manager(answer)
    tag = Tag("c", parent_snapshot="s")
    ids = np.asarray([1, 2]).tolist()
    # A task of the service's has the context of some request that was held.
    WAITED.set(9.0)
    made = await SglangGenerator(manager).generate(ids, {"max_new_tokens": 1}, rid="r", tag=tag)
    assert (made.rid, made.output_ids, made.cached_tokens) == ("r", [1, 2, 9], 5)
    assert manager.tags == [tag]
    assert CURRENT_TAG.get() is None
    assert manager.waited == [0.0], "what is generated here has its own time to be held"
    assert WAITED.get() == 9.0


@on_a_loop
async def test_what_sglang_refuses_is_the_clients_fault() -> None:
    def refuse(request: Any) -> dict[str, Any]:
        raise ValueError("temperature must be non-negative")

    with pytest.raises(InvalidRequestError, match="temperature") as caught:
        await SglangGenerator(Manager(refuse)).generate([1], {"temperature": -1})
    assert caught.value.http_status == 422


@pytest.mark.parametrize(
    ("ids", "params", "field"),
    [
        ([1, 1000], {}, "continuation_ids"),
        ([1], {"max_new_tokens": 1, "heat": 0.5}, "sampling_params.heat"),
        ([1], {"top_k": 2**40}, "sampling_params.top_k"),
        ([1], {"top_k": 1.5}, "sampling_params"),
        ([1], {"temperature": "hot"}, "sampling_params"),
        ([1], {"ignore_eos": "yes"}, "sampling_params"),
        ([1], {"stop": [["a"]]}, "sampling_params"),
        ([1], {"temperature": 10**400}, "sampling_params.temperature"),
    ],
)
def test_what_would_harm_sglang_is_refused_before_it_is_asked(
    ids: list[int], params: dict[str, Any], field: str
) -> None:
    @on_a_loop
    async def ask() -> None:
        manager = Manager(lambda request: {})
        with pytest.raises(InvalidRequestError) as caught:
            await SglangGenerator(manager).generate(ids, params)
        assert caught.value.details == {"field": field}
        assert manager.tags == []

    ask()


@on_a_loop
async def test_an_abort_is_told() -> None:
    def abort(request: Any) -> dict[str, Any]:
        reason = {"type": "abort", "message": "the queue is full"}
        return {"output_ids": [], "meta_info": {"id": "r", "finish_reason": reason}}

    with pytest.raises(GenerationAbortedError, match="the queue is full"):
        await SglangGenerator(Manager(abort)).generate([1], {})
