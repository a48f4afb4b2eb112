"""A conversation of a tiny model through the real `openai` client, as the demo has it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from engram.testing.tiny_tokenizer import END_OF_TEXT, SPECIALS

TOP_LOGPROBS = 4
# A model with random weights ends its reply anywhere; here every reply has its full length.
NEVER_END = {str(SPECIALS.index(END_OF_TEXT)): -100}


@dataclass(frozen=True)
class Reply:
    """One streamed reply.

    `bits` has, a generated token, its text and the exact log-probabilities (as `float.hex`) of it
    and of its best rivals: equal bits mean equal numbers, not numbers that round alike.
    """

    text: str
    bits: tuple[tuple[str, ...], ...]
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float


class Chat:
    """Sends the whole history with every turn, as clients of the OpenAI API do."""

    def __init__(self, url: str, conversation_id: str, reply_tokens: int) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300.0)
        self._conversation_id = conversation_id
        self._reply_tokens = reply_tokens
        self._messages: list[ChatCompletionMessageParam] = []

    def ask(
        self, content: str, *, keep: bool = True, tagged: bool = True, cache_salt: str | None = None
    ) -> Reply:
        """Send the next user message, greedily sampled and streamed.

        Args:
            content: the message.
            keep: whether message and reply become part of the history.
            tagged: whether the request carries the conversation's id.
            cache_salt: separates the request from every cache made under another salt.
        """
        messages: list[ChatCompletionMessageParam] = [
            *self._messages,
            {"role": "user", "content": content},
        ]
        extra: dict[str, Any] = {"cache_salt": cache_salt} if cache_salt else {}
        if tagged:
            extra["conversation_id"] = self._conversation_id
        began = time.perf_counter()
        stream = self._client.chat.completions.create(
            model="default",
            messages=messages,
            max_tokens=self._reply_tokens,
            temperature=0.0,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
            logit_bias=NEVER_END,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        reply = _collect(stream, began)
        if keep:
            self._messages = [*messages, {"role": "assistant", "content": reply.text}]
        return reply


def _collect(stream: Iterable[ChatCompletionChunk], began: float) -> Reply:
    text: list[str] = []
    bits: list[tuple[str, ...]] = []
    first: float | None = None
    prompt = cached = -1
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                if first is None:
                    first = time.perf_counter() - began
                text.append(choice.delta.content)
            for token in (choice.logprobs.content if choice.logprobs else None) or ():
                rivals = [f"{other.token} {other.logprob.hex()}" for other in token.top_logprobs]
                bits.append((token.token, token.logprob.hex(), *rivals))
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            prompt = chunk.usage.prompt_tokens
            cached = (details.cached_tokens or 0) if details else 0
    if first is None or not bits or prompt < 0:
        raise ValueError("the server streamed no text, no logprobs or no usage")
    return Reply("".join(text), tuple(bits), prompt, cached, first)
