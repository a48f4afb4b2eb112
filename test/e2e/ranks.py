"""A server of two tensor-parallel ranks, one of which is killed in the middle of a save.

Where that rank's part was not written the save fails, and nothing of it is listed. Where it was,
the other rank may finish: an acknowledged save is whole then, and one without an answer whole or
not there.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import httpx
import psutil

from e2e.helpers import Client
from e2e.talks import GenerateTalk
from engram.testing.faults import Fault, FaultControl
from engram.testing.server import ServerProcess

RANKS = 2
END_S = 120.0
CONSENSUS = {"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
"""SGLang ends a server whose ranks do not ask their trees the same things in the same order."""


@dataclass(frozen=True)
class Instant:
    """The operation of the store at which a save stands still, of which rank's part, and which rank
    is killed then."""

    operation: str
    slow: int
    killed: int


INSTANTS = [Instant(*one) for one in product(("write", "fsync"), range(RANKS), range(RANKS))]


@dataclass(frozen=True)
class Torn:
    """A conversation whose second turn was being saved when a rank died: the numbers of the turns
    that may be listed of it, one list of them or another."""

    name: str
    acknowledged: bool
    possible: tuple[list[int], ...]


def kill_a_rank_in_a_save(
    server: ServerProcess,
    client: Client,
    faults: FaultControl,
    numbers: random.Random,
    name: str,
    instant: Instant,
) -> Torn:
    """Save the first turn of a conversation, and kill a rank in the save of its second.

    The server has ended by itself when this returns.
    """
    talk = GenerateTalk()
    talk.say(client, talk.message(numbers, 60), name)
    client.save(conversation_id=name)
    talk.say(client, talk.message(numbers, 30), name)
    only = f"rank-{instant.slow}-of-{RANKS}"
    faults.set(**{instant.operation: Fault(block=True, only=only)})
    with ThreadPoolExecutor(1) as clients:
        save = clients.submit(_save, client.url, name)
        while not faults.blocked(instant.operation):
            assert not save.done(), save.result()
            time.sleep(0.01)
        _rank(server, instant.killed).kill()
        faults.clear()
        answer = save.result(END_S)
    acknowledged = answer is not None and answer.status_code == 200
    assert acknowledged or answer is None or answer.status_code >= 500
    assert not (acknowledged and instant.killed == instant.slow), answer
    assert server.process is not None
    # A server that has lost a rank ends by itself.
    server.process.wait(END_S)
    server.kill()
    if acknowledged:
        return Torn(name, True, ([1, 2],))
    # Whether it was committed before the server ended nobody was told.
    committed = () if instant.killed == instant.slow else ([1, 2],)
    return Torn(name, False, ([1], *committed))


def is_whole_or_not_there(client: Client, torn: Torn) -> bool:
    """What of the conversation is listed restores."""
    listed = sorted(client.snapshots(torn.name), key=lambda one: one["turn_number"])
    assert [one["turn_number"] for one in listed] in torn.possible
    for one in listed:
        restored = client.restore(conversation_id=torn.name, turn_number=one["turn_number"])
        assert restored["snapshot_id"] == one["snapshot_id"]
        assert restored["token_count"] == one["token_count"]
    return True


def _save(url: str, conversation: str) -> httpx.Response | None:
    """The answer to a save; None if the server was gone before it gave one."""
    try:
        body = {"conversation_id": conversation}
        return httpx.post(f"{url}/save_snapshot", json=body, timeout=END_S)
    except (httpx.NetworkError, httpx.ProtocolError):
        return None


def _rank(server: ServerProcess, rank: int) -> psutil.Process:
    """The process of a rank: SGLang names it so."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    [found] = [c for c in children if f"scheduler_TP{rank}" in " ".join(c.cmdline())]
    return found
