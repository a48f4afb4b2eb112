"""What makes a turn a snapshot by itself, and what keeps one from being made: a reply with tool
calls, a state with a NaN.

Two servers, one after the other on one store, of a model that has a NaN for one of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from e2e.helpers import random_ids
from e2e.worlds import CONTRACT, FLOAT32, QUICK, Stage, World, fresh, start
from engram.testing.samples import seeded_random
from engram.testing.tiny_model import write_tiny_model
from engram.testing.tiny_tokenizer import BYTES, CHARACTERS, SPECIALS

ARGS = (
    *(*CONTRACT, *QUICK, "--dtype", "float32", "--snapshot-min-interval-seconds", "0"),
    *("--snapshot-trigger-policy", "on_tool_call", "--snapshot-durability", "sync"),
    *("--tool-call-parser", "qwen25", "--constrained-json-disable-any-whitespace"),
)
POISON = len(SPECIALS) + len(CHARACTERS) + len(BYTES) - 1
"""A token that no text has: the escape of a byte."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}

SPACES = [len(SPECIALS) + place for place, one in enumerate(CHARACTERS) if one.isspace()]

CALLED: dict[str, Any] = {
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "logit_bias": {str(token): -100 for token in SPACES},
}
"""The grammar of one call, and nothing else: it allows spaces without end, which a model of random
weights may write until its reply is cut."""


def poisoned_model(out: Path) -> Path:
    """A model that computes a NaN from one token on, and is like any other without it."""
    model = write_tiny_model(out, seed=1)
    path = model / "model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][POISON] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def folder(stage: Stage) -> Path:
    stage.clear()
    return fresh(stage.folder / "triggers")


@pytest.fixture(scope="module")
def world(stage: Stage, folder: Path) -> Iterator[World]:
    store = folder / "store"
    model = poisoned_model(folder / "model")
    world = start(stage.server(folder, ARGS, store=store, model=model, env=FLOAT32), store)
    yield world
    world.server.kill()
    world.client.http.close()


def chat(world: World, conversation: str, text: str, **fields: Any) -> dict[str, Any]:
    response = world.client.post(
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "conversation_id": conversation,
            "temperature": 0,
            "max_tokens": 200,
            **fields,
        },
    )
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        body: dict[str, Any] = response.json()
        return body
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return {"chunks": [json.loads(line) for line in lines]}


def turns(world: World, conversation: str) -> list[int]:
    """The turns that are saved."""
    reply = world.client.post("/list_snapshots", {"conversation_id": conversation})
    if reply.status_code == 404:
        return []
    return [one["turn_number"] for one in reply.json()["snapshots"]]


def test_a_reply_with_tool_calls_is_saved_when_its_client_has_it(world: World) -> None:
    assert not chat(world, "tools", "hello")["choices"][0]["message"].get("tool_calls")
    assert turns(world, "tools") == []
    reply = chat(world, "tools", "is it cold", **CALLED)
    (choice,) = reply["choices"]
    (call,) = choice["message"]["tool_calls"][:1]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["place"] in ("Rome", "Oslo")
    assert turns(world, "tools") == [2]
    assert world.client.info(conversation_id="tools", turn_number=2)["durability"] == "sync"
    chat(world, "tools", "thanks")
    assert turns(world, "tools") == [2]
    assert world.client.restore(conversation_id="tools")["verified"] is True


def test_a_stream_with_tool_calls_is_saved_before_it_ends(world: World) -> None:
    plain = chat(world, "stream", "hello", stream=True)
    assert plain["chunks"]
    assert turns(world, "stream") == []
    reply = chat(world, "stream", "cold", **CALLED, stream=True)
    deltas = [choice["delta"] for chunk in reply["chunks"] for choice in chunk["choices"]]
    assert any(delta.get("tool_calls") for delta in deltas)
    assert turns(world, "stream") == [2]


def generate(world: World, conversation: str, ids: list[int]) -> None:
    # Without logprobs: those are NaN, which JSON has not.
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": params, "conversation_id": conversation}
    response = world.client.post("/generate", body)
    assert response.status_code == 200, response.text


def test_a_state_with_a_nan_is_not_saved_and_others_are(world: World) -> None:
    numbers = seeded_random()
    generate(world, "ill", [*random_ids(numbers, 20), POISON, *random_ids(numbers, 9)])
    error = world.client.refused("/save_snapshot", {"conversation_id": "ill"}, 409)
    assert error["error"] == "state_unhealthy"
    assert "NaN" in error["message"] or "nan" in error["message"]
    assert turns(world, "ill") == []
    generate(world, "well", random_ids(numbers, 30))
    world.client.save(conversation_id="well")
    assert world.client.info(conversation_id="well")["health"] is None


def test_who_wants_it_all_the_same_is_told_in_the_metadata(
    stage: Stage, folder: Path, world: World
) -> None:
    """The last test here: it takes the place of the server."""
    world.server.kill()
    args = (*ARGS, "--snapshot-health-failure-policy", "log_and_continue")
    model = folder / "model"
    server = stage.server(folder, args, store=world.store, model=model, env=FLOAT32)
    again = start(server, world.store)
    try:
        numbers = seeded_random()
        generate(again, "ill", [*random_ids(numbers, 20), POISON, *random_ids(numbers, 9)])
        again.client.save(conversation_id="ill")
        assert again.client.info(conversation_id="ill")["health"]
        assert turns(again, "tools") == [2]
    finally:
        again.server.kill()
        again.client.http.close()
