"""What transformers computes with a model, to hold SGLang's replies against.

Everything is float32, where two right implementations differ by rounding only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from e2e.helpers import PRINTABLE_IDS

# One token, less than a chunk of the scan (32), a whole chunk, several, and more than the server
# prefills at once (64).
LENGTHS = (1, 5, 32, 37, 64, 90, 200)
CHUNK = 64
NEW_TOKENS = 24
TOLERANCE = 1e-4
VARIETY = 8
"""Different tokens in a reply, at least: a model that says one token would be right by chance."""


@dataclass(frozen=True)
class Expected:
    """A prompt, what follows it greedily, and the log probability of every token but the first."""

    prompt: list[int]
    reply: list[int]
    log_probabilities: list[float]


def expect(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Expected]:
    """What the model in `folder` answers, token by token; the replies vary."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )[0]
            logits = model(output.unsqueeze(0)).logits[0, :-1].float()
        scores = torch.log_softmax(logits, -1).gather(1, output[1:, None])[:, 0]
        found.append(Expected(list(prompt), output[len(prompt) :].tolist(), scores.tolist()))
    assert_varied(found)
    return found


def assert_varied(found: Sequence[Expected]) -> None:
    """No reply is right by chance."""
    for expected in found:
        assert len(set(expected.reply)) >= VARIETY, expected
    assert len({tuple(expected.reply) for expected in found}) == len(found)


def prompts_of(seed: int) -> list[list[int]]:
    """A random prompt of each length."""
    numbers = random.Random(seed)
    return [numbers.choices(PRINTABLE_IDS, k=length) for length in LENGTHS]


def ask_for(prompts: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
    """The body of a `/generate` request that can be compared."""
    return {
        "input_ids": [list(prompt) for prompt in prompts],
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        **options,
    }


ALL_LOG_PROBABILITIES: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}
"""Those of the prompt too; the server then computes all of it."""


def assert_as_expected(reply: Any, wanted: Expected) -> None:
    """A `/generate` reply with all log probabilities against transformers."""
    assert reply["output_ids"] == wanted.reply
    meta = reply["meta_info"]
    # The first prompt token has no probability: nothing came before it.
    pairs = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
    assert [token for _, token, _ in pairs] == [*wanted.prompt[1:], *wanted.reply]
    got = torch.tensor([score for score, _, _ in pairs])
    torch.testing.assert_close(got, torch.tensor(wanted.log_probabilities), rtol=0, atol=TOLERANCE)
