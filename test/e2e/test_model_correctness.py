"""Stock SGLang on the CPU against transformers: the same tokens, and log probabilities alike.

Here the dense Granite, without persistence; the other families are in `test_families.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.reference import (
    ALL_LOG_PROBABILITIES,
    CHUNK,
    Expected,
    ask_for,
    assert_as_expected,
    expect,
    prompts_of,
)
from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model

SEED = 20

FLAGS = [
    *("--device", "cpu", "--dtype", "float32"),
    *("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    *("--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk"),
    *("--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), seed=SEED)


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[Expected]:
    return expect(model_folder, prompts_of(SEED))


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model_folder, FLAGS, {"SGLANG_MAMBA_CONV_DTYPE": "float32"}, log) as process:
        yield process


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
    server: ServerProcess, expected: list[Expected], model_folder: Path
) -> None:
    first = expected[-1]
    generate(server, [first.prompt])
    turn = [*first.prompt, *first.reply, *expected[1].prompt]
    [reply] = generate(server, [turn])
    assert reply["meta_info"]["cached_tokens"] == len(first.prompt) + len(first.reply) - 1
    [wanted] = expect(model_folder, [turn])
    assert reply["output_ids"] == wanted.reply
