"""What a rank answers, over SGLang's real tree."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from engram.errors import InternalError
from engram.sglang_plugin.control import RankControl
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.messages import PersistRequest
from engram.tiers.base import Segment
from unit.sglang_plugin.tree import Rank


def random_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(2**31) for _ in range(count)]


def control(rank: Rank) -> RankControl:
    replies: Any = SimpleNamespace(send=lambda reply: None)
    return RankControl(rank.cache, replies)


def persist(rank: Rank, rid: str | None, tokens: list[int]) -> PersistRequest:
    """As the HTTP process asks: the last recorded token is pending."""
    return PersistRequest(
        call_id="c",
        namespace=rank.namespace,
        request_rid=rid,
        tokens=[*tokens, 5],
        boundary=len(tokens),
        locate=True,
    )


def located(rank: Rank, rid: str | None, tokens: list[int]) -> Segment:
    return control(rank)._locate(persist(rank, rid, tokens))


def test_a_request_id_used_for_several_requests_stands_for_each_of_them(
    rank: Rank, rng: Random
) -> None:
    prompts = [random_tokens(rng, count) for count in (30, 20, 40)]
    prompts.append([*prompts[0], *random_tokens(rng, 7)])
    for tokens in prompts:
        rank.serve(tokens, rid="mine")
    for tokens in prompts:
        found = located(rank, "mine", tokens)
        assert (found.end, found.key) == (len(tokens), page_keys(tokens, 1)[-1])


def test_an_id_used_more_often_than_is_remembered_falls_back_to_the_tokens(
    rank: Rank, rng: Random
) -> None:
    first = random_tokens(rng, 12)
    rank.serve(first, rid="mine")
    for _ in range(10):
        rank.serve(random_tokens(rng, 12), rid="mine")
    assert located(rank, "mine", first).key == page_keys(first, 1)[-1]


def test_tokens_that_are_not_those_of_the_state_are_not_saved(rank: Rank, rng: Random) -> None:
    tokens = random_tokens(rng, 20)
    rank.serve(tokens, rid="r")
    with pytest.raises(InternalError, match="not those of its state"):
        located(rank, "r", random_tokens(rng, 20))
    with pytest.raises(InternalError, match="not those of its state"):
        located(rank, "r", tokens[:10])
