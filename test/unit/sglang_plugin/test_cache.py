"""`EngramRadixCache` and `EngramLinker` on SGLang's real radix tree, both of its cores.

Every request checks each byte it reads of its prefix, so that a test which serves has also checked
what was captured, loaded or shared before it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from engram.sglang_plugin.keys import page_keys
from unit.sglang_plugin.tree import LAYERS, STATES, NewRank, Rank, Served, ToyRequest

WAIT_S = 60


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(2**31) for _ in range(count)]


class Blocked:
    """Copies off the device that stop until they are let go."""

    def __init__(self, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        gather = rank.linker.device_pools.gather

        def slow(*args: Any) -> None:
            self.reached.set()
            assert self.go.wait(WAIT_S)
            gather(*args)

        monkeypatch.setattr(rank.linker.device_pools, "gather", slow)


def start_and_finish(rank: Rank, tokens: list[int], rid: str = "r") -> None:
    """A request served whose copy may still be running."""
    request = ToyRequest(rid, tokens)
    resident, loaded = rank.admit(request)
    rank.forward(request, resident + loaded)
    assert rank.cache.finish_external_linker_loads([request]) == []
    rank.finish(request)


# ---- capture ----


def test_the_end_of_a_finished_request_is_captured(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    assert rank.serve(tokens[:30], rid="a") == Served(0, 0, False)
    assert rank.boundaries(tokens) == [30]
    assert rank.serve(tokens, rid="b") == Served(30, 0, False)
    assert rank.boundaries(tokens) == [30, 60]
    keys = page_keys(tokens, 1)
    second = rank.tiers.boundary(keys[59])
    assert second is not None
    assert [(s.start, s.end) for s in second.chain()] == [(0, 30), (30, 60), (60, 60)]
    [turn] = rank.cache.finished_turns("b")
    assert (turn.key, turn.boundary) == (keys[59], 60)
    assert rank.stats.captured == 2
    assert rank.stats.contained_errors == 0
    rank.check_pools()


def test_what_was_captured_comes_back_into_an_empty_tree(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    rank.clear_vram()
    assert rank.serve(tokens) == Served(0, 40, False)
    assert rank.stats.loaded_tokens == 40
    rank.check_pools()
    rank.nothing_is_held()


def test_a_state_that_lands_on_a_stored_node_is_captured(rank: Rank, rng: Random) -> None:
    """Upstream never offers it: the node was stored before, without the state."""
    tokens = random_tokens(rng, 60)
    rank.serve(tokens)
    rank.serve(tokens[:50], rid="inside")
    assert rank.boundaries(tokens) == [50, 60]
    assert len(rank.cache.finished_turns("inside")) == 1
    rank.clear_vram()
    assert rank.serve([*tokens[:50], 1, 2]) == Served(0, 50, False)
    rank.check_pools()


def test_chunks_are_not_captured(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    request = ToyRequest("r", tokens)
    rank.admit(request)
    rank.forward(request, 0)
    rank.cache.checkpoint(request, up_to=25)
    rank.settle()
    assert rank.boundaries(tokens) == []
    rank.finish(request)
    rank.settle()
    assert rank.boundaries(tokens) == [40]
    rank.clear_vram()
    assert rank.serve([*tokens, 1]) == Served(0, 40, False)


def test_nothing_is_captured_twice(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    first = rank.tiers.boundary(page_keys(tokens, 1)[39])
    rank.serve(tokens[:40])
    assert rank.stats.captured == 1
    rank.clear_vram()
    rank.serve(tokens[:50])  # restored: upstream offers the whole prefix again
    rank.clear_vram()
    rank.serve(tokens[:40])  # computed anew: the first write stands
    assert rank.tiers.boundary(page_keys(tokens, 1)[39]) is first
    assert rank.stats.captured == 2
    assert rank.boundaries(tokens) == [40, 50]


def test_adapters_and_salts_do_not_meet(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 30)
    rank.serve(tokens, extra_key="lora")
    assert rank.boundaries(tokens) == []
    assert rank.boundaries(tokens, "lora") == [30]
    rank.clear_vram()
    assert rank.serve([*tokens, 1]).loaded == 0
    assert rank.serve([*tokens, 1], extra_key="lora").loaded == 30


def test_a_path_is_locked_while_it_is_copied_and_not_after(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 30)
    blocked = Blocked(rank, monkeypatch)
    start_and_finish(rank, tokens)
    assert blocked.reached.wait(WAIT_S)
    rank.cache.check_hicache_events()
    assert rank.cache.full_protected_size() == 30
    assert rank.cache.mamba_protected_size() == 1
    rank.cache.evict(EvictParams(num_tokens=30, mamba_num=1))
    assert rank.cache.full_evictable_size() == 0
    blocked.go.set()
    rank.settle()
    rank.check_pools()
    rank.clear_vram()
    assert rank.serve([*tokens, 1]).loaded == 30, "eviction took nothing that was being read"


def test_emptying_the_tree_waits_for_the_copy_under_way(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 30)
    blocked = Blocked(rank, monkeypatch)
    waiting = threading.Event()
    quiesce = type(rank.tiers).quiesce

    def noted(tiers: Any) -> None:
        waiting.set()
        quiesce(tiers)

    monkeypatch.setattr(type(rank.tiers), "quiesce", noted)
    start_and_finish(rank, tokens)
    assert blocked.reached.wait(WAIT_S)
    resetting = threading.Thread(target=rank.cache.reset)
    resetting.start()
    try:
        # Long before a copy that is stuck, had the reset not waited for it.
        assert waiting.wait(5)
        assert resetting.is_alive()
    finally:
        blocked.go.set()
        resetting.join(WAIT_S)
    assert not resetting.is_alive()
    rank.requests.clear()
    rank.slots.clear()
    rank.settle()
    assert rank.serve([*tokens, 1]) == Served(0, 30, False)
    rank.check_pools()
    assert rank.stats.contained_errors == 0


def test_a_capture_without_room_is_refused_and_serving_goes_on(
    new_rank: NewRank, rng: Random
) -> None:
    rank = new_rank(capacity=100)
    tokens = random_tokens(rng, 30)
    rank.serve(tokens, rid="r")
    assert rank.stats.capture_refused == 1
    assert rank.boundaries(tokens) == []
    rank.check_pools()
    assert rank.serve([*tokens, 1]) == Served(30, 0, False)
    rank.check_pools()


def test_what_vram_evicts_is_loaded_again(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    rank.cache.evict(EvictParams(num_tokens=40, mamba_num=1))
    assert rank.cache.full_evictable_size() == 0
    assert rank.serve(tokens) == Served(0, 40, False)
    rank.check_pools()


# ---- loads ----


def test_a_chain_of_segments_lands_where_it_belongs(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 80)
    for end in (20, 35, 60):
        rank.serve(tokens[:end])
    rank.clear_vram()
    assert rank.serve(tokens) == Served(0, 60, False)
    rank.check_pools()


def test_a_chain_is_loaded_behind_what_is_resident(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 80)
    for end in (20, 35, 60):
        rank.serve(tokens[:end])
    rank.clear_vram()
    assert rank.serve(tokens[:20]) == Served(0, 0, False)
    assert rank.serve(tokens) == Served(20, 40, False)
    rank.check_pools()


def test_a_segment_is_loaded_from_its_middle(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 80)
    rank.serve(tokens[:60])
    rank.clear_vram()
    rank.serve(tokens[:25])
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[59])
    assert boundary is not None
    assert boundary.chain()[0].end == 60, "the rows are one segment"
    assert rank.serve(tokens) == Served(25, 35, False)
    rank.check_pools()


def test_two_loads_in_one_batch(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 50)
    other = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.serve(other[:30])
    rank.clear_vram()
    requests = [ToyRequest("a", tokens), ToyRequest("b", other), ToyRequest("c", tokens)]
    hits = [rank.admit(request) for request in requests]
    assert hits == [(0, 40), (0, 30), (0, 40)]
    rank.forward(requests[0], 40)
    rank.linker.layer_done_counter.set_consumer(rank.cache.linker.inflight_load_index)
    for request, (_, loaded) in zip(requests[1:], hits[1:], strict=True):
        keys = page_keys(request.tokens, 1)[:loaded]
        row = rank.requests.req_to_token[request.kv.req_pool_idx, :loaded].tolist()
        for layer in range(LAYERS):
            rank.check_layer(layer, keys, row, int(request.kv.mamba_pool_idx))


def test_a_forward_pass_reads_complete_layers_only(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load stops behind every layer; the reader must not pass the ones that are not there."""
    tokens = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.clear_vram()
    for buffer in rank.linker.device_pools.buffers:
        buffer.tensor.view(torch.uint8).fill_(0xEE)
    gates = [threading.Event() for _ in range(LAYERS)]
    read = [threading.Event() for _ in range(LAYERS)]
    scatter = rank.linker._scatter
    check = rank.check_layer

    def slow(layer: int, *args: Any) -> None:
        assert gates[layer].wait(WAIT_S)
        scatter(layer, *args)

    def noted(layer: int, *args: Any) -> None:
        check(layer, *args)
        read[layer].set()

    monkeypatch.setattr(rank.linker, "_scatter", slow)
    monkeypatch.setattr(rank, "check_layer", noted)
    request = ToyRequest("r", tokens)
    assert rank.admit(request) == (0, 40)
    failures: list[BaseException] = []

    def forward() -> None:
        try:
            rank.forward(request, 40)
        except BaseException as error:
            failures.append(error)
            for event in read:
                event.set()

    reader = threading.Thread(target=forward)
    reader.start()
    try:
        for layer in range(LAYERS):
            assert not read[layer].is_set(), failures
            gates[layer].set()
            assert read[layer].wait(WAIT_S)
    finally:
        for gate in gates:
            gate.set()
        reader.join(WAIT_S)
    assert failures == []
    assert rank.cache.finish_external_linker_loads([request]) == []
    rank.finish(request)
    rank.settle()
    rank.check_pools()


