"""Weights that change under a running rank, over SGLang's real tree and its real answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqOutput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
)

from engram.core.weights import Checkpoint
from engram.errors import NamespaceChangedError, StaleTreeError
from engram.sglang_plugin import weights
from engram.sglang_plugin.engine import SglangRanks
from engram.sglang_plugin.rank import Launch, RankContext
from engram.store.disk import DiskStore
from unit.service.engine import on_a_loop
from unit.sglang_plugin.test_cache import Blocked, random_tokens, start_and_finish
from unit.sglang_plugin.test_control import Wire, finished
from unit.sglang_plugin.tree import NewRank, Rank, Served, ToyRequest

WAIT_S = 60
PROMPT = 30


def model(folder: Path, value: float, *names: str) -> Path:
    folder.mkdir()
    tensors = {name: torch.full((8,), value) for name in names or ("a", "b")}
    save_file(tensors, folder / "model.safetensors")
    return folder


def context(rank: Rank) -> RankContext:
    return rank.linker.rank


def change(rank: Rank, name: str) -> None:
    """As an update with `flush_cache` does: the tree is emptied before the name changes."""
    rank.clear_vram()
    rank.cache.weights_changed(name)


# ---- a rank under other weights ----


def test_states_of_other_weights_are_not_found(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    change(rank, "second")
    assert not rank.cache.stale
    assert rank.boundaries(tokens) == []
    assert rank.serve(tokens) == Served(0, 0, False)
    rank.clear_vram()
    assert rank.serve([*tokens, 1]) == Served(0, 60, False), "what the new ones made is found"
    rank.check_pools()
    rank.nothing_is_held()


def test_the_namespace_names_the_weights_and_comes_back_with_them(rank: Rank) -> None:
    first = context(rank).namespace
    change(rank, "second")
    second = context(rank).namespace
    assert first.difference(second) == [("model.weights", "first", "second")]
    assert (context(rank).shard.namespace, context(rank).tiers.shard) == (
        second.id,
        context(rank).shard,
    )
    change(rank, "first")
    assert context(rank).namespace == first
    assert context(rank).epoch == 2


def test_the_same_weights_again_change_nothing(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens)
    tiers = rank.tiers
    change(rank, "first")
    assert rank.tiers is tiers
    assert rank.serve([*tokens, 1]) == Served(0, 40, False)


def test_a_tree_that_was_not_emptied_is_not_saved_from(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    rank.serve(tokens[:40])
    rank.cache.weights_changed("second")
    assert rank.cache.stale
    assert rank.serve(tokens) == Served(40, 0, False), "SGLang goes on using it"
    assert rank.boundaries(tokens) == []
    assert rank.stats.capture_stale == 1
    assert rank.cache.resident(tokens, None, None).length == 0
    rank.clear_vram()
    assert not rank.cache.stale
    assert rank.serve(tokens) == Served(0, 0, False)
    assert rank.boundaries(tokens) == [60]


def test_nothing_is_loaded_on_top_of_a_stale_tree(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 60)
    change(rank, "second")
    rank.serve(tokens[:40])
    rank.clear_vram()
    rank.serve(random_tokens(rng, 5))
    rank.cache.weights_changed("third")
    rank.cache.weights_changed("second")
    assert rank.serve(tokens) == Served(0, 0, False)


def test_a_request_that_ran_across_a_change_is_not_captured(rank: Rank, rng: Random) -> None:
    """Paused in place, its state is a mixture; so is the tree it is inserted into."""
    tokens = random_tokens(rng, 60)
    request = ToyRequest("across", tokens)
    rank.admit(request)
    rank.forward(request, 0)
    rank.cache.weights_changed("second")
    assert not rank.cache.stale, "the tree is empty"
    late = ToyRequest("late", random_tokens(rng, 20))
    rank.admit(late)
    rank.forward(late, 0)
    rank.finish(request)
    assert rank.cache.stale
    rank.finish(late)
    rank.settle()
    assert rank.boundaries(tokens) == rank.boundaries(late.tokens) == []
    assert rank.stats.capture_stale == 2
    rank.clear_vram()
    rank.serve(tokens)
    assert rank.boundaries(tokens) == [60]
    rank.check_pools()


def test_a_request_that_was_retracted_begins_again_with_the_new_weights(
    rank: Rank, rng: Random
) -> None:
    tokens = random_tokens(rng, 60)
    request = ToyRequest("retracted", tokens)
    rank.admit(request)
    rank.forward(request, 0)
    # Retraction frees what it had without a checkpoint, and puts it back into the queue.
    rank.finish(request, insert=False)
    change(rank, "second")
    again = ToyRequest("retracted", tokens)
    rank.admit(again)
    rank.forward(again, 0)
    rank.finish(again)
    rank.settle()
    assert rank.boundaries(tokens) == [60]


def test_a_save_under_way_is_finished_for_the_weights_before(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler thread goes on while the disk of the tiers before is still writing."""
    tokens = random_tokens(rng, 40)
    rank.serve(tokens, rid="r")
    put, reached, go = rank.store.put_segment, threading.Event(), threading.Event()

    def slow(*args: Any) -> str:
        reached.set()
        assert go.wait(WAIT_S)
        return put(*args)

    monkeypatch.setattr(rank.store, "put_segment", slow)
    before = rank.tiers
    key = rank.cache.finished_turns("r")[0].key
    boundary = before.boundary(key)
    assert boundary is not None
    saving = before.persist(boundary)
    assert reached.wait(WAIT_S)
    change(rank, "second")
    assert rank.tiers is not before
    assert not saving.done()
    nbytes = [segment.nbytes for segment in boundary.chain()]
    assert before.ram.used == sum(nbytes), "held while it is written"
    assert rank.tiers.ram.used == 0
    go.set()
    for ref in saving.result(WAIT_S).refs:
        assert rank.store.has_segment(before.shard, ref.segment_id)
    assert not rank.store.has_segment(rank.tiers.shard, ref.segment_id)
    context(rank)._retiring[-1].join(WAIT_S)
    assert not context(rank)._retiring[-1].is_alive()


