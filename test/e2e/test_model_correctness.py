"""Stock SGLang on the CPU against transformers: the same tokens, and log probabilities alike.

Everything is float32, where two right implementations differ by rounding only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model

SEED = 20
# One token, less than a chunk of the scan (32), a whole chunk, several, and more than the server
# prefills at once (64).
LENGTHS = [1, 5, 32, 37, 64, 90, 200]
NEW_TOKENS = 24
TOLERANCE = 1e-4

FLAGS = [
    *("--device", "cpu", "--dtype", "float32"),
    *("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    *("--chunked-prefill-size", "64", "--enable-mixed-chunk"),
    *("--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
]


@dataclass(frozen=True)
class Expected:
    """A prompt, what follows it greedily, and the log probability of every token but the first."""

    prompt: list[int]
    reply: list[int]
    log_probabilities: list[float]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), seed=SEED)


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[Expected]:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    numbers = random.Random(SEED)
    found = []
    for length in LENGTHS:
        prompt = numbers.choices(range(6, 104), k=length)
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )[0]
            logits = model(output.unsqueeze(0)).logits[0, :-1].float()
        scores = torch.log_softmax(logits, -1).gather(1, output[1:, None])[:, 0]
        found.append(Expected(prompt, output[length:].tolist(), scores.tolist()))
    return found


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model_folder, FLAGS, {"SGLANG_MAMBA_CONV_DTYPE": "float32"}, log) as process:
        yield process


def generate(server: ServerProcess, prompts: list[list[int]], **options: Any) -> list[Any]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        **options,
    }
    response = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    replies: list[Any] = response.json()
    return replies


def assert_as_expected(reply: Any, wanted: Expected) -> None:
    assert reply["output_ids"] == wanted.reply
    meta = reply["meta_info"]
    # The first prompt token has no probability: nothing came before it.
    pairs = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
    assert [token for _, token, _ in pairs] == [*wanted.prompt[1:], *wanted.reply]
    got = torch.tensor([score for score, _, _ in pairs])
    torch.testing.assert_close(got, torch.tensor(wanted.log_probabilities), rtol=0, atol=TOLERANCE)


def test_alone(server: ServerProcess, expected: list[Expected]) -> None:
    for wanted in expected:
        [reply] = generate(server, [wanted.prompt], return_logprob=True, logprob_start_len=0)
        assert_as_expected(reply, wanted)


def test_the_same_request_has_the_same_bits(
    server: ServerProcess, expected: list[Expected]
) -> None:
    """Asked for the log probabilities of the whole prompt, the server computes all of it again."""
    longest = expected[-1].prompt
    first, second = (
        generate(server, [longest], return_logprob=True, logprob_start_len=0)[0]["meta_info"]
        for _ in range(2)
    )
    assert first["cached_tokens"] == second["cached_tokens"] == 0
    for part in ("input_token_logprobs", "output_token_logprobs"):
        assert first[part] == second[part]


def test_in_one_batch(server: ServerProcess, expected: list[Expected]) -> None:
    prompts = [wanted.prompt for wanted in expected]
    replies = generate(server, prompts, return_logprob=True, logprob_start_len=0)
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
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([turn]),
            attention_mask=torch.ones(1, len(turn)),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    assert reply["output_ids"] == output[0, len(turn) :].tolist()