def test_without_the_state_pools_counter_half_loaded_states_would_be_read(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would not notice if nothing waited: here the way round is taken away."""
    tokens = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.clear_vram()
    for buffer in rank.linker.device_pools.buffers:
        buffer.tensor.view(torch.uint8).fill_(0xEE)
    go = threading.Event()
    scatter = rank.linker._scatter

    def slow(*args: Any) -> None:
        assert go.wait(WAIT_S)
        scatter(*args)

    monkeypatch.setattr(rank.linker, "_scatter", slow)
    monkeypatch.setattr(rank.requests, "layer_transfer_counter", None)
    request = ToyRequest("r", tokens)
    assert rank.admit(request) == (0, 40)
    with pytest.raises(AssertionError, match=r"ssm|conv"):
        rank.forward(request, 40)
    go.set()
    assert rank.cache.finish_external_linker_loads([request]) == []
    rank.finish(request, insert=False)


def test_the_state_pool_waits_for_loads_too(rank: Rank) -> None:
    counter = rank.linker.layer_done_counter
    assert rank.requests.layer_transfer_counter is counter
    assert rank.kv.layer_transfer_counter is counter
    assert counter.num_layers == LAYERS


def test_an_aborted_request_lets_go_of_what_it_would_have_loaded(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.clear_vram()
    request = ToyRequest("r", tokens)
    assert rank.admit(request) == (0, 40)
    rank.finish(request, insert=False)
    rank.nothing_is_held()
    assert rank.linker.start_layer_wise_loading() == -1
    rank.check_pools()
    assert rank.serve(tokens) == Served(0, 40, False)


def test_a_prefix_that_is_in_vram_anyway_is_held_for_nobody(rank: Rank, rng: Random) -> None:
    """The HTTP process leased it for the request; the first look at the tree ends the lease."""
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    boundary = rank.tiers.boundary(page_keys(tokens[:40], 1)[-1])
    assert boundary is not None
    rank.tiers.lease("waiting", boundary.chain(), seconds=1000.0)
    request = ToyRequest("waiting", tokens)
    assert rank.admit(request) == (40, 0)
    assert rank.tiers.depths()["leases"] == 0
    rank.forward(request, 40)
    rank.finish(request)
    rank.settle()
    rank.nothing_is_held()


@pytest.mark.parametrize("durable", [False, True])
def test_a_hit_that_has_vanished_is_recomputed(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """What is on disk stays known when it leaves RAM, and cannot be loaded all the same."""
    tokens = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.clear_vram()
    load = rank.linker.load
    if durable:
        saved = rank.tiers.boundary(page_keys(tokens, 1)[39])
        assert saved is not None
        rank.tiers.persist(saved).result(WAIT_S)

    def late(rid: str, transfers: list[Any]) -> bool:
        rank.tiers.release(rid)
        boundary = rank.tiers.boundary(page_keys(tokens, 1)[39])
        assert boundary is not None
        rank.tiers.ram._evict(boundary)
        return load(rid, transfers)

    monkeypatch.setattr(rank.linker, "load", late)
    assert rank.serve(tokens) == Served(0, 0, False)
    rank.check_pools()
    rank.nothing_is_held()
    assert rank.stats.contained_errors == 0


def test_a_promise_does_not_outlive_what_was_promised(rank: Rank, rng: Random) -> None:
    """A waiting request is matched again and again; upstream keeps the first hit for good."""
    tokens = random_tokens(rng, 50)
    rank.serve(tokens[:40])
    rank.clear_vram()
    request = ToyRequest("r", tokens)
    params = MatchPrefixParams(key=RadixKey(array("q", tokens[:-1])), req=request)
    assert rank.cache.match_prefix(params).host_hit_length == 40
    assert rank.cache.linker.has_hit("r")
    rank.tiers.release("r")
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[39])
    assert boundary is not None
    rank.tiers.ram._evict(boundary)
    assert rank.cache.match_prefix(params).host_hit_length == 0
    assert not rank.cache.linker.has_hit("r")


# ---- failures of ours ----


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda rank, patch: patch.setattr(type(rank.tiers), "capture", raising),
        lambda rank, patch: patch.setattr(rank.tiers.ram, "longest", raising),
        lambda rank, patch: patch.setattr(rank.tiers.ram, "reserve", raising),
        lambda rank, patch: patch.setattr(rank.cache._stream, "fence", raising),
    ],
    ids=["capture", "longest", "reserve", "fence"],
)
def test_a_bug_in_capture_costs_the_snapshot_and_never_the_request(
    rank: Rank, rng: Random, break_it: Callable[[Rank, pytest.MonkeyPatch], None]
) -> None:
    tokens = random_tokens(rng, 40)
    with pytest.MonkeyPatch.context() as patched:
        break_it(rank, patched)
        assert rank.serve(tokens[:30]) == Served(0, 0, False)
    assert rank.stats.contained_errors == 1
    assert rank.boundaries(tokens) == []
    rank.check_pools()
    rank.serve(tokens)
    assert rank.boundaries(tokens) == [40]
    rank.check_pools()


def test_a_bug_in_lookup_costs_the_hit_and_never_the_request(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens[:30])
    rank.clear_vram()
    with monkeypatch.context() as patched:
        patched.setattr(type(rank.tiers), "lookup", raising)
        assert rank.serve([*tokens[:30], 1]) == Served(0, 0, False)
    assert rank.stats.contained_errors == 1
    rank.check_pools()
    rank.clear_vram()
    assert rank.serve(tokens) == Served(0, 30, False)


def test_a_bug_in_queueing_a_load_costs_the_hit_and_never_the_request(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens[:30])
    rank.clear_vram()
    with monkeypatch.context() as patched:
        patched.setattr(rank.linker, "_queue", raising)
        assert rank.serve([*tokens[:30], 1]) == Served(0, 0, False)
    assert rank.stats.contained_errors == 1
    rank.check_pools()
    rank.nothing_is_held()


@pytest.mark.parametrize("broken", ["_scatter", "tiers"])
def test_a_load_that_fails_aborts_its_request_alone(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens[:30])
    rank.clear_vram()
    request = ToyRequest("r", tokens)
    assert rank.admit(request) == (0, 30)
    with monkeypatch.context() as patched:
        if broken == "tiers":
            patched.setattr(type(rank.tiers), "views", raising)
        else:
            patched.setattr(rank.linker, "_scatter", raising)
        rank.cache.linker.start_layer_wise_loading()
        assert rank.cache.finish_external_linker_loads([request]) == [request]
    assert request.skip_radix_cache_insert
    rank.finish(request, insert=False)
    assert rank.stats.contained_errors == 1
    rank.check_pools()
    rank.nothing_is_held()
    assert rank.serve(tokens) == Served(0, 30, False)


def test_a_copy_that_fails_leaves_no_lock(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 40)
    with monkeypatch.context() as patched:
        patched.setattr(rank.linker.device_pools, "gather", raising)
        rank.serve(tokens[:30])
    assert rank.stats.capture_failed == 1
    assert rank.boundaries(tokens) == []
    rank.check_pools()
    rank.serve(tokens)
    assert rank.boundaries(tokens) == [40]


# ---- what the control plane asks ----


def test_what_is_resident_and_capturing_it_again(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens[:30])
    ids = array("q", tokens[:30])
    resident = rank.cache.resident(ids, None, None)
    assert resident.length == 30
    assert resident.state_slot is not None
    assert rank.cache.resident(ids, "lora", None).length == 0
    assert rank.cache.capture_resident(array("q", tokens), None, None) is None
    assert rank.cache.capture_resident(ids[:20], None, None) is None, "no state stands there"
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[29])
    assert boundary is not None
    rank.tiers.ram._evict(boundary)
    assert rank.boundaries(tokens) == []
    turn = rank.cache.capture_resident(ids, None, None)
    assert turn is not None
    assert turn.boundary == 30
    rank.settle()
    rank.check_pools()
    assert rank.boundaries(tokens) == [30]
    rank.clear_vram()
    assert rank.cache.finished_turns("rid-1") == (turn,)
    assert rank.serve(tokens) == Served(0, 30, False)


def test_any_traffic(new_rank: NewRank, rng: Random) -> None:
    """Branching requests, flushes, evictions and a RAM tier too small for all of it."""
    sizes = new_rank()
    probe = random_tokens(rng, 30)
    sizes.serve(probe)
    rank = new_rank(capacity=sizes.tiers.ram.used * 6)
    trunk = random_tokens(rng, 40)
    known: list[list[int]] = [trunk[: rng.randrange(5, 40)] for _ in range(3)]
    hits = 0
    for step in range(60):
        action = rng.randrange(10)
        if action == 0:
            rank.clear_vram()
        elif action == 1:
            rank.cache.evict(EvictParams(num_tokens=rng.randrange(200), mamba_num=2))
        else:
            before = rng.choice(known)
            cut = rng.randrange(len(before) // 2, len(before) + 1)
            tokens = [*before[:cut], *random_tokens(rng, rng.randrange(1, 15))][:100]
            served = rank.serve(tokens, rid=f"r{step}")
            assert not served.aborted
            hits += served.loaded
            known = [*known[-8:], tokens]
        rank.check_pools()
        rank.nothing_is_held()
        assert rank.tiers.ram.used <= rank.tiers.ram.capacity
    assert rank.stats.contained_errors == 0
    assert rank.stats.capture_failed == 0
    assert rank.stats.loaded_tokens == hits
    assert rank.requests.mamba_allocator.available_size() <= STATES
