"""16 threads at one server. `scripts/test --faults`: for five minutes."""

from __future__ import annotations

from pathlib import Path

from engram.testing.samples import seeded_random
from faults.threads import run_threads

SECONDS = 4.0


def test_what_holds_among_many_threads(in_memory: Path) -> None:
    hours = run_threads(in_memory / "store", seeded_random(), SECONDS)
    print(hours)  # noqa: T201
    assert hours.listed > 0
    for act in ("saves", "branches", "restores", "deletions", "demotions", "collections"):
        assert hours.counts[act] > 0, act
