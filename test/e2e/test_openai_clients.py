"""The official OpenAI packages of Python and Node, and Engram's own client, across a restart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from e2e.clients import OWN, PACKAGES, Recorded, asking, body_of, tool_body
from e2e.worlds import FLOAT32, Stage, World
from engram import EngramClient
from engram.errors import ConversationBusyError


@pytest.mark.parametrize("package", PACKAGES)
def test_a_chat_and_a_stream_say_what_was_cached(small: World, package: str) -> None:
    recorded: Recorded = small.facts[package]
    whole, streamed = recorded.replies
    assert (whole["cached_tokens"], streamed["cached_tokens"]) == (0, recorded.boundaries[0])
    assert streamed["pieces"] > 1


@pytest.mark.parametrize("package", PACKAGES)
def test_the_next_turn_is_the_same_after_a_restart(small: World, package: str) -> None:
    recorded: Recorded = small.facts[package]
    body = body_of([*recorded.messages, asking("go on")])
    reply = PACKAGES[package](small.server.url, body)
    assert reply == recorded.next
    assert reply["cached_tokens"] == recorded.boundaries[-1]


@pytest.mark.parametrize("package", PACKAGES)
def test_tools_are_called_before_and_after_a_restart(small: World, package: str) -> None:
    recorded: Recorded = small.facts[package]
    reply = PACKAGES[package](small.server.url, tool_body(recorded))
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
def test_only_what_is_new_is_sent_after_a_restart(small: World, package: str) -> None:
    recorded: Recorded = small.facts[package]
    name = f"{package}-stateful"
    boundary = small.client.info(conversation_id=name)["token_count"]
    body = body_of([asking("go on")], conversation_id=name, stateful=True)
    reply = PACKAGES[package](small.server.url, body)
    assert reply["cached_tokens"] == boundary
    assert reply["prompt_tokens"] > recorded.stateful[0]["prompt_tokens"]


def test_engrams_own_client_goes_on_after_a_restart(small: World) -> None:
    _, second = small.facts["own"]
    with EngramClient(small.server.url) as client:
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


def test_a_stream_that_is_left_is_no_turn(small: World) -> None:
    with EngramClient(small.server.url) as client:
        chat = client.conversation("left-stream")
        chat.send("hello", **OWN)
        chat.save()
        with chat.stream("more", max_tokens=600, ignore_eos=True, temperature=0) as stream:
            next(iter(stream))
        reply = None
        while reply is None:
            # Until the server has noticed that nobody reads.
            with suppress(ConversationBusyError):
                reply = chat.send("more", **OWN)
        assert reply.usage is not None
        assert chat.save().turn_number == 2
        assert reply.usage.cached_tokens >= chat.info(turn=1).token_count


def test_the_engine_without_a_server_goes_on_with_what_a_server_stored(
    small: World, stage: Stage, tmp_path: Path
) -> None:
    """In a copy of what it stored: the server holds its own."""
    with EngramClient(small.server.url) as client:
        boundary = client.conversation("own").info(turn=1).token_count
    store = shutil.copytree(small.store, tmp_path / "snapshots")
    arguments = {
        "model_path": str(stage.model(1)),
        "snapshot_dir": str(store),
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
    second = small.facts["own"][1]
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
    assert "pipeline parallelism" in report["refused"]
