"""500 times kill -9 of a server without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engram.testing.samples import seeded_random
from faults.killing import kill_again_and_again

ROUNDS = 500


@pytest.mark.timeout(7200)
def test_five_hundred_deaths(tmp_path: Path, scaled: Callable[[float], int]) -> None:
    deaths = kill_again_and_again(tmp_path / "store", seeded_random(), scaled(ROUNDS))
    print(deaths)  # noqa: T201  for the report of a run
    assert deaths.rounds == scaled(ROUNDS)
    assert deaths.events["saved"] > 0
    assert deaths.restored > 0
