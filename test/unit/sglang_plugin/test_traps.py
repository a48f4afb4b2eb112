"""Ways round what SGLang's tree does to whoever stores beside it, each on the real tree.

`TRAPS` says which test fails without which way round, wherever that test is.
"""

from __future__ import annotations

import threading
from array import array
from random import Random
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from engram.errors import UnsupportedError
from engram.sglang_plugin import plugin
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.pools import _state_buffers
from repository import ROOT
from unit.sglang_plugin.tree import NewRank, Rank, Served, ToyRequest

WAIT_S = 60

CACHE = "test/unit/sglang_plugin/test_cache.py"
CONTROL = "test/unit/sglang_plugin/test_control.py"
HERE = "test/unit/sglang_plugin/test_traps.py"
MANAGER = "test/unit/tiers/test_manager.py"
TRAPS = {
    "a state on a node that is stored already is never offered": (
        f"{CACHE}::test_a_state_that_lands_on_a_stored_node_is_captured",
        "test/e2e/test_tiers.py::test_turn_that_ends_inside_another_path_survives",
    ),
    "what was offered once is never offered again": (
        f"{HERE}::test_what_ram_forgot_is_captured_again_from_the_resident_tree",
    ),
    "a restored prefix is offered again as a whole": (
        f"{CACHE}::test_nothing_is_captured_twice",
        f"{HERE}::test_a_second_branch_starts_at_the_restored_boundary",
    ),
    "page hashing compiles C++ in the scheduler": (
        f"{HERE}::test_nothing_is_compiled_where_the_tree_is_engrams",
        "test/unit/sglang_plugin/test_keys.py"
        "::test_the_stand_in_gives_what_the_compiled_function_gives",
    ),
    "the state pool is not told of layer-wise loads": (
        f"{CACHE}::test_the_state_pool_waits_for_loads_too",
        f"{CACHE}::test_a_forward_pass_reads_complete_layers_only",
    ),
    "a failed load aborts its request": (
        f"{MANAGER}::test_nothing_is_promised_while_it_is_filled",
        f"{MANAGER}::test_a_damaged_segment_is_never_loadable",
        f"{CACHE}::test_a_hit_that_has_vanished_is_recomputed",
    ),
    "nobody is told of a waiting request that is aborted": (
        f"{MANAGER}::test_a_lookup_leases_what_it_promises",
        f"{HERE}::test_a_waiting_request_that_is_aborted_lets_go_of_its_lease",
        f"{CACHE}::test_an_aborted_request_lets_go_of_what_it_would_have_loaded",
        f"{CACHE}::test_a_promise_does_not_outlive_what_was_promised",
    ),
    "slots outside the tree end an idle scheduler": (
        f"{CACHE}::test_a_load_that_fails_aborts_its_request_alone",
        f"{CACHE}::test_any_traffic",
    ),
    "a resident sibling changes bits": (
        "test/e2e/test_tiers.py::test_turn_that_ends_inside_another_path_survives",
    ),
    "offers lock their path until they are acknowledged": (f"{HERE}::test_offers_leave_no_lock",),
    "every prefill chunk is offered": (f"{CACHE}::test_chunks_are_not_captured",),
    "locks die with the tree": (f"{CACHE}::test_emptying_the_tree_waits_for_the_copy_under_way",),
    "emptying the tree does not wait for loads": (
        f"{HERE}::test_emptying_the_tree_waits_for_the_load_under_way",
    ),
    "a paused engine does not poll": (
        f"{CONTROL}::test_copies_are_let_go_of_while_the_engine_is_paused",
    ),
    "exceptions reach the scheduler's loop": (
        f"{CACHE}::test_a_bug_in_capture_costs_the_snapshot_and_never_the_request",
        f"{CACHE}::test_a_bug_in_lookup_costs_the_hit_and_never_the_request",
    ),
    "keys name tokens, not bits": (
        "test/unit/tiers/test_ram.py::test_the_first_write_wins",
        f"{MANAGER}::test_a_parent_computed_anew_does_not_make_a_stored_child_look_damaged",
    ),
    "pools hold more than the state": (f"{HERE}::test_a_pool_with_something_unknown_is_refused",),
    "one request id stands for several requests": (
        "test/unit/sglang_plugin/test_request_ids.py"
        "::test_a_request_id_used_for_several_requests_stands_for_each_of_them",
    ),
}


@pytest.mark.parametrize("test", sorted({test for tests in TRAPS.values() for test in tests}))
def test_every_trap_names_a_test_that_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(2**31) for _ in range(count)]


