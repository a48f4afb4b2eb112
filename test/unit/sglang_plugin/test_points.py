"""Where states are kept inside prompts, and the cut that makes one there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.schedule_policy import AddReqResult, _PrefillAdmission

from engram.sglang_plugin.points import (
    admit_to_point,
    continue_to_point,
    is_point,
    next_point,
    track_whole_pages,
)


@pytest.mark.parametrize(
    ("start", "prompt", "page", "interval", "wanted"),
    [
        (0, 150, 1, 0, 149),
        (148, 150, 1, 0, 149),
        (149, 150, 1, 0, None),
        (0, 1, 1, 0, None),
        (0, 2, 1, 0, 1),
        (0, 150, 16, 0, 144),
        (0, 161, 16, 0, 160),
        (0, 160, 16, 0, 144),
        (0, 16, 16, 0, None),
        (144, 150, 16, 0, None),
        (0, 150, 1, 64, 64),
        (64, 150, 1, 64, 128),
        (128, 150, 1, 64, 149),
        (70, 150, 1, 64, 128),
        (0, 150, 16, 50, 64),
    ],
)
def test_points(start: int, prompt: int, page: int, interval: int, wanted: int | None) -> None:
    assert next_point(start, prompt, page, interval) == wanted


@given(
    prompt=st.integers(1, 500),
    page=st.sampled_from([1, 4, 16, 64]),
    interval=st.integers(0, 200),
)
def test_going_from_point_to_point_ends_at_the_last_page_before_the_last_token(
    prompt: int, page: int, interval: int
) -> None:
    found, at = [], 0
    while (point := next_point(at, prompt, page, interval)) is not None:
        assert at < point < prompt
        assert point % page == 0
        found.append(point)
        at = point
    assert at == (prompt - 1) // page * page
    assert found == [end for end in range(prompt + 1) if is_point(end, prompt, page, interval)]


class Tree:
    """A tree that keeps the last point alone."""

    def next_point(self, req: Any, start: int) -> int | None:
        return next_point(start, req.prompt, 1, 0)


def admission(prefix: int, extend: int, *, chunked: bool = False) -> _PrefillAdmission:
    return _PrefillAdmission(prefix, extend, 8, chunked, 0)


def admit(
    chosen: Any,
    *,
    prompt: int = 100,
    tree: Any = None,
    running: Any = None,
    busy: bool = False,
    chunk: int | None = 512,
) -> Any:
    adder = SimpleNamespace(
        tree_cache=tree or Tree(), new_chunked_req=running, rem_chunk_tokens=chunk
    )
    req = SimpleNamespace(prompt=prompt)
    return admit_to_point(lambda *_, **__: chosen, adder, req, has_chunked_req=busy)


def test_a_prompt_is_cut_before_its_last_token() -> None:
    cut = admit(admission(30, 70))
    assert (cut.prefix_len, cut.extend_len, cut.is_chunked, cut.max_new_tokens) == (30, 69, True, 8)


def test_without_chunked_prefill_no_prompt_is_cut() -> None:
    """SGLang has no way to go on with one then."""
    chosen = admission(30, 70)
    assert admit(chosen, chunk=None) is chosen


def test_a_cut_is_not_moved_to_where_the_step_does_not_reach() -> None:
    chosen = admission(0, 64, chunked=True)
    assert admit(chosen) is chosen


def test_a_prompt_that_is_found_to_its_last_point_is_not_cut() -> None:
    chosen = admission(99, 1)
    assert admit(chosen) is chosen


@pytest.mark.parametrize("why", ["new", "old"])
def test_a_second_unfinished_prefill_waits_for_the_next_step(why: str) -> None:
    """SGLang would take the first for complete, and never compute its last tokens."""
    first = {"running": object()} if why == "new" else {"busy": True}
    assert admit(admission(0, 64, chunked=True), **first) is AddReqResult.OTHER
    whole = admission(0, 100)
    assert admit(whole, **first) is whole


def test_what_sglang_refuses_or_another_tree_is_left_alone() -> None:
    assert admit(AddReqResult.NO_TOKEN) is AddReqResult.NO_TOKEN
    chosen = admission(0, 100)
    assert admit(chosen, tree=object()) is chosen


@pytest.mark.parametrize(("before", "wanted"), [(None, 35), (20, 20), (50, 35)])
def test_a_prefill_that_goes_on_is_cut_too(before: int | None, wanted: int) -> None:
    adder = SimpleNamespace(tree_cache=Tree(), chunked_req_limit=before)
    seen = []

    def add(adder: Any, req: Any) -> str:
        seen.append(adder.chunked_req_limit)
        return "unfinished"

    req = SimpleNamespace(prompt=100, prefix_len=64)
    assert continue_to_point(add, adder, req) == "unfinished"
    assert seen == [wanted]
    assert adder.chunked_req_limit == before


def test_the_last_piece_of_a_prefill_is_not_limited() -> None:
    adder = SimpleNamespace(tree_cache=Tree(), chunked_req_limit=None)
    req = SimpleNamespace(prompt=100, prefix_len=99)
    assert continue_to_point(lambda adder, req: adder.chunked_req_limit, adder, req) is None


def test_replies_are_tracked_at_every_page_where_pages_are_larger_than_a_token() -> None:
    assert track_whole_pages(lambda page: 256, 16) == 16
    assert track_whole_pages(lambda page: 256, 1) == 256
