"""After a storm: is what was acknowledged there, and is every reply its own prompt's?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from engram.testing.storm import Storm
from engram.testing.storm_turns import (
    TIMEOUT_S,
    TOKENS,
    Reply,
    StormError,
    Turn,
    generation_of,
    reply_of,
    require_same,
)

TOLERANCE: Final = 1e-3
"""Between logprobs of the same tokens computed in other batches, in float32."""


@dataclass
class Verdict:
    """What `verify` has compared."""

    restored: int = 0
    replies: int = 0
    repeated: int = 0
    undecided_saves: int = 0
    undecided_present: int = 0
    ties: int = 0
    largest_difference: float = 0.0


def verify(storm: Storm, url: str, *, repeats: int = 10, replies: bool = True) -> Verdict:
    """Restore every acknowledged snapshot and compare its next turn with one computed cold.

    Cold is a request under an extra key of its own, which shares nothing with any other. With
    `replies` those of the storm are compared with cold ones too: each must be the answer to its own
    prompt. `repeats`
    snapshots are restored twice into an empty tree, which must give equal bits. Raises
    `StormError`.
    """
    verdict = Verdict()
    numbers = random.Random(0)
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        for number, turn in enumerate(storm.acknowledged):
            message = tuple(numbers.choices(TOKENS, k=12))
            prompt = (*turn.tokens, *message)
            warm = _restored(http, turn, prompt)
            _agree(warm, _cold(http, prompt, f"next-{number}"), verdict)
            verdict.restored += 1
            if number < repeats:
                _flush(http)
                first = _restored(http, turn, prompt)
                _flush(http)
                require_same(_restored(http, turn, prompt), first, "second restore")
                verdict.repeated += 1
        for number, turn in enumerate(storm.replies if replies else ()):
            prompt = turn.tokens[: turn.prompt_length]
            cold = _cold(http, prompt, f"reply-{number}")
            assert turn.reply is not None
            _agree(turn.reply, cold, verdict)
            verdict.replies += 1
        for turns in storm.turns.values():
            for turn in turns:
                if turn.maybe_saved and turn.saved is None and not turn.deleted:
                    verdict.undecided_saves += 1
                    verdict.undecided_present += _there_or_not(http, turn)
    return verdict


def check_listings(http: httpx.Client, storm: Storm) -> int:
    """Every snapshot listed of the storm's conversations restores, with the tokens of its turn, and
    none of them was deleted; how many are listed. Raises `StormError`."""
    turns = {turn.rid: turn for turns in storm.turns.values() for turn in turns}
    count = 0
    for conversation in storm.turns:
        listed = http.post("/list_snapshots", json={"conversation_id": conversation})
        if listed.status_code == 404:
            continue
        for metadata in listed.json()["snapshots"]:
            place = {
                "conversation_id": conversation,
                "turn_number": metadata["turn_number"],
                "branch_name": metadata["branch_name"],
            }
            restored = http.post("/restore_snapshot", json=place)
            if restored.status_code != 200:
                raise StormError(f"listed, but: {restored.status_code} {restored.text}")
            require_same(restored.json()["snapshot_id"], metadata["snapshot_id"], "snapshot_id")
            info = http.post("/get_snapshot_info", json=place).json()["metadata"]
            turn = turns.get(info["rid"])
            # A turn whose client never got the reply may have been saved with the server's word.
            if turn is not None:
                require_same(tuple(info["fill_ids"]), turn.tokens, "tokens")
            count += 1
    return count


def _restored(http: httpx.Client, turn: Turn, prompt: Sequence[int]) -> Reply:
    """The next turn behind an explicit restore, which must have saved the prefill."""
    assert turn.saved is not None
    response = http.post("/restore_snapshot", json={"rid": turn.rid})
    if response.status_code != 200:
        raise StormError(f"acknowledged, but: {response.status_code} {response.text}")
    restored = response.json()
    for name in ("snapshot_id", "conversation_id", "turn_number", "token_count"):
        require_same(restored[name], turn.saved[name], name)
    reply = _generate(http, prompt)
    require_same(reply.cached, turn.saved["token_count"], "cached tokens")
    return reply


def _there_or_not(http: httpx.Client, turn: Turn) -> bool:
    """A save without an answer: whole, with its own tokens, or not there at all."""
    response = http.post("/restore_snapshot", json={"rid": turn.rid})
    if response.status_code == 404:
        return False
    if response.status_code != 200:
        raise StormError(f"torn: {response.status_code} {response.text}")
    require_same(response.json()["token_count"], len(turn.tokens) - 1, "token_count")
    return True


def _cold(http: httpx.Client, prompt: Sequence[int], name: str) -> Reply:
    reply = _generate(http, prompt, extra_key=name)
    require_same(reply.cached, 0, "cached tokens of a cold request")
    return reply


def _generate(http: httpx.Client, prompt: Sequence[int], **fields: Any) -> Reply:
    response = http.post("/generate", json=generation_of(prompt, **fields))
    if response.status_code != 200:
        raise StormError(f"/generate: {response.status_code} {response.text}")
    return reply_of(response.json())


def _flush(http: httpx.Client) -> None:
    http.post("/flush_cache", params={"timeout": 30}).raise_for_status()


def _agree(reply: Reply, reference: Reply, verdict: Verdict) -> None:
    """Equal tokens and close logprobs, up to a token that was as likely as another."""
    for step, (token, wanted) in enumerate(zip(reply.tokens, reference.tokens, strict=True)):
        if token != wanted:
            other = reference.top[step].get(token)
            if other is None or reference.logprobs[step] - other > TOLERANCE:
                raise StormError(f"token {step} is {token}, a cold server says {wanted}")
            verdict.ties += 1
            return
        difference = abs(reply.logprobs[step] - reference.logprobs[step])
        verdict.largest_difference = max(verdict.largest_difference, difference)
        if difference > TOLERANCE:
            raise StormError(f"the logprob of token {step} is {difference} off")
