"""16 threads at one server for five minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engram.testing.samples import seeded_random
from faults.threads import run_threads

SECONDS = 300


@pytest.mark.timeout(3600)
def test_five_minutes_of_many_threads(tmp_path: Path, scaled: Callable[[float], int]) -> None:
    hours = run_threads(tmp_path / "store", seeded_random(), scaled(SECONDS))
    print(hours)  # noqa: T201  for the report of a run
    assert hours.listed > 0
    for act in ("saves", "branches", "restores", "deletions", "demotions", "collections"):
        assert hours.counts[act] > 0, act
