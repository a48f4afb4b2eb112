"""A hundred thousand hostile files, in a process whose memory and time are bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faults.hostile_child import judge

CASES = 100_000


@pytest.mark.timeout(7200)
def test_hostile_files_are_refused_or_right(tmp_path: Path) -> None:
    scale = float(os.environ.get("ENGRAM_FAULT_SCALE", "1"))
    judge(tmp_path, cases=max(1, round(CASES * scale)))
