"""The servers the tests look at: each recorded, killed and started again, once for all tests."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import Client, Reply, random_ids, random_text
from e2e.talks import (
    ChatTalk,
    CompletionTalk,
    GenerateTalk,
    KeyedTalk,
    StatefulTalk,
    StreamTalk,
    Talk,
)
from engram.store.layout import Layout
from engram.testing.chat import NEVER_END
from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.tamper import add_to_value, rewrite_segment
from engram.testing.tiny_model import write_tiny_model

TURNS = 3
LENGTHS = (70, 31, 45)
NEXT_LENGTH = 23
INTERLEAVED = [f"interleaved-{n}" for n in range(4)]

KEYED = {
    "salted": {"cache_salt": "mine"},
    "extra-key": {"extra_key": "mine"},
    "both-keys": {"extra_key": "mi", "cache_salt": "ne"},
}
"""Conversations whose states are kept apart from those of the same tokens: the fields of their
requests."""

CONTRACT = (
    *("--enable-snapshot-persistence", "--mamba-scheduler-strategy", "no_buffer"),
    "--disable-radix-cache",
)
"""The published launch command; only model, host, port and directory come on top."""

QUICK = ("--skip-server-warmup", "--max-total-tokens", "2048", "--max-mamba-cache-size", "24")

SMALL = (
    *CONTRACT,
    *QUICK,
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--max-warm-memory-gb", "0.008"),
)
"""Room for about ten short conversations in VRAM and for about twenty in RAM."""

FLOAT32 = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}


@dataclass
class Case:
    """A conversation saved on a server that was then killed.

    `reference` is what that server itself answered to `message` after the save.
    """

    name: str
    talk: Talk
    saved: dict[str, Any]
    message: Any
    reference: Reply


@dataclass
class World:
    """A running server, its store, and what was recorded before it was killed."""

    server: ServerProcess
    store: Path
    client: Client
    cases: dict[str, Case] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What a test needs of the time before the kill beyond cases."""

    def files(self) -> set[str]:
        """Everything in the store and beside it, but SQLite's own files."""
        return {
            str(path.relative_to(self.store.parent))
            for path in self.store.parent.rglob("*")
            if not path.name.startswith("catalog.sqlite") and path.is_file()
        }

    def segments(self) -> set[str]:
        return {path.stem for path in self.store.rglob("*.seg")}


