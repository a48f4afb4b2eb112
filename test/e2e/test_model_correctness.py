"""Stock SGLang on the CPU against transformers: the same tokens, and log probabilities alike.

Here the dense Granite, without persistence; the other families are in `test_families.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.off_world import SEED
from e2e.reference import (
    ALL_LOG_PROBABILITIES,
    Expected,
    ask_for,
    assert_as_expected,
    expect,
    prompts_of,
)
from e2e.worlds import Stage, World
from engram.testing.server import ServerProcess


@pytest.fixture
def server(off: World) -> ServerProcess:
    return off.server


@pytest.fixture(scope="module")
def expected(stage: Stage) -> list[Expected]:
    return expect(stage.model(SEED, dtype="float32"), prompts_of(SEED))


def generate(server: ServerProcess, prompts: list[list[int]], **options: Any) -> list[Any]:
    response = httpx.post(f"{server.url}/generate", json=ask_for(prompts, **options), timeout=120)
    assert response.status_code == 200, response.text
    replies: list[Any] = response.json()
    return replies


def test_alone(server: ServerProcess, expected: list[Expected]) -> None:
    for wanted in expected:
        [reply] = generate(server, [wanted.prompt], **ALL_LOG_PROBABILITIES)
        assert_as_expected(reply, wanted)


def test_the_same_request_has_the_same_bits(
    server: ServerProcess, expected: list[Expected]
) -> None:
    longest = expected[-1].prompt
    first, second = (
        generate(server, [longest], **ALL_LOG_PROBABILITIES)[0]["meta_info"] for _ in range(2)
    )
    assert first["cached_tokens"] == second["cached_tokens"] == 0
    for part in ("input_token_logprobs", "output_token_logprobs"):
        assert first[part] == second[part]


def test_in_one_batch(server: ServerProcess, expected: list[Expected]) -> None:
    prompts = [wanted.prompt for wanted in expected]
    replies = generate(server, prompts, **ALL_LOG_PROBABILITIES)
    for reply, wanted in zip(replies, expected, strict=True):
        assert_as_expected(reply, wanted)


def test_prefill_joins_a_running_decode(server: ServerProcess, expected: list[Expected]) -> None:
    """Requests that come one by one share batches with others that already decode."""
    with ThreadPoolExecutor(len(expected)) as pool:
        replies = list(pool.map(lambda wanted: generate(server, [wanted.prompt])[0], expected))
    assert [reply["output_ids"] for reply in replies] == [wanted.reply for wanted in expected]


def test_a_next_turn_goes_on_from_the_cached_state(
    server: ServerProcess, expected: list[Expected]
) -> None:
    first = expected[-1]
    generate(server, [first.prompt])
    turn = [*first.prompt, *first.reply, *expected[1].prompt]
    [reply] = generate(server, [turn])
    assert reply["meta_info"]["cached_tokens"] == len(first.prompt) + len(first.reply) - 1
    [wanted] = expect(Path(server.model), [turn])
    assert reply["output_ids"] == wanted.reply
