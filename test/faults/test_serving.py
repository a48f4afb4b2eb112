"""50 times kill -9 of a real server under load: everything acknowledged is there, and exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model
from faults.serving import ARGS, ENVIRONMENT, SAVES, kill_again_and_again

ROUNDS = 50


@pytest.mark.timeout(4 * 3600)
def test_fifty_deaths(tmp_path: Path, scaled: Callable[[float], int]) -> None:
    model = write_tiny_model(tmp_path / "model", seed=1)
    args = [*ARGS, "--snapshot-dir", str(tmp_path / "snapshots")]
    server = ServerProcess(model, args, ENVIRONMENT, tmp_path / "server.log", timeout=600)
    with server:
        deaths = kill_again_and_again(server, seeded_random(), scaled(ROUNDS))
    print(deaths)  # noqa: T201  for the report of a run
    assert deaths.rounds == scaled(ROUNDS)
    assert deaths.restored == deaths.acknowledged
    assert deaths.counts["saves"] >= SAVES * deaths.rounds
    assert deaths.counts["cut_off"] > 0
