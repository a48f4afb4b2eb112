"""One of two tensor-parallel ranks is killed in the middle of a save.

Where its part was not written the save fails, and nothing of it is listed. Where it was, the other
rank may finish: an acknowledged save is whole then, and one without an answer whole or not there.
What was acknowledged before is exact.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, product
from pathlib import Path

import httpx
import psutil
import pytest

from e2e.helpers import Client
from e2e.slow_world import PLUGIN
from e2e.talks import GenerateTalk
from e2e.worlds import World, next_turn_is_exact, save_and_peek
from engram.testing.faults import Fault, FaultControl
from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model
from faults.serving import ARGS, END_S, ENVIRONMENT

RANKS = 2
ROUNDS = 8
INSTANTS = list(product(("write", "fsync"), range(RANKS), range(RANKS)))
"""Where a rank's part of the save stands still, which rank's, and which rank is killed then."""


@pytest.mark.timeout(4 * 3600)
def test_a_rank_that_is_killed_in_the_middle_of_a_save(
    tmp_path: Path, scaled: Callable[[float], int]
) -> None:
    numbers = seeded_random()
    faults = FaultControl(tmp_path / "faults")
    world = _start(tmp_path)
    client = world.client
    turns: dict[str, list[list[int]]] = {}
    try:
        instants = numbers.sample(INSTANTS, len(INSTANTS))
        for number, (operation, slow, killed) in enumerate(islice(cycle(instants), scaled(ROUNDS))):
            kept, torn = GenerateTalk(), GenerateTalk()
            for length in (60, 30):
                kept.say(client, kept.message(numbers, length), f"kept-{number}")
            case = save_and_peek(client, numbers, f"kept-{number}", kept)
            world.cases[case.name] = case
            torn.say(client, torn.message(numbers, 60), f"torn-{number}")
            client.save(conversation_id=f"torn-{number}")
            torn.say(client, torn.message(numbers, 30), f"torn-{number}")

            faults.set(**{operation: Fault(block=True, only=f"rank-{slow}-of-{RANKS}")})
            with ThreadPoolExecutor(1) as clients:
                save = clients.submit(_save, client.url, f"torn-{number}")
                while not faults.blocked(operation):
                    assert not save.done(), save.result()
                    time.sleep(0.01)
                _rank(world.server, killed).kill()
                faults.clear()
                answer = save.result(END_S)
            acknowledged = answer is not None and answer.status_code == 200
            assert acknowledged or answer is None or answer.status_code >= 500
            assert not (acknowledged and killed == slow), answer
            turns[f"torn-{number}"] = [[1, 2]] if acknowledged else [[1]]
            if killed != slow and not acknowledged:
                turns[f"torn-{number}"].append([1, 2])
            _wait_for_the_end(world.server)
            world.server.kill()
            world.server.start()

            for name in list(world.cases):
                client.restore(conversation_id=name)
                next_turn_is_exact(world, world.cases[name], None)
                client.flush()
            for name, possible in turns.items():
                listed = sorted(client.snapshots(name), key=lambda one: one["turn_number"])
                assert [one["turn_number"] for one in listed] in possible
                for one in listed:
                    place = {"conversation_id": name, "turn_number": one["turn_number"]}
                    restored = client.restore(**place)
                    assert restored["snapshot_id"] == one["snapshot_id"]
                    assert restored["token_count"] == one["token_count"]
            print(  # noqa: T201
                f"round {number}: {operation} of rank {slow}, rank {killed} killed, "
                f"{'acknowledged' if acknowledged else 'not acknowledged'}"
            )
    finally:
        world.server.kill()


def _start(folder: Path) -> World:
    model = write_tiny_model(folder / "model", seed=1)
    store = folder / "snapshots"
    path = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **ENVIRONMENT,
        "ENGRAM_TEST_FAULTS": str(folder / "faults"),
        "PYTHONPATH": os.pathsep.join(path),
    }
    args = [*ARGS, "--tp-size", str(RANKS), "--snapshot-dir", str(store)]
    server = ServerProcess(model, args, env, folder / "server.log", timeout=600)
    server.start()
    return World(server, store, Client(server.url))


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


def _wait_for_the_end(server: ServerProcess) -> None:
    """A server that has lost a rank ends by itself."""
    assert server.process is not None
    server.process.wait(END_S)
