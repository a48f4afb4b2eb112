"""A server with too little of everything, in float32: small chunks, a small pool, few requests."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

import psutil

from e2e.helpers import Client, Reply, until
from e2e.talks import GenerateTalk
from e2e.worlds import CONTRACT, FLOAT32, Stage, World, fresh, save_and_peek, start
from engram.testing.samples import seeded_random

POOL = 1200
"""Tokens of KV in VRAM."""
CHUNK = 32
RUNNING = 6
WARM_GB = 0.02

PRESSURED = (
    *CONTRACT,
    *("--skip-server-warmup", "--max-total-tokens", str(POOL), "--max-mamba-cache-size", "40"),
    *("--dtype", "float32", "--chunked-prefill-size", str(CHUNK)),
    *("--max-running-requests", str(RUNNING), "--schedule-conservativeness", "0.1"),
    *("--snapshot-trigger-policy", "manual_only", "--max-warm-memory-gb", str(WARM_GB)),
    *("--conversation-active-timeout", "2"),
)


KEPT = [f"kept-{n}" for n in range(4)]
"""Conversations that another server goes on with."""


def pressured_world(stage: Stage, folder: Path) -> World:
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    world = start(stage.server(folder, PRESSURED, store=store, env=FLOAT32), store)
    for name in KEPT:
        talk = talked(world.client, numbers, name)
        world.cases[name] = save_and_peek(world.client, numbers, name, talk)
    return world


def alone_world(stage: Stage, folder: Path) -> World:
    """The store of the server under pressure, on one that runs one request at a time."""
    past = stage.past("pressured", pressured_world)
    stage.clear()
    args = (*PRESSURED, "--max-running-requests", "1")
    server = stage.server(fresh(folder), args, store=past.store, env=FLOAT32)
    world = start(server, past.store)
    world.cases = past.cases
    return world


def talked(client: Client, numbers: random.Random, name: str, *lengths: int) -> GenerateTalk:
    """A conversation after turns with messages of these lengths."""
    talk = GenerateTalk()
    for length in lengths or (60, 30):
        talk.say(client, talk.message(numbers, length), name)
    return talk


def cold(
    client: Client, tokens: list[int], new_tokens: int, params: dict[str, Any] | None = None
) -> Reply:
    """The same tokens computed from the first one on: under another key they share nothing."""
    reply = client.generate(tokens, new_tokens, params=params, extra_key=uuid.uuid4().hex)
    assert reply.cached == 0
    return reply


def health(world: World) -> dict[str, Any]:
    response = world.client.http.get("/v1/memory/health")
    response.raise_for_status()
    body: dict[str, Any] = response.json()
    return body


def rank(world: World) -> dict[str, Any]:
    """What the one rank says of itself."""
    [found] = health(world)["ranks"]
    answer: dict[str, Any] = found
    return answer


def nothing_is_held(world: World) -> bool:
    found = rank(world)
    return not (found["leases"] or found["ram_held_bytes"] or found["tree_locks"])


def check_at_rest(world: World) -> None:
    """Every lease, copy and lock has ended, nothing was contained, and the scheduler lives.

    Idle, it has compared its pools with its tree by then, and would have ended at a leaked slot.
    """
    until(lambda: nothing_is_held(world), "something is held although nothing runs")
    found = health(world)
    assert found["ranks"][0]["contained_errors"] == 0
    assert found["ranks"][0]["corrupt"] == 0
    assert not list((world.store / "quarantine").glob("*"))
    assert psutil.pid_exists(scheduler_of(world).pid)


def scheduler_of(world: World) -> psutil.Process:
    """The process with the model in it: the one with the most memory."""
    assert world.server.process is not None
    family = psutil.Process(world.server.process.pid).children(recursive=True)
    return max(family, key=lambda process: process.memory_info().rss)
