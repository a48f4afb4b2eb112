"""The words of a storm: turns, replies, and what a client asks of `/generate`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

TOP: Final = 5
NEW_TOKENS: Final = 8
TOKENS: Final = range(6, 104)
"""The tiny tokenizer's characters."""
TIMEOUT_S: Final = 300.0


class StormError(AssertionError):
    """A reply that was not its caller's, or a promise that was not kept."""


@dataclass(frozen=True)
class Reply:
    """One generation, as `/generate` returns it with logprobs."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]
    prompt_tokens: int
    cached: int


@dataclass(eq=False)
class Turn:
    """A completed reply of a conversation: `tokens` are all of it, `saved` the acknowledgement."""

    conversation: str
    rid: str
    tokens: tuple[int, ...]
    prompt_length: int
    reply: Reply | None = None
    saved: dict[str, Any] | None = None
    maybe_saved: bool = False
    deleted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


def reply_of(body: dict[str, Any]) -> Reply:
    """A `/generate` response."""
    meta = body["meta_info"]
    return Reply(
        tuple(body["output_ids"]),
        tuple(logprob for logprob, _, _ in meta["output_token_logprobs"]),
        tuple(
            {token: logprob for logprob, token, _ in step} for step in meta["output_top_logprobs"]
        ),
        meta["prompt_tokens"],
        meta["cached_tokens"],
    )


def generation_of(
    prompt: Sequence[int], *, new_tokens: int = NEW_TOKENS, **fields: Any
) -> dict[str, Any]:
    """The body of a request for exactly so many greedy tokens, with their logprobs."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP,
        **fields,
    }


def require_same(found: object, wanted: object, what: str) -> None:
    """Raise `StormError` unless two values are equal."""
    if found != wanted:
        raise StormError(f"{what} is {found!r}, not {wanted!r}")
