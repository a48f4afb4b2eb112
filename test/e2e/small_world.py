"""A server in float32 with little room in VRAM and in RAM, and saves on request only.
Chats that name no conversation are linked by what they say."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.clients import PACKAGES, TOOLS, record, record_own
from e2e.helpers import Client, Reply, random_ids
from e2e.responses import STORED, record_responses
from e2e.talks import ChatTalk, GenerateTalk
from e2e.worlds import (
    FLOAT32,
    SMALL,
    Case,
    Stage,
    World,
    fresh,
    save_and_peek,
    start,
)
from engram.testing.samples import seeded_random

OUT_OF_VRAM = 14
OUT_OF_RAM = 45
"""Other requests of 200 tokens until a conversation has left VRAM, and RAM as well."""

SHARED_PROMPT = 150
LONG, SHORT = 40, 20
"""New tokens of two replies to one prompt: the shorter ends inside the longer one's path."""


def small_world(stage: Stage, folder: Path) -> World:
    """Conversations that have left VRAM, or RAM too, before they were saved."""
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    args = (*SMALL, *TOOLS, *STORED, "--snapshot-link-by-prefix")
    world = start(stage.server(folder, args, store=store, env=FLOAT32), store)
    client = world.client
    for name, complete in PACKAGES.items():
        world.facts[name] = record(client, name, complete)
    world.facts["own"] = record_own(client)
    world.facts["responses"] = record_responses(client)
    world.cases["lost"] = _lost(client, numbers)
    world.cases["evicted"] = _evicted(world, numbers)
    world.cases["short"] = _short(client, numbers)
    for name in ("base", "flipped"):
        talk = two_turns(client, numbers, name)
        client.save(conversation_id=name, turn_number=1)
        world.cases[name] = save_and_peek(client, numbers, name, talk)
    world.facts["linked"] = _linked(client, numbers)
    world.server.kill()
    world.server.start()
    return world


@dataclass
class Linked:
    """A chat of nobody's whose turns are told apart by what it says."""

    talk: ChatTalk
    replies: list[Reply]
    saved: dict[str, Any]


def _linked(client: Client, numbers: random.Random) -> Linked:
    """Two turns that name no conversation; the second is saved by the id of its reply."""
    talk, replies = ChatTalk(), []
    for length in (40, 20):
        # Not `draw`, whose questions would be turns.
        message = talk.message(numbers, length)
        replies.append(talk.say(client, message, None))
    return Linked(talk, replies, client.save(rid=replies[-1].rid))


def two_turns(client: Client, numbers: random.Random, conversation: str | None) -> GenerateTalk:
    talk = GenerateTalk()
    for length in (60, 30):
        talk.say(client, talk.message(numbers, length), conversation)
    return talk


def flood(client: Client, numbers: random.Random, count: int) -> None:
    """Requests of nobody's, until older states have had to make room."""
    for _ in range(count):
        client.generate(random_ids(numbers, 200), 1)


def _lost(client: Client, numbers: random.Random) -> Case:
    talk = two_turns(client, numbers, "lost")
    flood(client, numbers, OUT_OF_RAM)
    return save_and_peek(client, numbers, "lost", talk)


def _evicted(world: World, numbers: random.Random) -> Case:
    """Saved when only RAM has it, restored from there, and asked the same twice."""
    client = world.client
    talk = two_turns(client, numbers, "evicted")
    message = talk.message(numbers, 23)
    reference = talk.peek(client, message)
    flood(client, numbers, OUT_OF_VRAM)
    saved = client.save(conversation_id="evicted")
    world.facts["evicted tier"] = client.info(conversation_id="evicted")["tier"]
    world.facts["evicted restore"] = client.restore(conversation_id="evicted")
    world.facts["evicted from ram"] = talk.peek(client, message)
    return Case("evicted", talk, saved, message, reference)


def _short(client: Client, numbers: random.Random) -> Case:
    """Two replies to one prompt; the one that ends inside the other's path is saved."""
    prompt = random_ids(numbers, SHARED_PROMPT)
    long: Reply = client.generate(prompt, LONG, "long")
    talk = GenerateTalk()
    short = client.generate(prompt, SHORT, "short")
    assert short.tokens == long.tokens[:SHORT]
    talk.history = [*prompt, *short.tokens]
    return save_and_peek(client, numbers, "short", talk)
