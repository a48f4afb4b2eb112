"""500 power cuts, with 2,000 disks that they may have left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engram.testing.samples import seeded_random
from faults.cutting import CUTS_EACH, cut_again_and_again

CUTS = 500


@pytest.mark.timeout(7200)
def test_two_thousand_disks(in_memory: Path, scaled: Callable[[float], int]) -> None:
    cuts = cut_again_and_again(in_memory, seeded_random(), scaled(CUTS))
    print(cuts)  # noqa: T201  for the report of a run
    assert cuts.disks == CUTS_EACH * scaled(CUTS)
    assert cuts.events["saved"] > 0
    assert cuts.restored > cuts.rebuilt > 0
