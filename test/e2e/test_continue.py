"""`/restore_snapshot` with create_new_request: a generation that goes on from a snapshot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from e2e.helpers import random_ids
from e2e.worlds import World
from engram.testing.samples import seeded_random

END_OF_TEXT = 0
NEW_TOKENS = 10


def continue_from(world: World, continuation: list[int], **fields: Any) -> dict[str, Any]:
    return {
        "conversation_id": "base",
        "turn_number": world.cases["base"].saved["turn_number"],
        "create_new_request": True,
        "continuation_ids": continuation,
        "max_new_tokens": NEW_TOKENS,
        "sampling_params": {"temperature": 0, "ignore_eos": True},
        **fields,
    }


def test_every_caller_gets_its_own_generation(small: World) -> None:
    """Several at once; each is what the same tokens give by `/generate`, and a turn."""
    client, base = small.client, small.cases["base"]
    numbers = seeded_random()
    continuations = [random_ids(numbers, 15 + 4 * n) for n in range(4)]
    with ThreadPoolExecutor(4) as clients:
        bodies = [continue_from(small, ids) for ids in continuations]
        replies = list(clients.map(lambda body: client.restore(**body), bodies))

    recorded = client.info(conversation_id="base", turn_number=2)["fill_ids"]
    assert recorded == base.talk.history
    turns = []
    for continuation, reply in zip(continuations, replies, strict=True):
        same = client.generate([*recorded, *continuation], NEW_TOKENS)
        assert tuple(reply["output_ids"]) == same.tokens
        assert reply["output_text"] == same.output.text
        assert reply["cached_tokens"] >= reply["token_count"] == base.saved["token_count"]
        saved = client.save(rid=reply["rid"])
        metadata = client.info(conversation_id="base", turn_number=saved["turn_number"])
        assert metadata["fill_ids"] == [*recorded, *continuation, *reply["output_ids"]]
        assert metadata["parent_snapshot"] == base.saved["snapshot_id"]
        assert metadata["branch_name"] == "main"
        turns.append(saved["turn_number"])
    assert len(set(turns)) == len(turns)
    assert min(turns) == base.saved["turn_number"] + 1


def test_continuation_is_computed_from_the_boundary(small: World) -> None:
    small.client.flush()
    reply = small.client.restore(**continue_from(small, random_ids(seeded_random(), 9)))
    assert reply["cached_tokens"] == small.cases["base"].saved["token_count"]
    assert reply["source_tier"] in ("ram", "disk")
    assert len(reply["output_ids"]) == NEW_TOKENS


def test_generation_stops_at_end_of_text(small: World) -> None:
    params = {"temperature": 0, "logit_bias": {str(END_OF_TEXT): 1000.0}, "max_new_tokens": 5}
    body = continue_from(small, random_ids(seeded_random(), 9), sampling_params=params)
    reply = small.client.restore(**body)
    assert reply["output_ids"] == [END_OF_TEXT]
    assert reply["finish_reason"]["type"] == "stop"


def test_max_new_tokens_wins_over_sampling_params(small: World) -> None:
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 3}
    body = continue_from(small, random_ids(seeded_random(), 9), sampling_params=params)
    assert len(small.client.restore(**body)["output_ids"]) == NEW_TOKENS


def test_request_id_is_the_callers(small: World) -> None:
    body = continue_from(small, random_ids(seeded_random(), 9), request_id="request-of-mine")
    reply = small.client.restore(**body)
    assert reply["rid"] == "request-of-mine"
    assert small.client.save(rid="request-of-mine")["conversation_id"] == "base"


@pytest.mark.parametrize("missing", ["continuation_ids", "max_new_tokens"])
def test_a_generation_needs_both(small: World, missing: str) -> None:
    body = continue_from(small, [10, 11])
    del body[missing]
    refused = small.client.refused("/restore_snapshot", body, 422)
    assert missing in refused["message"]


@pytest.mark.parametrize("extra", [{"continuation_ids": [10]}, {"max_new_tokens": 3}])
def test_a_plain_restore_takes_neither(small: World, extra: dict[str, Any]) -> None:
    body = {"conversation_id": "base", **extra}
    refused = small.client.refused("/restore_snapshot", body, 422)
    assert next(iter(extra)) in refused["message"]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"sampling_params": {"temperature": -1}}, id="negative-temperature"),
        pytest.param({"sampling_params": {"nonsense": 1}}, id="unknown-parameter"),
        pytest.param({"sampling_params": {"n": 2}}, id="two-replies"),
        pytest.param({"continuation_ids": [10**6]}, id="token-outside-the-vocabulary"),
        pytest.param({"continuation_ids": [10] * 9000}, id="longer-than-the-context"),
        pytest.param({"continuation_ids": []}, id="no-tokens"),
        pytest.param({"continuation_ids": ["a"]}, id="text-for-tokens"),
        pytest.param({"max_new_tokens": 0}, id="no-new-tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(small: World, fields: dict[str, Any]) -> None:
    small.client.refused("/restore_snapshot", continue_from(small, [10, 11]) | fields, 422)
    assert small.client.generate([10, 11, 12], 1).tokens