def test_a_change_waits_for_the_copy_under_way(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rng, 30)
    blocked = Blocked(rank, monkeypatch)
    start_and_finish(rank, tokens)
    assert blocked.reached.wait(WAIT_S)
    changing = threading.Thread(target=rank.cache.weights_changed, args=("second",))
    changing.start()
    changing.join(0.2)
    assert changing.is_alive()
    blocked.go.set()
    changing.join(WAIT_S)
    assert context(rank).epoch == 1
    rank.cache.check_hicache_events()
    assert rank.cache.locks == 0
    assert rank.boundaries(tokens) == []


def test_memory_of_the_weights_before_is_given_back(rank: Rank, rng: Random) -> None:
    rank.serve(random_tokens(rng, 30))
    before = rank.tiers
    assert before.ram.used > 0
    before.lease("restored", list(before.ram._unwanted), seconds=1000.0)
    change(rank, "second")
    assert (before.ram.used, len(before.ram), before.depths()["leases"]) == (0, 0, 0)


def test_names_of_runtime_weights_agree_on_all_ranks_and_with_nobody_else(
    new_rank: NewRank,
) -> None:
    one, other, stranger = (context(new_rank()) for _ in range(3))
    stranger.launch = Launch("another-launch", "auto", "fast", None)
    names = [one.runtime_weights() for _ in range(3)]
    assert names == [other.runtime_weights() for _ in range(3)]
    assert len({*names, *(stranger.runtime_weights() for _ in range(3))}) == 6
    assert all(name.startswith("runtime-") for name in names)


# ---- the control plane across a change ----


@on_a_loop
async def test_messages_that_believe_in_other_weights_are_refused(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens, rid="r")
    ranks = SglangRanks(Wire(rank).client)
    first = (await ranks.describe()).namespace.id
    turn = finished([*tokens, 7], "r")
    stored = await ranks.persist(first, turn, 40)
    change(rank, "second")
    ids = [[ref.segment_id for ref in chain] for chain in stored.chains]
    for asked in (
        ranks.locate(first, turn, 40),
        ranks.persist(first, turn, 40),
        ranks.tier(first, "00" * 32, turn.tokens),
        ranks.drop(first, ids),
        ranks.promote(first, stored.chains, owner="x", seconds=9, exact=False, timeout=WAIT_S),
    ):
        with pytest.raises(NamespaceChangedError):
            await asked
    shard = context(rank).shard
    change(rank, "first")
    assert rank.store.has_segment(context(rank).shard, ids[0][0]), "nothing was dropped"
    assert rank.stats.corrupt == 0
    assert shard != context(rank).shard
    brought = await ranks.promote(
        first, stored.chains, owner="x", seconds=9, exact=True, timeout=WAIT_S
    )
    assert brought.source_tier == "disk"
    assert rank.serve([*tokens, 1]) == Served(0, 40, False)


