"""Two ranks of one server: their trees stay the same, whatever happens to each of them alone.

Each rank runs on a thread of its own, as in a process of its own, and asks the other by SGLang's
reduction, here over a barrier: a rank that asks alone, or at another place, waits until it breaks.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
import torch
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from engram.core.weights import Checkpoint
from engram.errors import EngramError
from engram.sglang_plugin import weights
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.messages import PersistRequest
from engram.sglang_plugin.rank import Launch
from engram.tiers.capture import Capturer
from unit.sglang_plugin.test_cache import random_tokens
from unit.sglang_plugin.test_weights import Scheduler, answer, model
from unit.sglang_plugin.tree import NewRank, Rank, Served, ToyRequest

Result = TypeVar("Result")
ALONE_S = 30


class Group:
    """The ranks of one server."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks
        self._meeting = threading.Barrier(len(ranks))
        self._said: dict[int, tuple[Any, torch.Tensor]] = {}
        self._threads = [ThreadPoolExecutor(1) for _ in ranks]
        for number, rank in enumerate(ranks):
            rank.cache._all_reduce_attn_groups = (  # type: ignore[method-assign]
                lambda tensor, op, number=number: self._reduce(number, tensor, op)
            )

    def _reduce(self, number: int, tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        self._said[number] = (tuple(tensor.shape), tensor.clone())
        self._meeting.wait(ALONE_S)
        shapes = {shape for shape, _ in self._said.values()}
        assert len(shapes) == 1, f"the ranks ask different things: {shapes}"
        least = torch.stack([said for _, said in self._said.values()]).amin(0)
        self._meeting.wait(ALONE_S)
        tensor.copy_(least)

    def each(self, work: Callable[[Rank], Result]) -> list[Result]:
        """What the ranks give, doing the same at once."""
        running = [
            thread.submit(work, rank)
            for thread, rank in zip(self._threads, self.ranks, strict=True)
        ]
        return [future.result() for future in running]

    def alike(self, work: Callable[[Rank], Result]) -> Result:
        """The same, which must be the same on each."""
        given = self.each(work)
        assert all(one == given[0] for one in given), given
        return given[0]

    def close(self) -> None:
        self._meeting.abort()
        for thread in self._threads:
            thread.shutdown()


@pytest.fixture
def new_group(new_rank: NewRank) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def new(*capacities: int) -> Group:
        groups.append(Group([new_rank(capacity) for capacity in capacities]))
        return groups[-1]

    yield new
    for group in groups:
        group.close()


def tree_of(rank: Rank) -> tuple[int, ...]:
    """What must be equal on every rank: what can be evicted, what cannot, what is free."""
    return (
        rank.cache.full_evictable_size(),
        rank.cache.full_protected_size(),
        rank.cache.mamba_evictable_size(),
        rank.cache.mamba_protected_size(),
        rank.slots.available_size(),
        rank.requests.mamba_allocator.available_size(),
        rank.cache.locks,
    )


class SlowCopies:
    """Copies off one rank's device that wait until they are let go."""

    def __init__(self, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        gather = rank.linker.device_pools.gather

        def slow(*args: Any) -> None:
            assert self.go.wait(ALONE_S)
            gather(*args)

        monkeypatch.setattr(rank.linker.device_pools, "gather", slow)


def test_a_path_is_unlocked_when_it_is_copied_on_every_rank(
    new_group: Callable[..., Group], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = new_group(1 << 24, 1 << 24)
    slow = SlowCopies(group.ranks[1], monkeypatch)
    tokens = random_tokens(rng, 30)

    def serve(rank: Rank) -> None:
        request = ToyRequest("r", tokens)
        rank.forward(request, sum(rank.admit(request)))
        rank.finish(request)

    group.each(serve)
    group.ranks[0].tiers.quiesce()
    for _ in range(3):
        group.each(lambda rank: rank.cache.check_hicache_events())
        assert group.alike(tree_of)[-1] == 1, "the other rank still reads its device"
        group.each(lambda rank: rank.cache.evict(EvictParams(num_tokens=30, mamba_num=1)))
        assert group.alike(tree_of)[1] == 30, "what is locked on one rank is evicted on none"
    slow.go.set()
    group.ranks[1].tiers.quiesce()
    group.each(lambda rank: rank.cache.check_hicache_events())
    assert group.alike(tree_of)[-1] == 0


def test_a_rank_without_room_locks_as_the_others_do(
    new_group: Callable[..., Group], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = new_group(1 << 24, 64)
    slow = SlowCopies(group.ranks[0], monkeypatch)
    tokens = random_tokens(rng, 30)

    def serve(rank: Rank) -> None:
        request = ToyRequest("r", tokens)
        rank.forward(request, sum(rank.admit(request)))
        rank.finish(request)
        rank.cache.check_hicache_events()

    group.each(serve)
    assert group.ranks[1].stats.capture_refused == 1
    assert group.alike(tree_of)[-1] == 1
    slow.go.set()
    group.each(lambda rank: rank.settle())
    assert group.alike(tree_of)[-1] == 0


def test_what_one_rank_has_lost_is_loaded_by_none(
    new_group: Callable[..., Group], rng: Random
) -> None:
    group = new_group(1 << 24, 1 << 24)
    tokens = random_tokens(rng, 60)
    for end in (20, 40, 50):
        group.alike(lambda rank, end=end: rank.serve(tokens[:end], rid=f"r{end}"))
    lost = group.ranks[1].tiers.boundary(page_keys(tokens[:50], 1)[-1])
    assert lost is not None
    group.ranks[1].tiers.ram._evict(lost)
    group.each(Rank.clear_vram)
    assert group.alike(lambda rank: rank.serve(tokens, rid="again")) == Served(0, 40, False)
    group.alike(tree_of)
    group.each(Rank.nothing_is_held)


def test_a_load_that_one_rank_cannot_do_is_done_by_none(
    new_group: Callable[..., Group], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = new_group(1 << 24, 1 << 24)
    tokens = random_tokens(rng, 60)
    group.each(lambda rank: rank.serve(tokens[:40], rid="first"))
    group.each(Rank.clear_vram)
    unlucky = group.ranks[1].linker
    queue = unlucky._queue

    def lost(rid: str, transfers: Any) -> bool:
        assert queue(rid, transfers)
        unlucky.cancel_queued_load(rid)
        return False

    monkeypatch.setattr(unlucky, "_queue", lost)
    assert group.alike(lambda rank: rank.serve(tokens, rid="second")) == Served(0, 0, False)
    group.alike(tree_of)
    group.each(Rank.check_pools)
    group.each(Rank.nothing_is_held)


def test_a_save_asks_the_tree_of_every_rank_alike(
    new_group: Callable[..., Group], rng: Random
) -> None:
    """Of three sequences the one that was saved is evicted last, on either rank."""
    group = new_group(1 << 24, 1 << 24)
    tokens = [random_tokens(rng, 20) for _ in range(3)]
    for number, one in enumerate(tokens):
        group.each(lambda rank, number=number, one=one: rank.serve(one, rid=f"r{number}"))
    lost = group.ranks[1].tiers.boundary(page_keys(tokens[0], 1)[-1])
    assert lost is not None
    group.ranks[1].tiers.ram._evict(lost)
    request = PersistRequest(
        call_id="c",
        namespace=group.ranks[0].namespace,
        request_rid="r0",
        tokens=tokens[0],
        boundary=20,
        locate=True,
    )
    wires = {id(rank): Silent(rank) for rank in group.ranks}
    group.each(lambda rank: wires[id(rank)].control.handlers[PersistRequest](request))
    assert group.alike(tree_of)[-1] == 1
    group.each(Rank.settle)
    for _ in range(2):
        group.each(lambda rank: rank.cache.evict(EvictParams(num_tokens=20, mamba_num=1)))
    left = group.alike(
        lambda rank: [rank.cache.resident(array("q", one), None, None).length for one in tokens]
    )
    assert left == [20, 0, 0]


def test_a_turn_stands_at_one_place_though_the_copy_of_one_rank_failed(
    new_group: Callable[..., Group], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service expects another one: a stop token was computed that it cannot know of."""
    group = new_group(1 << 24, 1 << 24)
    tokens = random_tokens(rng, 30)

    def full(*args: Any, **kw: Any) -> bool:
        raise MemoryError("no memory for the tables of a copy")

    with monkeypatch.context() as patched:
        patched.setattr(Capturer, "capture", OnOneRank(Capturer.capture, full, group.ranks[1]))
        group.each(lambda rank: rank.serve(tokens, rid="r"))
    assert [rank.stats.contained_errors for rank in group.ranks] == [0, 1]
    request = PersistRequest(
        call_id="c",
        namespace=group.ranks[0].namespace,
        request_rid="r",
        tokens=[*tokens, 7],
        boundary=29,
        locate=True,
    )
    wires = {id(rank): Silent(rank) for rank in group.ranks}
    group.each(lambda rank: wires[id(rank)].control.handlers[PersistRequest](request))
    group.alike(tree_of)
    group.each(Rank.settle)
    replies = [reply for rank in group.ranks for reply in wires[id(rank)].replies]
    assert [reply.result["boundary"] for reply in replies] == [30, 30]
    group.each(Rank.check_pools)


@pytest.mark.parametrize("unlucky", ["cannot read", "could not load"])
def test_ranks_that_name_the_weights_differently_take_a_name_of_their_own_together(
    new_group: Callable[..., Group], rng: Random, tmp_path: Path, unlucky: str
) -> None:
    """The directory they have already, or another one: to one of them nothing has changed."""
    group = new_group(1 << 24, 1 << 24)
    home = model(tmp_path / "home", 1.0)
    folder = home if unlucky == "cannot read" else model(tmp_path / "other", 2.0)
    checkpoint = Checkpoint.read(home, "fast")
    for rank in group.ranks:
        rank.linker.rank.launch = Launch("a-launch", "auto", "fast", checkpoint)
    group.each(lambda rank: rank.cache.weights_changed(checkpoint.digest))
    tokens = random_tokens(rng, 60)
    group.each(lambda rank: rank.serve(tokens[:40], rid="first"))

    def update(rank: Rank, *, well: bool) -> str:
        """Not flushed: requests were running."""
        done = answer(True)
        if not well and unlucky == "could not load":
            done = answer(False, "Failed to get weights iterator: no memory")
        if not well and unlucky == "cannot read":
            rank.linker.rank.launch = Launch("a-launch", "auto", "fast", None)
        request = UpdateWeightFromDiskReqInput(model_path=str(folder), load_format="auto")
        weights.update_from_disk(done, Scheduler(rank), request)
        return rank.linker.rank.weights

    name = group.alike(lambda rank: update(rank, well=rank is group.ranks[0]))
    assert name.startswith("runtime-")
    assert group.alike(lambda rank: rank.cache.stale)
    group.alike(lambda rank: rank.serve(tokens, rid="second"))
    group.each(lambda rank: rank.cache.weights_changed(None))
    assert group.alike(lambda rank: rank.linker.rank.weights).startswith("runtime-")
    group.each(Rank.clear_vram)
    group.alike(lambda rank: rank.serve(tokens, rid="third"))
    assert group.alike(lambda rank: rank.boundaries(tokens)) == [60]


def test_any_traffic_of_two_ranks(
    new_group: Callable[..., Group], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches, flushes, evictions and saves, with one rank short of memory and slow at copying."""
    probe = new_group(1 << 24)
    probe.each(lambda rank: rank.serve(random_tokens(Random(1), 30)))
    size = probe.ranks[0].tiers.ram.used
    group = new_group(size * 12, size * 30)
    wires = {id(rank): Silent(rank) for rank in group.ranks}
    trunk = random_tokens(rng, 40)
    known: list[list[int]] = [trunk[: rng.randrange(5, 40)] for _ in range(3)]
    loaded = 0
    for step in range(120):
        action = rng.randrange(14)
        if action < 2:
            group.each(Rank.clear_vram)
        elif action == 2:
            count = rng.randrange(200)
            group.each(
                lambda rank, count=count: rank.cache.evict(
                    EvictParams(num_tokens=count, mamba_num=2)
                )
            )
        elif action == 3:
            tokens = rng.choice(known)
            request = PersistRequest(
                call_id="c",
                namespace=group.ranks[0].namespace,
                request_rid="",
                tokens=tokens,
                boundary=len(tokens),
                locate=bool(rng.randrange(2)),
            )
            group.each(
                lambda rank, request=request: wires[id(rank)].control.handlers[PersistRequest](
                    request
                )
            )
            if rng.randrange(2):
                group.each(lambda rank: rank.cache.check_hicache_events())
        elif action == 4:
            rank = rng.choice(group.ranks)
            segment = rank.tiers.boundary(page_keys(rng.choice(known), 1)[-1])
            if segment is not None and segment.resident:
                with contextlib.suppress(EngramError):
                    rank.tiers.ram._evict(segment)
        else:
            before = rng.choice(known)
            cut = rng.choice([len(before), rng.randrange(len(before) // 2, len(before))])
            tokens = [*before[:cut], *random_tokens(rng, rng.randrange(1, 15))][:100]
            served = group.alike(
                lambda rank, tokens=tokens, step=step: rank.serve(tokens, rid=f"r{step}")
            )
            assert not served.aborted
            loaded += served.loaded
            known = [*known[-8:], tokens]
        group.alike(tree_of)
    group.each(Rank.settle)
    group.each(Rank.check_pools)
    assert loaded > 0, "a run that loads nothing shows nothing"
    assert all(rank.stats.contained_errors == 0 for rank in group.ranks)


class OnOneRank:
    """A method that is another one on one rank."""

    def __init__(self, method: Any, other: Any, rank: Rank) -> None:
        self._method, self._other, self._ram = method, other, rank.tiers.ram

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        chosen = self._other if owner._ram is self._ram else self._method
        return lambda *args, **kw: chosen(owner, *args, **kw)


class Silent:
    """A rank's control plane whose replies nobody reads."""

    def __init__(self, rank: Rank) -> None:
        from engram.sglang_plugin.control import RankControl

        self.replies: list[Any] = []
        self.control = RankControl(rank.cache, self)  # type: ignore[arg-type]

    def send(self, reply: Any) -> None:
        self.replies.append(reply)
