"""SGLang's own `PrefillAdder`, with the cut around it, over SGLang's own tree and pools."""

from __future__ import annotations

import functools
from array import array
from random import Random
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.sampling.sampling_params import SamplingParams

from engram.sglang_plugin.points import admit_to_point, continue_to_point
from unit.sglang_plugin.tree import NewRank, Rank

CHUNK = 128


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, hook in (
        ("_select_prefill_admission", admit_to_point),
        ("add_chunked_req", continue_to_point),
    ):
        original = getattr(PrefillAdder, name)
        monkeypatch.setattr(PrefillAdder, name, functools.partialmethod(_call, hook, original))


def _call(adder: Any, hook: Any, original: Any, req: Any, **kw: Any) -> Any:
    return hook(original, adder, req, **kw)


def step(rank: Rank, chunk: int | None = CHUNK) -> PrefillAdder:
    """What one scheduler step admits with."""
    return PrefillAdder(1, rank.cache, rank.slots, None, 1.0, 4096, chunk)


def request(rank: Rank, rng: Random, count: int, **fields: Any) -> Req:
    """A request that has been matched, as the scheduler does before it asks for admission."""
    ids = array("q", [rng.randrange(1000) for _ in range(count)])
    req = Req(f"r{count}", "", ids, SamplingParams(max_new_tokens=8), **fields)
    req.init_next_round_input(rank.cache)
    return req


def add(adder: PrefillAdder, req: Req, *, busy: bool = False) -> AddReqResult:
    return adder.add_one_req(req, has_chunked_req=busy, truncation_align_size=None)


def test_a_prompt_is_cut_and_its_last_token_follows(rank: Rank, rng: Random) -> None:
    req, first = request(rank, rng, 100), step(rank)
    assert add(first, req) is AddReqResult.CONTINUE
    assert (req.extend_end, first.new_chunked_req) == (99, req)
    req.prefix_len = req.extend_end
    second = step(rank)
    assert second.add_chunked_req(req) is None
    assert (req.extend_end, second.new_chunked_req) == (100, None)


@pytest.mark.parametrize(("mode", "end"), [(True, 100), ("last", 99), (False, 99)])
def test_a_prompt_whose_hidden_states_are_returned_is_not_cut(
    rank: Rank, rng: Random, mode: Any, end: int
) -> None:
    """SGLang returns those of a prefill's last piece: after a cut, of one token."""
    req, adder = request(rank, rng, 100, return_hidden_states=mode), step(rank)
    assert add(adder, req) is AddReqResult.CONTINUE
    assert req.extend_end == end
    assert adder.new_chunked_req is (None if end == 100 else req)


def test_a_long_prompt_goes_by_chunks_to_its_point(rank: Rank, rng: Random) -> None:
    req, adder = request(rank, rng, 200), step(rank)
    add(adder, req)
    ends = [req.extend_end]
    unfinished: Any = req
    while unfinished is not None:
        req.prefix_len = req.extend_end
        unfinished = step(rank).add_chunked_req(req)
        ends.append(req.extend_end)
    assert ends == [128, 199, 200]


def test_beside_an_unfinished_prefill_what_fits_is_admitted_whole(rank: Rank, rng: Random) -> None:
    adder = step(rank)
    cut, whole, long = (request(rank, rng, count) for count in (40, 30, 90))
    assert add(adder, cut) is AddReqResult.CONTINUE
    assert add(adder, whole) is AddReqResult.CONTINUE
    assert whole.extend_end == 30
    # 59 tokens of the chunk are left: SGLang would begin it, and lose sight of the first.
    assert add(adder, long) is AddReqResult.OTHER
    assert adder.new_chunked_req is cut
    assert adder.can_run_list == [cut, whole]


def test_while_one_is_going_on_no_other_is_begun(rank: Rank, rng: Random) -> None:
    adder = step(rank)
    assert add(adder, request(rank, rng, 200), busy=True) is AddReqResult.OTHER
    whole = request(rank, rng, 50)
    assert add(adder, whole, busy=True) is AddReqResult.CONTINUE
    assert whole.extend_end == 50
    assert adder.new_chunked_req is None


def test_without_chunked_prefill_prompts_are_whole(rank: Rank, rng: Random) -> None:
    adder, req = step(rank, None), request(rank, rng, 60)
    add(adder, req)
    assert (req.extend_end, adder.new_chunked_req) == (60, None)


def test_room_for_the_reply_stays_reserved(rank: Rank, rng: Random) -> None:
    adder, req = step(rank), request(rank, rng, 100)
    before = adder.rem_total_tokens
    add(adder, req)
    assert before - adder.rem_total_tokens >= 99 + 8


def test_points_at_an_interval(new_rank: NewRank, rng: Random) -> None:
    rank = new_rank(interval=48)
    req, adder = request(rank, rng, 120), step(rank)
    add(adder, req)
    ends = [req.extend_end]
    unfinished: Any = req
    while unfinished is not None:
        req.prefix_len = req.extend_end
        unfinished = step(rank).add_chunked_req(req)
        ends.append(req.extend_end)
    assert ends == [48, 96, 119, 120]