@on_a_loop
async def test_a_save_from_a_stale_tree_says_what_to_do(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 40)
    rank.serve(tokens, rid="r")
    ranks = SglangRanks(Wire(rank).client)
    rank.cache.weights_changed("second")
    [stats] = await ranks.stats()
    assert (stats["stale_tree"], stats["weights_changes"]) == (True, 1)
    with pytest.raises(StaleTreeError) as caught:
        await ranks.persist(rank.namespace, finished([*tokens, 7], "r"), 40)
    assert "flush_cache" in caught.value.hint
    rank.clear_vram()
    [stats] = await ranks.stats()
    assert stats["stale_tree"] is False


# ---- what an update made of the weights ----


class Scheduler:
    """The scheduler's weight updater, as far as Engram's hooks look at it; it answers `output`."""

    def __init__(self, rank: Rank, *, session: bool = False, saver: bool = False) -> None:
        self.scheduler = SimpleNamespace(tree_cache=rank.cache)
        self.memory_saver_adapter = SimpleNamespace(enabled=saver)
        self._session = object() if session else None


def answer(success: bool, message: str = "", during: Callable[[], Any] | None = None) -> Any:
    def original(manager: Any, request: Any) -> Any:
        if during is not None:
            during()
        return UpdateWeightFromDiskReqOutput(success=success, message=message)

    return original


@pytest.fixture
def home(rank: Rank, tmp_path: Path) -> Path:
    """The directory that `rank` was launched with."""
    folder = model(tmp_path / "home", 1.0)
    checkpoint = Checkpoint.read(folder, "fast")
    context(rank).launch = Launch("a-launch", "auto", "fast", checkpoint)
    rank.cache.weights_changed(checkpoint.digest)
    return folder


def update(rank: Rank, folder: Path, original: Any, load_format: str | None = "auto") -> str:
    """The name of the weights after `/update_weights_from_disk`."""
    request = UpdateWeightFromDiskReqInput(model_path=str(folder), load_format=load_format)
    weights.update_from_disk(original, Scheduler(rank), request)
    return str(context(rank).namespace.fields["model.weights"])


def test_weights_of_a_directory_have_its_fingerprint(
    rank: Rank, home: Path, tmp_path: Path
) -> None:
    first = context(rank).namespace
    other = model(tmp_path / "other", 2.0)
    assert update(rank, other, answer(True)) == Checkpoint.read(other, "fast").digest
    assert update(rank, home, answer(True)) == Checkpoint.read(home, "fast").digest
    assert context(rank).namespace == first


def test_a_flush_that_was_refused_does_not_undo_the_update(
    rank: Rank, home: Path, tmp_path: Path
) -> None:
    message = (
        "Weights were updated, but the cache was not flushed because requests are still running or "
        "queued. Retract or finish them, then call /flush_cache."
    )
    other = model(tmp_path / "other", 2.0)
    assert update(rank, other, answer(False, message)) == Checkpoint.read(other, "fast").digest


@pytest.mark.parametrize(
    "message",
    ["Failed to get weights iterator: no such file.", "Failed to get model loader: <Dummy>."],
)
def test_an_update_that_never_began_changes_nothing(
    rank: Rank, home: Path, tmp_path: Path, message: str
) -> None:
    before = context(rank).namespace
    update(rank, tmp_path / "missing", answer(False, message))
    assert context(rank).namespace == before


@pytest.mark.parametrize(
    "message",
    ["Failed to update weights: shape.\nRolling back to original weights.", "something new"],
)
def test_an_update_that_failed_half_way_leaves_weights_nobody_knows(
    rank: Rank, home: Path, tmp_path: Path, message: str
) -> None:
    other = model(tmp_path / "other", 2.0)
    assert update(rank, other, answer(False, message)).startswith("runtime-")


