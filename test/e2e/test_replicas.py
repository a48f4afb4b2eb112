"""Two data-parallel replicas: a conversation goes to the one that holds it, or is restored on the
other. Run by `scripts/test --matrix`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.exactness import Variant
from e2e.helpers import Client, Reply, native_reply, random_ids
from e2e.matrix import require_gpus
from e2e.talks import NEW_TOKENS, GenerateTalk
from e2e.worlds import LENGTHS, NEXT_LENGTH, Case, Stage, World, fresh, start
from engram.testing.samples import seeded_random

REPLICAS = 2
CONVERSATIONS = 6

pytestmark = pytest.mark.matrix


class ReplicaTalk(GenerateTalk):
    """A talk that is told which replica answered, and may ask for one."""

    def __init__(self) -> None:
        super().__init__()
        self.replica: int | None = None
        self.answered: list[int] = []

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        tag = {} if conversation is None else {"conversation_id": conversation}
        where = {} if self.replica is None else {"routed_dp_rank": self.replica}
        body = {
            "input_ids": [*self.history, *message],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
            "return_logprob": True,
            "top_logprobs_num": 5,
            **tag,
            **where,
        }
        response = client.post("/generate", body)
        assert response.status_code == 200, response.text
        answer = response.json()
        self.answered.append(answer["meta_info"]["dp_rank"])
        return native_reply(answer)

    def peek_at(self, client: Client, message: Any, replica: int) -> Reply:
        """What a replica answers, without a turn being taken."""
        self.replica = replica
        try:
            reply = self.peek(client, message)
        finally:
            self.replica = None
        assert self.answered.pop() == replica
        return reply


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require_gpus(REPLICAS)
    stage = Stage(tmp_path_factory.mktemp("replicas"))
    folder = fresh(stage.folder / "replicas")
    variant = Variant("granite-hybrid", "float32")
    flags = [*variant.flags, "--dp-size", str(REPLICAS), "--snapshot-trigger-policy", "manual_only"]
    store = folder / "store" / "snapshots"
    server = stage.server(
        folder,
        flags,
        model=stage.model(1, variant.family, variant.dtype),
        store=store,
        env=variant.env,
    )
    try:
        world = start(server, store)
        _record(world, seeded_random())
        server.kill()
        server.start()
        yield world
    finally:
        server.kill()


def _record(world: World, numbers: random.Random) -> None:
    """Conversations whose turns come between those of others; each is saved where it is."""
    client = world.client
    talks = {f"talk-{n}": ReplicaTalk() for n in range(CONVERSATIONS)}
    world.facts["replies"] = {name: [] for name in talks}
    for length in LENGTHS:
        for name in numbers.sample(list(talks), len(talks)):
            message = random_ids(numbers, length)
            world.facts["replies"][name].append(talks[name].say(client, message, name))
    for name, talk in talks.items():
        saved = client.save(conversation_id=name)
        message = random_ids(numbers, NEXT_LENGTH)
        home = talk.answered[0]
        reference = talk.peek_at(client, message, home)
        assert reference.cached == saved["token_count"]
        world.cases[name] = Case(name, talk, saved, message, reference)


def talk_of(world: World, name: str) -> ReplicaTalk:
    talk = world.cases[name].talk
    assert isinstance(talk, ReplicaTalk)
    return talk


def test_a_conversation_stays_with_the_replica_that_holds_it(world: World) -> None:
    homes = set()
    for name, replies in world.facts["replies"].items():
        home, *later = talk_of(world, name).answered[: len(LENGTHS)]
        assert later == [home] * len(later)
        homes.add(home)
        told = 0
        for reply in replies:
            assert reply.cached == max(0, told - 1)
            told = reply.prompt_tokens + len(reply.tokens)
    assert homes == set(range(REPLICAS)), "all conversations were on one replica"


@pytest.mark.parametrize("replica", range(REPLICAS))
def test_it_is_restored_on_whichever_replica_is_asked(world: World, replica: int) -> None:
    """From disk, by the request itself: on the one where it was made and on the other."""
    for name in ("talk-0", "talk-1", "talk-2"):
        case = world.cases[name]
        reply = talk_of(world, name).peek_at(world.client, case.message, replica)
        assert reply.cached == case.saved["token_count"]
        assert reply.output == case.reference.output


def test_a_turn_without_a_wish_goes_where_its_prefix_was_brought(world: World) -> None:
    case, talk = world.cases["talk-3"], talk_of(world, "talk-3")
    reply = talk.peek(world.client, case.message, case.name)
    assert reply.cached == case.saved["token_count"]
    assert reply.output == case.reference.output
    home = talk.answered[-1]
    again = talk.peek(world.client, case.message, case.name)
    assert talk.answered[-1] == home
    assert again.output == reply.output


def test_a_restore_by_request_is_for_every_replica(world: World) -> None:
    case = world.cases["talk-4"]
    restored = world.client.restore(conversation_id=case.name)
    assert restored["token_count"] == case.saved["token_count"]
    away = world.store.with_name("away")
    world.store.rename(away)
    try:
        for replica in range(REPLICAS):
            reply = talk_of(world, case.name).peek_at(world.client, case.message, replica)
            assert reply.cached == case.saved["token_count"]
            assert reply.output == case.reference.output
    finally:
        away.rename(world.store)


def test_a_turn_is_saved_by_the_replica_that_has_it(world: World) -> None:
    """Of new conversations, one on each; and a deletion takes it from the disk and from both."""
    numbers = seeded_random()
    for replica in range(REPLICAS):
        name, talk = f"new-{replica}", ReplicaTalk()
        talk.replica = replica
        talk.say(world.client, random_ids(numbers, 50), name)
        saved = world.client.save(conversation_id=name)
        message = random_ids(numbers, NEXT_LENGTH)
        there = talk.peek_at(world.client, message, replica)
        elsewhere = talk.peek_at(world.client, message, 1 - replica)
        assert there.cached == elsewhere.cached == saved["token_count"]
        assert there.output == elsewhere.output
        world.client.delete(conversation_id=name)
        assert world.client.refused("/get_snapshot_info", {"conversation_id": name}, 404)


def test_what_operators_see_is_of_all_replicas(world: World) -> None:
    found = world.client.http.get("/v1/memory/health").json()
    assert len(found["ranks"]) == REPLICAS
