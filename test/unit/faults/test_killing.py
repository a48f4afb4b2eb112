"""kill -9 of a whole server without a model, at random instants. `scripts/test --faults`: 500."""

from __future__ import annotations

from pathlib import Path

from engram.testing.samples import seeded_random
from faults.killing import kill_again_and_again

ROUNDS = 20


def test_kills_lose_nothing_acknowledged_and_show_nothing_torn(tmp_path: Path) -> None:
    deaths = kill_again_and_again(tmp_path / "store", seeded_random(), ROUNDS)
    print(deaths)  # noqa: T201
    assert deaths.rounds == ROUNDS
    assert deaths.events["saved"] > 0
    assert deaths.restored > 0
