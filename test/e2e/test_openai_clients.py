"""The official OpenAI packages, of Python and of Node, and Engram's own client, across a restart.

The Node package is used where there is one: ENGRAM_NODE_PATH names the `node_modules` it is in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from e2e.helpers import Client
from e2e.talks import ChatTalk
from e2e.worlds import CONTRACT, FLOAT32, QUICK, Stage, World, fresh, start
from engram import EngramClient
from engram.errors import ConversationBusyError
from engram.testing.samples import seeded_random

ARGS = (
    *(*CONTRACT, *QUICK, "--dtype", "float32", "--snapshot-durability", "sync"),
    *("--snapshot-min-interval-seconds", "0", "--tool-call-parser", "qwen25"),
    "--constrained-json-disable-any-whitespace",
)
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
    common = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 12}
    if fields.get("stream"):
        common["stream_options"] = {"include_usage": True}
    return {**common, **fields}


def asking(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool_body(recorded: Recorded) -> dict[str, Any]:
    """The next message, answered by a call of a tool and nothing else."""
    return body_of(
        [*recorded.messages, asking("is it cold")],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )


def record(client: Client, name: str, complete: Complete) -> Recorded:
    """Two turns, whole and streamed; what comes next is asked but not taken."""
    numbers, recorded = seeded_random(), Recorded()
    for stream in (False, True):
        talk = ChatTalk()
        talk.messages = list(recorded.messages)
        text = talk.draw(client, numbers, 20)
        body = body_of([*recorded.messages, asking(text)], conversation_id=name, stream=stream)
        reply = complete(client.url, body)
        recorded.replies.append(reply)
        recorded.boundaries.append(client.info(conversation_id=name)["token_count"])
        recorded.messages += [asking(text), {"role": "assistant", "content": reply["content"]}]
    recorded.next = complete(client.url, body_of([*recorded.messages, asking("go on")]))
    recorded.tool = complete(client.url, tool_body(recorded))
    body = body_of([asking("hello")], conversation_id=f"{name}-stateful", stateful=True)
    recorded.stateful.append(complete(client.url, body))
    return recorded


@pytest.fixture(scope="module")
def world(stage: Stage) -> Iterator[World]:
    """Recorded by every package, killed, started again."""
    stage.clear()
    folder = fresh(stage.folder / "openai")
    store = folder / "store"
    world = start(stage.server(folder, ARGS, store=store, env=FLOAT32), store)
    for name, complete in PACKAGES.items():
        world.facts[name] = record(world.client, name, complete)
    with EngramClient(world.server.url) as client:
        chat = client.conversation("own")
        world.facts["own"] = [
            chat.send("good morning", **OWN),
            chat.stream("and then", **OWN).reply,
        ]
    world.server.kill()
    world.server.start()
    yield world
    world.server.kill()
    world.client.http.close()


OWN: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_chat_and_a_stream_say_what_was_cached(world: World, package: str) -> None:
    recorded: Recorded = world.facts[package]
    whole, streamed = recorded.replies
    assert (whole["cached_tokens"], streamed["cached_tokens"]) == (0, recorded.boundaries[0])
    assert streamed["pieces"] > 1


@pytest.mark.parametrize("package", PACKAGES)
def test_the_next_turn_is_the_same_after_a_restart(world: World, package: str) -> None:
    recorded: Recorded = world.facts[package]
    body = body_of([*recorded.messages, asking("go on")])
    reply = PACKAGES[package](world.server.url, body)
    assert reply == recorded.next
    assert reply["cached_tokens"] == recorded.boundaries[-1]


@pytest.mark.parametrize("package", PACKAGES)
def test_tools_are_called_before_and_after_a_restart(world: World, package: str) -> None:
    recorded: Recorded = world.facts[package]
    reply = PACKAGES[package](world.server.url, tool_body(recorded))
    for one in (recorded.tool, reply):
        # The grammar lets the model go on with spaces, so that its reply may end at its length.
        assert one["finish_reason"] in ("tool_calls", "length"), one
        (call,) = one["tool_calls"]
        assert call["function"]["name"] == "weather", one
        assert json.loads(call["function"]["arguments"])["place"] in ("Rome", "Oslo"), one
        assert one["cached_tokens"] == recorded.boundaries[-1]
    assert [call["function"] for call in reply["tool_calls"]] == [
        call["function"] for call in recorded.tool["tool_calls"]
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_only_what_is_new_is_sent_after_a_restart(world: World, package: str) -> None:
    recorded: Recorded = world.facts[package]
    name = f"{package}-stateful"
    boundary = world.client.info(conversation_id=name)["token_count"]
    body = body_of([asking("go on")], conversation_id=name, stateful=True)
    reply = PACKAGES[package](world.server.url, body)
    assert reply["cached_tokens"] == boundary
    assert reply["prompt_tokens"] > recorded.stateful[0]["prompt_tokens"]


def test_engrams_own_client_goes_on_after_a_restart(world: World) -> None:
    _, second = world.facts["own"]
    with EngramClient(world.server.url) as client:
        chat = client.conversation("own")
        turns = [chat.info(turn=turn) for turn in (1, 2)]
        assert second.usage.cached_tokens == turns[0].token_count
        reply = chat.send("go on", **OWN)
        assert reply.usage is not None
        assert reply.usage.cached_tokens == turns[1].token_count
        again = chat.branch("again", turn=1)
        assert again.stream("and then", **OWN).reply.content == second.content
        other = chat.send("and then", from_turn=1, **OWN)
        assert other.content == second.content
        assert other.usage is not None
        assert other.usage.cached_tokens >= turns[0].token_count
        fork = chat.fork("own-fork", turn=2)
        assert fork.send("go on", **OWN).content == reply.content
        assert fork.info().conversation_id == "own-fork"
        explained = client.explain(reply.id)
        assert explained.cached_tokens == reply.usage.cached_tokens
        assert explained.prompt_tokens == reply.usage.prompt_tokens
        assert (explained.fetched_tokens, explained.fetched_from) == (
            turns[1].token_count,
            "disk",
        )
        assert explained.earlier is not None
        assert explained.earlier.common_tokens >= turns[1].token_count
        assert "good morning" in client.texts([turns[0].fill_ids or []])[0]


def test_a_stream_that_is_left_is_no_turn(world: World) -> None:
    with EngramClient(world.server.url) as client:
        chat = client.conversation("left")
        chat.send("hello", **OWN)
        with chat.stream("more", max_tokens=600, ignore_eos=True, temperature=0) as stream:
            next(iter(stream))
        reply = None
        while reply is None:
            # Until the server has noticed that nobody reads.
            with suppress(ConversationBusyError):
                reply = chat.send("more", **OWN)
        assert reply.usage is not None
        assert chat.info().turn_number == 2
        assert reply.usage.cached_tokens >= chat.info(turn=1).token_count


def test_the_engine_without_a_server_goes_on_with_what_a_server_stored(
    world: World, stage: Stage
) -> None:
    """The last: the server has to let go of its store."""
    with EngramClient(world.server.url) as client:
        boundary = client.conversation("own").info(turn=1).token_count
    world.server.kill()
    arguments = {
        "model_path": str(stage.model(1)),
        "snapshot_dir": str(world.store),
        "dtype": "float32",
        "mamba_radix_cache_strategy": "no_buffer",
        "max_total_tokens": 2048,
        "max_mamba_cache_size": 24,
        "skip_server_warmup": True,
        "snapshot_min_interval_seconds": 0,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_talk.py")), json.dumps(arguments)],
        env={**os.environ, **FLOAT32},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    second = world.facts["own"][1]
    assert report["restored"]["source_tier"] == "disk"
    assert report["next"]["content"] == second.content
    # The same was said before: where conversations part, SGLang keeps a state too.
    assert report["next"]["usage"]["cached_tokens"] >= boundary
    assert "".join(report["pieces"]) == second.content
    assert len(report["pieces"]) > 1
    newest, inside = report["saved"]
    assert newest > 2
    assert (
        0
        < inside
        < sum(report["inside"]["usage"][n] for n in ("prompt_tokens", "completion_tokens"))
    )
    cached, turns = report["plain"]
    assert (cached, turns) == (20 + 4 - 1, 2)
    assert report["untagged"] > 0
    assert report["after leaving"] > boundary
    # The reply that was left is no turn, the one after it is.
    assert max(report["turns"]) == newest + 1
    assert (report["batch"], report["nobody"]) == ("unsupported", "not_found")
    assert "tensor parallelism" in report["refused"]
