"""A model that says what a script says, on the service's engine: its tokens are bytes.

What it is asked is kept, so that a test can look at the prompts.  Its template writes a message as
``<role>content`` and ends a reply with a token of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from engram.agents.host import AgentHost
from engram.agents.ports import ChatReply, Message, OnWritten
from engram.conversation.turns import RunningRequest, Tag
from engram.core.tokens import to_tokens
from engram.service.recorded import Place
from unit.service.engine import Server

END = 256
Script = Callable[[int, Mapping[str, Any]], dict[str, Any] | str]
"""The number of the reply and the request -> the reply: text, or a message with tool calls."""


def calling(*calls: tuple[str, Any]) -> dict[str, Any]:
    """A message that calls tools; arguments that are no text are written as JSON."""
    made = [
        {
            "id": f"call-{name}-{number}-{given}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": given if isinstance(given, str) else json.dumps(given),
            },
        }
        for number, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


class ScriptedChat:
    """`engram.agents.ports.ChatEngine`."""

    def __init__(self, server: Server, script: Script) -> None:
        self._server = server
        self._script = script
        self.parses_tool_calls = True
        self.asked: list[dict[str, Any]] = []
        self.forgetful = False
        """Whether the template drops replies that are not the last."""

    async def complete(
        self, body: Mapping[str, Any], turn: Tag | None = None, on_written: OnWritten | None = None
    ) -> ChatReply:
        self.asked.append(dict(body))
        number = sum(message["role"] == "assistant" for message in body["messages"])
        said = self._script(number, body)
        message = {"role": "assistant", "content": said} if isinstance(said, str) else said
        prompt = body.get("input_ids")
        tag = turn or Tag(body["conversation_id"])
        if body.get("stateful"):
            assert turn is None
            place = Place(**body["continue_from"])
            start = await self._server.service.recorded.start(
                "", body["conversation_id"], body["branch_name"], place
            )
            assert start.source is not None
            new = self.encode(self.render(body["messages"], (), more=True))
            prompt, tag = [*start.source.tokens.tolist(), *new], start.tag
        elif prompt is None:
            prompt = self.encode(self.render(body["messages"], (), more=True))
        written = json.dumps(message)
        output = [*written.encode(), END]
        rid = f"reply-{len(self.asked)}-{self._server.requests}"
        self._server.requests += 1
        gate = self._server.service.gate
        await gate.admit(RunningRequest(rid, to_tokens(prompt), tag))
        if on_written is not None:
            for part in range(0, len(written), 5):
                on_written(written[part : part + 5])
                await asyncio.sleep(0)
        self._server.engine.computed([*prompt, *output])
        gate.finished(rid, output)
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        return ChatReply(rid, message, reason, list(prompt), output, 0)

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, more: bool) -> str:
        parts = []
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            reply = message["role"] == "assistant"
            content = "" if self.forgetful and reply and not last else message.get("content") or ""
            parts.append(f"<{message['role']}>{content}{'|' if reply else ''}")
        return "".join(parts) + ("<assistant>" if more else "")

    def encode(self, text: str) -> list[int]:
        return [END if part == ord("|") else part for part in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < END).decode(errors="replace")


def host_of(
    server: Server, script: Script, path: Path, *, keyed: bool = False
) -> tuple[AgentHost, ScriptedChat]:
    """The agents of a server with a scripted model; not started yet."""
    chat = ScriptedChat(server, script)
    return AgentHost(server.settings, server.service, chat, path, keyed=keyed), chat


def server_in(folder: Path, **options: Any) -> Server:
    """A server's service with random tokens that are always the same."""
    return Server.start(folder / "store", Random(1), enable_agent_tools=True, **options)
