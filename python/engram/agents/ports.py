"""What agents need of the engine; `sglang_plugin` provides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engram.conversation.turns import Tag

Message = Mapping[str, Any]
OnWritten = Callable[[str], None]
"""Told the text of a reply while it is written, part after part, before calls are told from it."""


@dataclass(frozen=True)
class ChatReply:
    """One reply: `message` in the form of the OpenAI protocol, with the calls that the engine's
    own parser found; `prompt_ids` and `output_ids` are its tokens, as they were computed.
    """

    rid: str
    message: dict[str, Any]
    finish_reason: str
    prompt_ids: list[int]
    output_ids: list[int]
    cached_tokens: int


class ChatEngine(Protocol):
    """The server's own chat completions.  Used on the server's event loop."""

    @property
    def parses_tool_calls(self) -> bool:
        """Whether a parser of tool calls is configured."""

    async def complete(
        self, body: Mapping[str, Any], turn: Tag | None = None, on_written: OnWritten | None = None
    ) -> ChatReply:
        """Answer a request to ``/v1/chat/completions``, as a client would be answered.

        `turn` says which turn of its conversation the reply is, where that is not the next one of
        the branch that the body names.

        Raises `InvalidRequestError` for what the route refuses, `GenerationAbortedError` for what
        fails otherwise. Cancelled, it ends the generation.
        """

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, more: bool) -> str:
        """The text of messages under the model's template; with `more`, up to where a reply
        begins.  `UnsupportedError` where the model has no such template.
        """

    def encode(self, text: str) -> list[int]:
        """Tokens of text that follows other text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
