"""What runs of random histories are documented with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engram.testing.tiny_model import FAMILIES
from histories import results


def test_a_run_is_recorded_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.delenv(results.RECORD, raising=False)
    counts = Counter(
        {"histories": 1000, "turns": 3123, "killed": 14, "stopped": 6, "restored": 400}
    )
    results.record("lfm2-moe", "linear", 7, counts)
    assert results.results() == {}
    monkeypatch.setenv(results.RECORD, "1")
    results.record("lfm2-moe", "linear", 7, counts)
    table = results.table(["lfm2-moe"], results.results()).splitlines()
    assert len(table) == 2 + len(results.KINDS)
    assert table[2].startswith(
        "| `lfm2-moe` | linear, bfloat16 | 1,000 | 3,123 | 14 kills, 6 stops |"
    )
    assert "400 restored by request" in table[2]
    assert table[3] == "| `lfm2-moe` | branching, float32 |" + " not run |" * 6


def test_every_result_is_of_a_family_and_a_kind_there_are() -> None:
    known = {(family, kind) for family in FAMILIES for kind in results.KINDS}
    assert set(results.results()) <= known