@pytest.mark.parametrize("doubt", ["fewer tensors", "another format", "written meanwhile", "gone"])
def test_a_directory_in_doubt_gives_no_name(
    rank: Rank, home: Path, tmp_path: Path, doubt: str
) -> None:
    names = ("a",) if doubt == "fewer tensors" else ("a", "b")
    other = model(tmp_path / "other", 2.0, *names)
    file = other / "model.safetensors"
    meanwhile = {
        "written meanwhile": lambda: save_file({n: torch.ones(8) for n in names}, file),
        "gone": file.unlink,
    }
    name = update(
        rank,
        other,
        answer(True, during=meanwhile.get(doubt)),
        "npcache" if doubt == "another format" else "auto",
    )
    assert name.startswith("runtime-")


def test_two_updates_nobody_can_name_are_told_apart(rank: Rank, home: Path, tmp_path: Path) -> None:
    other = model(tmp_path / "other", 2.0, "a")
    assert update(rank, other, answer(True)) != update(rank, other, answer(True))


@pytest.mark.parametrize("success", [True, False])
def test_tensors_in_a_session_have_a_name_of_their_own(
    rank: Rank, home: Path, success: bool
) -> None:
    manager = Scheduler(rank, session=True)
    before = context(rank).namespace
    weights.update_at_runtime(answer(success), manager, None)
    assert context(rank).namespace != before
    assert str(context(rank).namespace.fields["model.weights"]).startswith("runtime-")


def test_tensors_outside_a_session_are_refused_by_sglang_and_change_nothing(
    rank: Rank, home: Path
) -> None:
    before = context(rank).namespace
    weights.update_at_runtime(answer(False, "must run between"), Scheduler(rank), None)
    assert context(rank).namespace == before


def test_the_begin_of_a_session_ends_what_the_weights_were(rank: Rank, home: Path) -> None:
    """From there on they may be written from outside, without a word."""
    manager = Scheduler(rank)

    def begin(manager: Any, request: Any) -> Any:
        manager._session = object()
        return BeginWeightUpdateReqOutput(success=True, message="Success")

    weights.update_at_runtime(begin, manager, None)
    assert str(context(rank).namespace.fields["model.weights"]).startswith("runtime-")


@pytest.mark.parametrize("success", [True, False])
def test_an_update_from_another_process_may_have_changed_a_part(
    rank: Rank, home: Path, success: bool
) -> None:
    before = context(rank).namespace
    weights.update_from_ipc(answer(success), Scheduler(rank), None)
    assert context(rank).namespace != before


def test_a_fingerprint_that_fails_is_contained_and_counted(
    rank: Rank, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Checkpoint, "read", broken)
    assert update(rank, model(tmp_path / "other", 2.0), answer(True)).startswith("runtime-")
    assert rank.stats.contained_errors == 1


def test_other_servers_are_left_alone(store: DiskStore) -> None:
    manager = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=object()), _session=None)
    for hook in (
        weights.update_from_disk,
        weights.update_at_runtime,
        weights.update_from_ipc,
        weights.release_memory,
    ):
        assert hook(answer(True, "theirs"), manager, None).message == "theirs"


# ---- memory that SGLang releases ----


def test_memory_is_released_when_the_last_copy_is_done(
    rank: Rank, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked(rank, monkeypatch)
    start_and_finish(rank, random_tokens(rng, 30))
    assert blocked.reached.wait(WAIT_S)
    released = threading.Event()
    request = SimpleNamespace(tags=["kv_cache"])
    releasing = threading.Thread(
        target=weights.release_memory,
        args=(answer(True, during=released.set), Scheduler(rank), request),
    )
    releasing.start()
    assert not released.wait(0.2), "a copy is reading it"
    blocked.go.set()
    releasing.join(WAIT_S)
    assert released.is_set()
    assert context(rank).epoch == 0


@pytest.mark.parametrize(
    ("tags", "saver", "backup", "lost"),
    [
        (None, True, False, True),
        (["weights"], True, False, True),
        (["weights"], True, True, False),
        (["weights"], False, False, False),
        (["kv_cache"], True, False, False),
    ],
)
def test_weights_that_are_released_without_a_copy_are_lost(
    rank: Rank,
    monkeypatch: pytest.MonkeyPatch,
    tags: list[str] | None,
    saver: bool,
    backup: bool,
    lost: bool,
) -> None:
    monkeypatch.setattr(weights, "_weights_are_backed_up", lambda: backup)
    request = SimpleNamespace(tags=tags)
    weights.release_memory(answer(True), Scheduler(rank, saver=saver), request)
    assert context(rank).epoch == (1 if lost else 0)
