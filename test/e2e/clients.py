"""Clients as their users have them: the official OpenAI packages, of Python and of Node, and
Engram's own.

The Node package is used where there is one: ENGRAM_NODE_PATH names the `node_modules` it is in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from e2e.helpers import Client, random_text
from engram import EngramClient
from engram.client.chat import Reply
from engram.testing.chat import NEVER_END
from engram.testing.samples import seeded_random

TOOLS = ("--tool-call-parser", "qwen25", "--constrained-json-disable-any-whitespace")
"""What a server needs for the calls of tools here."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
NODE_PATH = os.environ.get("ENGRAM_NODE_PATH", "")
SCRIPT = Path(__file__).with_name("openai_client.cjs")
Complete = Callable[[str, dict[str, Any]], dict[str, Any]]


def with_python(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """One chat completion with the Python package."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    own = {name: body[name] for name in ("conversation_id", "stateful") if name in body}
    standard = {name: value for name, value in body.items() if name not in own}
    made: Any = client.chat.completions.create(**standard, extra_body=own)
    if body.get("stream"):
        return _put_together(made)
    choice = made.choices[0]
    return {
        "content": choice.message.content,
        "tool_calls": [call.model_dump() for call in choice.message.tool_calls or ()],
        "finish_reason": choice.finish_reason,
        "prompt_tokens": made.usage.prompt_tokens,
        "cached_tokens": made.usage.prompt_tokens_details.cached_tokens,
        "pieces": 1,
    }


def _put_together(chunks: Any) -> dict[str, Any]:
    """The reply that a stream without tools is."""
    texts, finish, usage = [], None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts += [choice.delta.content] if choice.delta.content else []
            finish = choice.finish_reason or finish
    assert usage is not None
    return {
        "content": "".join(texts),
        "tool_calls": [],
        "finish_reason": finish,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "pieces": len(texts),
    }


def with_node(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The same with the Node package."""
    done = subprocess.run(
        ["node", str(SCRIPT)],
        input=json.dumps({"url": url, "body": body}),
        env={**os.environ, "NODE_PATH": NODE_PATH},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


PACKAGES: dict[str, Complete] = {"python": with_python}
if NODE_PATH and shutil.which("node"):
    PACKAGES["node"] = with_node


@dataclass
class Recorded:
    """What one package was told before the kill."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    next: dict[str, Any] = field(default_factory=dict)
    tool: dict[str, Any] = field(default_factory=dict)
    stateful: list[dict[str, Any]] = field(default_factory=list)


def body_of(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A greedy completion whose reply is of its full length, and text that reads back as it was."""
    common = {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 12,
        "logit_bias": NEVER_END,
    }
    if fields.get("stream"):
        common["stream_options"] = {"include_usage": True}
    return {**common, **fields}


def asking(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool_body(recorded: Recorded) -> dict[str, Any]:
    """The next message, answered by a call of a tool and nothing else."""
    return body_of(
        [*recorded.messages, asking("is it cold")],
        logit_bias=None,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )


def record(client: Client, name: str, complete: Complete) -> Recorded:
    """Two turns, whole and streamed; what comes next is asked but not taken."""
    numbers, recorded = seeded_random(), Recorded()
    for stream in (False, True):
        text = random_text(numbers, 20)
        body = body_of([*recorded.messages, asking(text)], conversation_id=name, stream=stream)
        reply = complete(client.url, body)
        recorded.replies.append(reply)
        recorded.boundaries.append(client.save(conversation_id=name)["token_count"])
        recorded.messages += [asking(text), {"role": "assistant", "content": reply["content"]}]
    recorded.next = complete(client.url, body_of([*recorded.messages, asking("go on")]))
    recorded.tool = complete(client.url, tool_body(recorded))
    body = body_of(
        [asking(f"hello from {name}")], conversation_id=f"{name}-stateful", stateful=True
    )
    recorded.stateful.append(complete(client.url, body))
    client.save(conversation_id=f"{name}-stateful")
    return recorded


OWN: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def record_own(client: Client) -> list[Reply]:
    """Two turns with Engram's own client, whole and streamed."""
    with EngramClient(client.url) as own:
        chat = own.conversation("own")
        replies = [chat.send("good morning", **OWN)]
        chat.save()
        replies.append(chat.stream("and then", **OWN).reply)
        chat.save()
    return replies
