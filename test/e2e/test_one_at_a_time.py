"""`--max-running-requests 1`: who waits is promised what it waits for, and all of it is exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from e2e.helpers import Client, Reply
from e2e.pressured_world import KEPT, check_at_rest
from e2e.test_pressure import goes_on_exactly
from e2e.worlds import World
from engram.testing.samples import seeded_random


def test_all_at_once_one_after_another(alone: World) -> None:
    """Their states are on disk; each is brought into RAM while another one runs."""

    def ask(name: str) -> Reply:
        case = alone.cases[name]
        return case.talk.peek(Client(alone.server.url), case.message, name)

    with ThreadPoolExecutor(len(KEPT)) as clients:
        replies = dict(zip(KEPT, clients.map(ask, KEPT), strict=True))
    for name, reply in replies.items():
        case = alone.cases[name]
        assert reply.cached == case.saved["token_count"]
        assert reply.output == case.reference.output
    check_at_rest(alone)


def test_turns_go_on(alone: World) -> None:
    client, numbers = alone.client, seeded_random()
    talk = alone.cases[KEPT[0]].talk
    with ThreadPoolExecutor(2) as clients:
        turn = clients.submit(talk.say, client, talk.message(numbers, 40), KEPT[0])
        other = alone.cases[KEPT[1]]
        beside = clients.submit(other.talk.peek, Client(alone.server.url), other.message)
    assert turn.result().cached >= alone.cases[KEPT[0]].saved["token_count"]
    assert beside.result().output == other.reference.output
    goes_on_exactly(alone, KEPT[0], talk)  # type: ignore[arg-type]
    check_at_rest(alone)
