"""The tokens that prompts have in common whose messages or texts begin the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from fastapi import Request
from pydantic import ValidationError

from engram.errors import InvalidRequestError, UnsupportedError
from engram.server.tagging import is_text


class SglangPrompts:
    """Upstream's way from messages to prompts (`engram.server.prefixes.Prompts`)."""

    async def prefix_of_messages(
        self, request: Request, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        """The tokens with which every prompt begins whose messages begin with these."""
        chat = request.app.state.openai_serving_chat
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, shared_prefix, chat, messages, tools)

    async def prefix_of_text(self, request: Request, text: str) -> list[int]:
        """The tokens with which every prompt begins that begins with `text`."""
        tokenizer = request.app.state.openai_serving_chat.tokenizer_manager.tokenizer

        def tokens() -> list[int]:
            return common_prefix([tokenizer.encode(text + more) for more in CONTINUATIONS])

        return await asyncio.get_running_loop().run_in_executor(None, tokens)


CONTINUATIONS: Final = ("", "a", " b", "\n\n0")
"""What may follow a text: its last tokens may be others then."""


def shared_prefix(
    chat: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[int]:
    """The tokens that all prompts have in common whose messages begin with these, whoever speaks
    next.  `InvalidRequestError` for what no template renders, `UnsupportedError` for images."""
    if not is_text(messages):
        raise UnsupportedError(
            "image, audio and video inputs cannot be part of a prefix yet",
            details={"field": "messages"},
        )
    follow: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": " b"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    ]
    found, problem = [], "it is empty"
    for more in follow:
        try:
            found.append(prompt_of(chat, [*messages, *more], tools))
        except (ValueError, ValidationError) as error:
            # Most templates refuse one of them: two users, or an assistant who speaks first.
            problem = str(error)
    if not found:
        raise InvalidRequestError(
            f"the chat template does not render these messages: {problem}",
            details={"field": "messages"},
        )
    return common_prefix(found)


def prompt_of(
    chat: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[int]:
    """The tokens of the prompt that upstream makes of messages."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    request = ChatCompletionRequest.model_validate({"messages": messages, "tools": tools})
    ids: list[int] = chat._process_messages(request, False).prompt_ids
    return ids


def common_prefix(found: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all begin."""
    first = min(found, key=len)
    for index, one in enumerate(first):
        if any(other[index] != one for other in found):
            return list(first[:index])
    return list(first)
