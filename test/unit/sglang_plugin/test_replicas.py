"""Which replica a request goes to, and which one is asked for what it left."""

from __future__ import annotations

from typing import Any

import pytest

from engram.sglang_plugin import replicas as module
from engram.sglang_plugin.control import RankClient, RankControl
from engram.sglang_plugin.engine import SglangRanks
from engram.sglang_plugin.messages import DescribeRequest, StatsRequest
from engram.sglang_plugin.replicas import Replicas
from unit.service.engine import on_a_loop
from unit.sglang_plugin.test_control import Wire, finished, random_tokens
from unit.sglang_plugin.tree import NewRank

TALK = ("", "talk")


def test_a_conversation_stays_where_it_was_served_last() -> None:
    replicas = Replicas(2)
    replicas.admit("first", TALK, None)
    assert replicas.route("first") is None  # for SGLang to balance
    replicas.served("first", 1)
    assert replicas.holder("first") == 1
    replicas.admit("second", TALK, None)
    assert replicas.route("second") == replicas.fetch_to("second") == 1
    replicas.admit("asked for", TALK, 0)
    assert replicas.route("asked for") == replicas.fetch_to("asked for") == 0
    replicas.served("asked for", 0)
    replicas.admit("third", TALK, None)
    assert replicas.route("third") == 0


def test_conversations_of_other_tenants_are_others() -> None:
    replicas = Replicas(2)
    replicas.admit("first", TALK, None)
    replicas.served("first", 1)
    replicas.admit("other", ("tenant", "talk"), None)
    assert replicas.route("other") is None


def test_prefixes_from_disk_are_spread_and_their_requests_follow() -> None:
    replicas = Replicas(3)
    for number in range(6):
        replicas.admit(str(number), None, None)
    assert [replicas.fetch_to(str(number)) for number in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [replicas.route(str(number)) for number in range(6)] == [0, 1, 2, 0, 1, 2]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REQUESTS", 3)
    monkeypatch.setattr(module, "MOST_CONVERSATIONS", 2)
    replicas = Replicas(2)
    for number in range(5):
        replicas.admit(str(number), ("", str(number)), None)
        replicas.served(str(number), 1)
    assert [replicas.holder(str(number)) for number in range(5)] == [0, 0, 1, 1, 1]
    routes = []
    for number in range(5):
        replicas.admit("next", ("", str(number)), None)
        routes.append(replicas.route("next"))
    assert routes == [None, None, None, 1, 1]


class Replicated(Wire):
    """A wire to ranks that are a replica each; as with SGLang, every message goes to all."""

    def __init__(self, *ranks: Any) -> None:
        super().__init__(*ranks)
        self.client = RankClient(self, 1, len(ranks))
        self.controls = [
            RankControl(rank.cache, self, replica)  # type: ignore[arg-type]
            for replica, rank in enumerate(ranks)
        ]


@on_a_loop
async def test_one_replica_is_asked_or_all(new_rank: NewRank) -> None:
    wire = Replicated(new_rank(), new_rank())
    assert len(await wire.client.ask(DescribeRequest, timeout=10)) == 2
    assert len(await wire.client.ask(StatsRequest, timeout=10, replica=1)) == 1


@on_a_loop
async def test_a_turn_is_saved_where_it_is_and_restored_anywhere(
    new_rank: NewRank, rng: Any
) -> None:
    first, second = new_rank(), new_rank()
    wire, replicas = Replicated(first, second), Replicas(2)
    ranks = SglangRanks(wire.client, replicas)
    namespace = (await ranks.describe()).namespace.id
    tokens = random_tokens(rng, 60)
    request = finished(tokens)
    second.serve(tokens, rid=request.rid)
    replicas.served(request.rid, 1)
    stored = await ranks.persist(namespace, request, len(tokens) - 1)
    assert len(stored.chains) == 1  # one chain a rank, and replicas are no ranks
    key = stored.chains[0][-1].key
    assert await ranks.tier(namespace, key, request.tokens[: stored.boundary]) != "disk"

    replicas.admit("next", None, 0)
    brought = await ranks.promote(
        namespace, stored.chains, owner="next", seconds=10, exact=False, timeout=10
    )
    assert brought.source_tier == "disk"
    residents = await ranks.residents(namespace)
    assert len(residents) == 1
    there = [one.segment_id for one in residents[0]]
    # Rows and state, in both by now.
    assert sorted(there) == sorted([ref.segment_id for ref in stored.chains[0]] * 2)


@on_a_loop
async def test_a_pin_follows_its_conversation(new_rank: NewRank, rng: Any) -> None:
    first, second = new_rank(), new_rank()
    wire, replicas = Replicated(first, second), Replicas(2)
    ranks = SglangRanks(wire.client, replicas)
    namespace = (await ranks.describe()).namespace.id
    tokens = random_tokens(rng, 60)
    for replica, rank in enumerate((first, second)):
        request = finished(tokens, f"rid-{replica}")
        rank.serve(tokens, rid=request.rid)
        replicas.served(request.rid, replica)
        assert await ranks.pin(namespace, request, len(tokens) - 1, "owner")
        pinned = [answer["vram"]["pinned"] for answer in await ranks.stats()]
        assert [list(one) for one in pinned] == [["owner"] * (n == replica) for n in range(2)]
    assert await ranks.unpin("owner")
