"""A server whose store a test can make slow, blocked or failing, as it runs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.helpers import Client, Output, Reply, native_reply, random_ids
from e2e.talks import (
    NEW_TOKENS,
    ChatTalk,
    CompletionTalk,
    GenerateTalk,
    StreamTalk,
    Talk,
    _cached,
    openai_client,
)
from e2e.worlds import CONTRACT, FLOAT32, QUICK, Case, Stage, World, fresh, save_and_peek
from engram.testing.faults import FaultControl
from engram.testing.samples import seeded_random

PLUGIN = Path(__file__).parents[1] / "plugins" / "faulty_store"
PROMOTE_TIMEOUT_S = 3
LEASE_S = 1

SLOW = (
    *CONTRACT,
    *QUICK,
    *("--dtype", "float32", "--snapshot-min-interval-seconds", "0"),
    *("--max-warm-memory-gb", "0.008", "--snapshot-promote-timeout", str(PROMOTE_TIMEOUT_S)),
    *("--conversation-active-timeout", str(LEASE_S)),
)
"""Room for about twenty short conversations in RAM; every turn is saved at once."""


@dataclass
class SlowWorld(World):
    """A world with faults."""

    @property
    def faults(self) -> FaultControl:
        return FaultControl(self.store.parent.parent / "faults")


class GenerateStreamTalk(GenerateTalk):
    """`/generate`, streamed; each event has everything so far."""

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        body = native_body([*self.history, *message], NEW_TOKENS, conversation)
        return native_reply(list(stream(client, body))[-1])


class CompletionStreamTalk(CompletionTalk):
    """`/v1/completions`, streamed."""

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        extra = {} if conversation is None else {"conversation_id": conversation}
        text, tokens, logprobs, top, usage = "", [], [], [], None
        for chunk in openai_client(client).completions.create(
            model="default",
            prompt=self.text + message,
            temperature=0,
            max_tokens=NEW_TOKENS,
            logprobs=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, **extra},
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.text
                if choice.logprobs:
                    tokens += choice.logprobs.tokens
                    logprobs += choice.logprobs.token_logprobs
                    top += [tuple(sorted(step.items())) for step in choice.logprobs.top_logprobs]
        assert usage is not None
        output = Output(tuple(tokens), tuple(logprobs), tuple(top), text)
        return Reply("", output, usage.prompt_tokens, _cached(usage))


FORMS: dict[str, tuple[Callable[[], Talk], bool]] = {
    "generate": (GenerateTalk, False),
    "generate-tagged": (GenerateTalk, True),
    "generate-stream": (GenerateStreamTalk, False),
    "chat": (ChatTalk, False),
    "chat-stream-tagged": (StreamTalk, True),
    "completion": (CompletionTalk, False),
    "completion-tagged": (CompletionTalk, True),
    "completion-stream": (CompletionStreamTalk, False),
}
"""How a request that begins with a stored prefix may come in, and whether it is tagged."""


def native_body(ids: list[int], new_tokens: int, conversation: str | None) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    tag = {} if conversation is None else {"conversation_id": conversation}
    report = {"return_logprob": True, "top_logprobs_num": 5}
    return {"input_ids": ids, "sampling_params": params, "stream": True, **report, **tag}


def stream(client: Client, body: dict[str, Any]) -> Any:
    """The events of a streamed `/generate`."""
    with client.http.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


def faulty_environment(faults: Path) -> Mapping[str, str]:
    """With it a server's store meets the faults that `FaultControl(faults)` sets."""
    path = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"ENGRAM_TEST_FAULTS": str(faults), "PYTHONPATH": os.pathsep.join(path)}


def slow_world(stage: Stage, folder: Path) -> World:
    """Conversations that are on disk, and nowhere else."""
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    env = {**FLOAT32, **faulty_environment(folder / "faults")}
    server = stage.server(folder, SLOW, store=store, env=env)
    server.start()
    world = SlowWorld(server, store, Client(server.url))
    for phase in ("blocked", "slow"):
        for form, (talk, _) in FORMS.items():
            name = f"{phase}-{form}"
            world.cases[name] = _case(world.client, numbers, name, talk())
    for name in ("disk", "layers", "kept"):
        world.cases[name] = _case(world.client, numbers, name, GenerateTalk())
    world.server.kill()
    world.server.start()
    return world


def _case(client: Client, numbers: random.Random, name: str, talk: Talk) -> Case:
    for length in (60, 30):
        talk.say(client, talk.draw(client, numbers, length), name)
    return save_and_peek(client, numbers, name, talk)


def new_talk(client: Client, numbers: random.Random, conversation: str | None) -> GenerateTalk:
    talk = GenerateTalk()
    talk.say(client, random_ids(numbers, 40), conversation)
    return talk
