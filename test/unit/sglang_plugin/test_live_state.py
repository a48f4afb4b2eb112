"""States under the `extra_buffer` strategy, on SGLang's real tree and pools, both of its cores.

The toy model's state is drawn from the tokens before it, and each request checks the state that it
goes on from: one that was tracked earlier, or that belongs to other tokens, is seen.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from engram.sglang_plugin.keys import page_keys
from unit.sglang_plugin.tree import NewRank, Rank, Served, ToyRequest


@pytest.fixture
def rank(new_rank: NewRank) -> Rank:
    return new_rank(extra_buffer=True)


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(2**31) for _ in range(count)]


def track(rank: Rank, request: ToyRequest, length: int) -> None:
    """What SGLang does at a tracked point: the state there is copied, and counted."""
    kv, pool = request.kv, rank.requests
    key = page_keys(request.tokens[:length], 1)[-1]
    slot = int(kv.mamba_ping_pong_track_buffer[kv.mamba_next_track_idx])
    for layer in (0, 2, 3):
        rank.write_layer(layer, [key], [], slot)
    kv.mamba_last_track_idx = kv.mamba_next_track_idx
    kv.mamba_next_track_idx = pool.get_mamba_ping_pong_other_idx(kv.mamba_next_track_idx)
    kv.mamba_prev_track_seqlen, kv.mamba_last_track_seqlen = kv.mamba_last_track_seqlen, length


def begin(rank: Rank, tokens: list[int], **fields: Any) -> ToyRequest:
    request = ToyRequest(f"rid-{len(tokens)}", tokens, **fields)
    resident, loaded = rank.admit(request)
    rank.forward(request, resident + loaded)
    assert rank.cache.finish_external_linker_loads([request]) == []
    return request


def test_a_turn_ends_at_its_real_end(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 50)
    assert rank.serve(tokens) == Served(0, 0, False)
    assert rank.serve([*tokens, *random_tokens(rng, 9)]) == Served(50, 0, False)
    assert rank.boundaries(tokens) == [50]
    rank.check_pools()
    rank.nothing_is_held()


def test_the_live_state_goes_before_a_tracked_one(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 50)
    request = begin(rank, tokens)
    track(rank, request, 32)
    rank.finish(request)
    rank.settle()
    assert rank.serve([*tokens, *random_tokens(rng, 9)]).resident == 50
    rank.check_pools()


def test_a_state_that_went_past_the_key_is_not_used(rank: Rank, rng: Random) -> None:
    """SGLang cuts a reply at a stop: the live state has seen more than the tree is told."""
    tokens = random_tokens(rng, 50)
    request = begin(rank, tokens)
    track(rank, request, 32)
    request.kv.kv_committed_len = 51
    rank.finish(request)
    rank.settle()
    assert rank.serve([*tokens, *random_tokens(rng, 9)]).resident == 32
    rank.check_pools()


def test_without_any_state_of_its_own_a_turn_stands_where_its_path_does(
    rank: Rank, rng: Random
) -> None:
    tokens = random_tokens(rng, 30)
    rank.serve(tokens)
    request = begin(rank, [*tokens, *random_tokens(rng, 20)])
    request.kv.kv_committed_len = 51
    rank.finish(request)
    rank.settle()
    [turn] = rank.cache.finished_turns(request.rid)
    assert turn.boundary == 30
    rank.check_pools()


def test_restored_after_the_tree_was_emptied(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens)
    rank.clear_vram()
    assert rank.serve([*tokens, *random_tokens(rng, 5)]) == Served(0, 40, False)
    rank.check_pools()


def test_a_state_the_tree_has_already_is_given_back(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    for _ in range(3):
        rank.serve(tokens)
        rank.check_pools()


@pytest.mark.parametrize("extra_buffer", [False, True])
def test_a_point_inside_a_prompt(new_rank: NewRank, rng: Random, extra_buffer: bool) -> None:
    """The first piece of a prefill ends at the point; the request goes on with its own state."""
    rank = new_rank(extra_buffer=extra_buffer)
    tokens = random_tokens(rng, 60)
    request = begin(rank, tokens[:59])
    assert rank.cache.next_point(ToyRequest("whole", tokens), 0) == 59
    whole = tokens
    request.origin = whole
    rank.cache.checkpoint(request, up_to=59)
    assert request.kv.cache_protected_len == 59
    rank.finish(request)
    rank.settle()
    assert rank.serve(whole).resident == 59
    rank.check_pools()
    rank.nothing_is_held()


@pytest.mark.parametrize("extra_buffer", [False, True])
def test_no_state_at_the_end_of_a_prompt_whose_point_is_kept(
    new_rank: NewRank, rng: Random, extra_buffer: bool
) -> None:
    rank = new_rank(extra_buffer=extra_buffer)
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:59])
    request = begin(rank, tokens)
    states = rank.cache.mamba_evictable_size() + rank.cache.mamba_protected_size()
    rank.cache.checkpoint(request, up_to=60)
    assert rank.cache.mamba_evictable_size() + rank.cache.mamba_protected_size() == states
    rank.finish(request)
    rank.settle()
    rank.check_pools()


@pytest.mark.parametrize("extra_buffer", [False, True])
def test_states_of_a_running_reply(new_rank: NewRank, rng: Random, extra_buffer: bool) -> None:
    """At the first state past a multiple of the interval, and not again before the next."""
    rank = new_rank(extra_buffer=extra_buffer, interval=32)
    tokens = random_tokens(rng, 40)
    request = begin(rank, tokens)
    request.origin = tokens[:20]
    if extra_buffer:
        track(rank, request, 40)
    rank.cache.keep_reply(request)
    assert request.kv.cache_protected_len == 40
    rank.cache.keep_reply(request)
    assert request.kv.cache_protected_len == 40
    assert rank.serve([*tokens, 1]).resident == 40
    rank.finish(request)
    rank.settle()
    rank.check_pools()


def test_without_an_interval_replies_keep_no_state(rank: Rank, rng: Random) -> None:
    request = begin(rank, random_tokens(rng, 40))
    track(rank, request, 40)
    rank.cache.keep_reply(request)
    assert request.kv.cache_protected_len == 0
    rank.finish(request)
    rank.settle()
    rank.check_pools()
