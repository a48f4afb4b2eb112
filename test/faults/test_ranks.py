"""One of two tensor-parallel ranks is killed in the middle of a save, at every instant there is.

What was acknowledged before is exact after each restart.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest

from e2e.helpers import Client
from e2e.ranks import (
    INSTANTS,
    RANKS,
    Torn,
    is_whole_or_not_there,
    kill_a_rank_in_a_save,
)
from e2e.slow_world import faulty_environment
from e2e.talks import GenerateTalk
from e2e.worlds import World, next_turn_is_exact, save_and_peek
from engram.testing.faults import FaultControl
from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model
from faults.serving import ARGS, ENVIRONMENT

ROUNDS = 8


@pytest.mark.timeout(4 * 3600)
def test_a_rank_that_is_killed_in_the_middle_of_a_save(
    tmp_path: Path, scaled: Callable[[float], int]
) -> None:
    numbers = seeded_random()
    faults = FaultControl(tmp_path / "faults")
    world = _start(tmp_path)
    client = world.client
    torn: list[Torn] = []
    try:
        instants = numbers.sample(INSTANTS, len(INSTANTS))
        for number, instant in enumerate(islice(cycle(instants), scaled(ROUNDS))):
            kept = GenerateTalk()
            for length in (60, 30):
                kept.say(client, kept.message(numbers, length), f"kept-{number}")
            case = save_and_peek(client, numbers, f"kept-{number}", kept)
            world.cases[case.name] = case
            torn.append(
                kill_a_rank_in_a_save(
                    world.server, client, faults, numbers, f"torn-{number}", instant
                )
            )
            world.server.start()

            for name in list(world.cases):
                client.restore(conversation_id=name)
                next_turn_is_exact(world, world.cases[name], None)
                client.flush()
            assert all(is_whole_or_not_there(client, one) for one in torn)
            print(f"round {number}: {instant}, {torn[-1]}")  # noqa: T201
    finally:
        world.server.kill()


def _start(folder: Path) -> World:
    model = write_tiny_model(folder / "model", seed=1)
    store = folder / "snapshots"
    env = {**ENVIRONMENT, **faulty_environment(folder / "faults")}
    args = [*ARGS, "--tp-size", str(RANKS), "--snapshot-dir", str(store)]
    server = ServerProcess(model, args, env, folder / "server.log", timeout=600)
    server.start()
    return World(server, store, Client(server.url))
