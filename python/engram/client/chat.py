"""Replies that are generated: whole, or put together from a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import httpx
from pydantic import Field

from engram.client.binding import Place
from engram.client.exchange import reply_as_json
from engram.client.failures import failure_of, unexpected
from engram.client.results import Result
from engram.core.ids import DEFAULT_BRANCH
from engram.errors import InvalidRequestError, ServerUnreachableError

Message: TypeAlias = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What is said: a user's text, one message in OpenAI's form, or several (results of tools)."""

DONE: Final = b"[DONE]"
OURS: Final = ("messages", "stream", "branch_name", "continue_from")
"""Fields of the body that are no options."""


class Usage(Result):
    """Tokens: `cached_tokens` of the `prompt_tokens` were not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Function(Result):
    """What a tool call calls, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Result):
    """One call that the model asks for."""

    id: str
    function: Function
    type: str = "function"


class Reply(Result):
    """A turn's reply; `raw` is the chat completion as it came, of a stream None."""

    id: str
    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    finish_reason: str | None
    usage: Usage | None
    raw: dict[str, Any] | None = Field(default=None, repr=False)

    def __str__(self) -> str:
        return self.content


def chat_body(
    place: Place, message: Message, options: Mapping[str, Any], from_turn: int | None = None
) -> dict[str, Any]:
    """The body of a turn that says something new, of the branch's newest turn or another."""
    body = turn_body(place, options)
    body["messages"] = messages_of(message)
    if from_turn is not None:
        body["continue_from"] = {"branch_name": place.branch_name, "turn_number": from_turn}
    return body


def turn_body(place: Place, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the bodies of all turns have; options that are None are left out.

    Raises `InvalidRequestError` for an option that is not the caller's to set.
    """
    for name in OURS:
        if name in options:
            raise InvalidRequestError(
                f"{name} is no option of a conversation", details={"field": name}
            )
    body = {name: value for name, value in options.items() if value is not None}
    if place.branch_name != DEFAULT_BRANCH:
        body["branch_name"] = place.branch_name
    return body


def messages_of(message: Message) -> list[dict[str, Any]]:
    """The messages of a turn in OpenAI's form."""
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    if isinstance(message, Mapping):
        return [dict(message)]
    return [dict(one) for one in message]


def reply_of(response: httpx.Response) -> Reply:
    """A whole chat completion."""
    body = reply_as_json(response)
    try:
        choice = body["choices"][0]
        said = choice["message"]
        return Reply(
            id=body["id"],
            content=said.get("content") or "",
            reasoning=said.get("reasoning_content") or "",
            tool_calls=said.get("tool_calls") or [],
            finish_reason=choice.get("finish_reason"),
            usage=usage_of(body.get("usage")),
            raw=body,
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise unexpected(response.status_code, why, response.content) from None


def usage_of(given: Mapping[str, Any] | None) -> Usage | None:
    """The usage in OpenAI's form."""
    if given is None:
        return None
    return Usage(
        prompt_tokens=given["prompt_tokens"],
        completion_tokens=given.get("completion_tokens") or 0,
        cached_tokens=(given.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


class Events:
    """Takes a body of server-sent events in pieces; gives the data of each event.

    Lines end with line feeds here: other characters that Unicode calls line ends occur in JSON.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The events that are complete with this piece."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass
class Assembly:
    """A reply as it grows out of the chunks of a stream."""

    id: str = ""
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    done: bool = False
    _events: Events = field(default_factory=Events)
    _calls: dict[int, dict[str, str]] = field(default_factory=dict)

    def feed(self, part: bytes) -> Iterator[str]:
        """Pieces of the text that this piece of the body brings.  Raises what the server tells."""
        for data in self._events.feed(part):
            if data == DONE:
                self.done = True
            elif data:
                yield from self._take(data)

    def finish(self) -> Reply:
        """The whole reply.  `ServerUnreachableError` if the stream ended before it did."""
        if not self.done:
            raise ServerUnreachableError(
                "the stream ended in the middle of the reply",
                hint="the server may have stopped; what was said is no turn if it did not finish",
                details={"content": "".join(self.content)},
            )
        return Reply(
            id=self.id,
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            tool_calls=[
                ToolCall(id=one["id"], function=Function(**{k: one[k] for k in _FUNCTION}))
                for _, one in sorted(self._calls.items())
            ],
            finish_reason=self.finish_reason,
            usage=self.usage,
        )

    def _take(self, data: bytes) -> Iterator[str]:
        try:
            chunk = json.loads(data)
            if not isinstance(chunk, dict):
                raise TypeError("an event is no JSON object")
            if "choices" not in chunk:
                raise failure_of(int(_status_in(chunk)), data)
            self.id = chunk.get("id") or self.id
            self.usage = usage_of(chunk.get("usage")) or self.usage
            for choice in chunk["choices"]:
                yield from self._choice(choice)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise unexpected(200, f"{type(error).__name__}: {error}", data) from None

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[str]:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        if delta.get("reasoning_content"):
            self.reasoning.append(delta["reasoning_content"])
        for call in delta.get("tool_calls") or ():
            self._call(call)
        if delta.get("content"):
            self.content.append(delta["content"])
            yield delta["content"]

    def _call(self, part: Mapping[str, Any]) -> None:
        """Tool calls come in pieces too: the name first, then the arguments bit by bit."""
        one = self._calls.setdefault(
            part.get("index") or 0, {"id": "", "name": "", "arguments": ""}
        )
        one["id"] = part.get("id") or one["id"]
        function = part.get("function") or {}
        one["name"] = function.get("name") or one["name"]
        one["arguments"] += function.get("arguments") or ""


_FUNCTION: Final = ("name", "arguments")


def _status_in(chunk: Mapping[str, Any]) -> int:
    """The status that an error within a stream would have had."""
    inner = chunk.get("error")
    code = inner.get("code") if isinstance(inner, dict) else None
    return code if isinstance(code, int) else 500