def test_what_ram_forgot_is_captured_again_from_the_resident_tree(rank: Rank, rng: Random) -> None:
    """Upstream has marked the node as stored, for good."""
    tokens = random_tokens(rng, 30)
    rank.serve(tokens)
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[-1])
    assert boundary is not None
    rank.tiers.ram._evict(boundary)
    assert rank.boundaries(tokens) == []
    rank.serve(tokens)
    assert rank.boundaries(tokens) == [30]
    rank.clear_vram()
    assert rank.serve([*tokens, 1]) == Served(0, 30, False)


def test_a_second_branch_starts_at_the_restored_boundary(rank: Rank, rng: Random) -> None:
    """After the first one the tree has no state there any more: RAM must still have it."""
    tokens = random_tokens(rng, 40)
    rank.serve(tokens)
    rank.clear_vram()
    for _ in range(3):
        served = rank.serve([*tokens, *random_tokens(rng, 10)])
        assert served.resident + served.loaded == 40
        assert served.loaded == 40
    assert rank.stats.captured == 4
    rank.check_pools()


def test_a_waiting_request_that_is_aborted_lets_go_of_its_lease(rank: Rank, rng: Random) -> None:
    """It was matched in some scheduling round, and promised what it never loads."""
    tokens = random_tokens(rng, 40)
    rank.serve(tokens)
    rank.clear_vram()
    request = ToyRequest("r", [*tokens, 1])
    params = MatchPrefixParams(key=RadixKey(array("q", tokens)), req=request)
    assert rank.cache.match_prefix(params).host_hit_length == 40
    boundary = rank.tiers.boundary(page_keys(tokens, 1)[-1])
    assert boundary is not None
    assert boundary.holders == 1
    rank.cache.linker.release_request("r")
    rank.nothing_is_held()


def test_nothing_is_compiled_where_the_tree_is_engrams(
    monkeypatch: pytest.MonkeyPatch, rng: Random
) -> None:
    def compile_it(*_: Any) -> Any:
        raise RuntimeError("g++ was called in the scheduler's loop")

    tokens = random_tokens(rng, 8)
    monkeypatch.setattr(plugin, "_in_use", set())
    with pytest.raises(RuntimeError, match="was called"):
        plugin.around_get_native_hash(compile_it, tokens, None, 4)
    monkeypatch.setattr(plugin, "_in_use", {"page keys"})
    assert plugin.around_get_native_hash(compile_it, tokens, None, 4) == page_keys(tokens, 4)


def test_offers_leave_no_lock(rank: Rank, rng: Random) -> None:
    """Each insert is an offer; a path that stays locked can never be evicted."""
    tokens = random_tokens(rng, 60)
    for end in (20, 40, 60):
        rank.serve(tokens[:end])
    assert rank.linker._acknowledged == 0
    assert rank.cache.full_protected_size() == 0
    assert rank.cache.mamba_protected_size() == 0


def test_emptying_the_tree_waits_for_the_load_under_way(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are given to others right afterwards."""
    tokens = random_tokens(rng, 30)
    rank.serve(tokens)
    rank.clear_vram()
    request = ToyRequest("r", [*tokens, 1])
    assert rank.admit(request) == (0, 30)
    reached, go = threading.Event(), threading.Event()
    scatter = rank.linker._scatter

    def slow(*args: Any) -> None:
        reached.set()
        assert go.wait(WAIT_S)
        scatter(*args)

    monkeypatch.setattr(rank.linker, "_scatter", slow)
    rank.cache.linker.start_layer_wise_loading()
    assert reached.wait(WAIT_S)
    resetting = threading.Thread(target=rank.linker.reset)
    resetting.start()
    try:
        resetting.join(1)
        assert resetting.is_alive()
    finally:
        go.set()
        resetting.join(WAIT_S)
    assert not resetting.is_alive()


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("int8 state checkpoint", ("mamba_ckpt_pool",)),
        ("side states", ("mamba_pool", "_slot_siblings")),
        ("ReplaySSM", ("mamba_pool", "mamba_cache", "replayssm_g")),
    ],
)
def test_a_pool_with_something_unknown_is_refused(
    new_rank: NewRank, monkeypatch: pytest.MonkeyPatch, what: str, place: tuple[str, ...]
) -> None:
    """It would silently not be saved."""
    pool: Any = new_rank().requests
    assert _state_buffers(pool)
    owner: Any = pool
    for name in place[:-1]:
        owner = getattr(owner, name)
    object.__setattr__(owner, place[-1], [object()])
    with pytest.raises(UnsupportedError, match=what):
        _state_buffers(pool)
    object.__setattr__(owner, place[-1], None if place[-1] != "_slot_siblings" else [])