class Stage:
    """Keeps one world at a time: an idle SGLang server still takes a core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._worlds: dict[str, World] = {}
        self._recorded: dict[str, World] = {}
        self._failed: dict[str, BaseException] = {}
        self._models: dict[str, Path] = {}
        self._made: list[ServerProcess] = []

    def world(self, name: str, make: Callable[[Stage, Path], World]) -> World:
        if name in self._failed:
            pytest.fail(f"the world could not be made: {self._failed[name]}", pytrace=False)
        if name not in self._worlds:
            self.clear()
            self._made.clear()
            try:
                world = make(self, self.folder / name)
            except BaseException as error:
                self._failed[name] = error
                for server in self._made:
                    server.kill()
                raise
            self._worlds[name] = self._recorded[name] = world
        return self._worlds[name]

    def past(self, name: str, make: Callable[[Stage, Path], World]) -> World:
        """A world for what was recorded in it; its server need not be running any more."""
        return self._recorded.get(name) or self.world(name, make)

    def clear(self) -> None:
        for world in self._worlds.values():
            world.server.kill()
            world.client.http.close()
        self._worlds.clear()

    def model(self, seed: int, family: str = "granite-hybrid", dtype: str = "bfloat16") -> Path:
        name = f"model-{family}-{dtype}-{seed}"
        if name not in self._models:
            out = self.folder / name
            self._models[name] = write_tiny_model(out, family, seed=seed, dtype=dtype)
        return self._models[name]

    def server(
        self,
        folder: Path,
        args: Sequence[str],
        *,
        seed: int = 1,
        model: Path | None = None,
        store: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ServerProcess:
        """A server that is not started yet; its log is in `folder`."""
        where = [] if store is None else ["--snapshot-dir", str(store)]
        self._made.append(
            ServerProcess(
                model or self.model(seed), [*args, *where], env, folder / "server.log", timeout=600
            )
        )
        return self._made[-1]


# ---- the published command, bfloat16 ----


def restarted_world(stage: Stage, folder: Path) -> World:
    """Conversations over every route; the catalog is damaged after the kill."""
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    world = start(stage.server(folder, CONTRACT, store=store), store)
    client = world.client
    talks: dict[str, Talk] = {
        "generate": GenerateTalk(),
        "generate-without-restore": GenerateTalk(),
        "generate-untagged": GenerateTalk(),
        "chat": ChatTalk(),
        "chat-untagged": ChatTalk(),
        "stream": StreamTalk(),
        "completion": CompletionTalk(),
        "stateful": StatefulTalk(),
        "renamed": GenerateTalk(),
        "travelling": GenerateTalk(),
        "flipped": GenerateTalk(),
        "flipped-restore": GenerateTalk(),
        "altered": GenerateTalk(),
        "unaltered": GenerateTalk(),
        **{name: KeyedTalk(**fields) for name, fields in KEYED.items()},
    }
    for name, talk in talks.items():
        for length in LENGTHS:
            talk.say(client, talk.draw(client, numbers, length), name)
        world.cases[name] = save_and_peek(client, numbers, name, talk)
    world.cases["adopted"] = _adopted(client, numbers)
    world.cases |= interleaved(client, numbers, INTERLEAVED)
    world.facts["prefix"] = _prefix(client, numbers)
    world.facts["never"] = client.generate(random_ids(numbers, 40)).rid
    world.server.kill()

    world.facts["copy"] = shutil.copytree(store, folder / "copy" / "snapshots")
    altered, unaltered = (world.cases[n].saved["snapshot_id"] for n in ("altered", "unaltered"))
    rewrite_segment(store, altered, add_to_value("ssm.0", 8.0))
    rewrite_segment(store, unaltered, add_to_value("ssm.0", 0.0))
    Layout(store).catalog.write_bytes(b"no database " * 1000)
    world.server.start()
    world.facts["health"] = client.http.get("/v1/memory/health").json()
    return world


def save_and_peek(
    client: Client,
    numbers: random.Random,
    name: str,
    talk: Talk,
    save: Mapping[str, Any] | None = None,
) -> Case:
    """Save the newest turn and ask what the next one will answer.

    The question is not tagged, so that no trigger saves it.
    """
    saved = client.save(**(save or {"conversation_id": name}))
    message = talk.message(numbers, NEXT_LENGTH)
    reference = talk.peek(client, message)
    assert reference.cached == saved["token_count"], (name, reference, saved)
    return Case(name, talk, saved, message, reference)


def next_turn_is_exact(world: World, case: Case, conversation: str | None) -> None:
    """The reply of the server that never stopped, bit for bit, computed from the same boundary."""
    reply = case.talk.peek(world.client, case.message, conversation)
    assert reply.cached == case.saved["token_count"]
    assert reply.prompt_tokens == case.reference.prompt_tokens
    assert reply.output == case.reference.output


def fresh(folder: Path) -> Path:
    """A folder of that name with nothing in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _prefix(client: Client, numbers: random.Random) -> dict[str, Any]:
    """A named prefix, and what a chat that begins with it is answered."""
    system = {"role": "system", "content": random_text(numbers, 90)}
    made = client.ok("/v1/prefixes", {"name": "guide", "messages": [system]})
    messages = [system, {"role": "user", "content": random_text(numbers, 20)}]
    body = {"messages": messages, "logit_bias": NEVER_END}
    reply = StatefulTalk.post(client, "/v1/chat/completions", body)
    return {"made": made, "body": body, "reply": reply}


def _adopted(client: Client, numbers: random.Random) -> Case:
    """Turns of no conversation, of which the last is saved by its request's id."""
    talk = GenerateTalk()
    for length in LENGTHS:
        last = talk.say(client, talk.message(numbers, length), None)
    save = {"rid": last.rid, "conversation_id": "adopted"}
    return save_and_peek(client, numbers, "adopted", talk, save)


def interleaved(client: Client, numbers: random.Random, names: Sequence[str]) -> dict[str, Case]:
    """Clients that talk at the same time, each in its own conversation."""
    talks = {name: GenerateTalk() for name in names}
    messages = {name: [random_ids(numbers, length) for length in LENGTHS] for name in talks}

    def all_turns(name: str) -> None:
        for message in messages[name]:
            talks[name].say(client, message, name)

    with ThreadPoolExecutor(len(talks)) as clients:
        list(clients.map(all_turns, talks))
    return {name: save_and_peek(client, numbers, name, talk) for name, talk in talks.items()}


def start(server: ServerProcess, store: Path) -> World:
    server.start()
    return World(server, store, Client(server.url))
