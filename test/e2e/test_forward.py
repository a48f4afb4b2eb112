"""The families that no server of the other tests serves: what SGLang computes with each.

On a server, with snapshots, they are run by `scripts/test --matrix`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.exactness import SEED, VARIANTS
from e2e.plain_mamba2 import expect_plain
from e2e.reference import TOLERANCE, Expected, expect, prompts_of
from engram.testing.tiny_model import FAMILIES, write_tiny_model

SERVED = {"granite-hybrid", *(variant.family for variant in VARIANTS if variant.quick)}
GROUPED = "mamba2-groups"
"""Mamba-2 with several groups, as Codestral-Mamba has them: `e2e.plain_mamba2` says why apart."""
GROUPS = 4
SCORED = [*sorted(FAMILIES.keys() - SERVED), GROUPED]
PROMPTS = [prompt for prompt in prompts_of(SEED) if len(prompt) in (5, 200)]
"""Less than a chunk, and several."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Expected], Any]]:
    """Family -> what transformers answers to the prompts, and what SGLang says of that."""
    folder = tmp_path_factory.mktemp("forward")
    with pytest.MonkeyPatch.context() as patch:
        pure = FAMILIES["mamba2"]
        grouped = replace(pure, build=partial(pure.build, groups=GROUPS))
        patch.setitem(FAMILIES, GROUPED, grouped)
        models = {family: write_tiny_model(folder / family, family, seed=SEED) for family in SCORED}
    expected = {
        family: (expect_plain if family == GROUPED else expect)(model, PROMPTS)
        for family, model in models.items()
    }
    jobs, results = folder / "jobs.json", folder / "results.json"
    sequences = {
        family: [{"tokens": [*e.prompt, *e.reply], "prompt": len(e.prompt)} for e in of_family]
        for family, of_family in expected.items()
    }
    jobs.write_text(
        json.dumps([{"model": str(models[f]), "sequences": sequences[f]} for f in SCORED])
    )
    done = subprocess.run(
        [sys.executable, "-m", "e2e.forward", str(jobs), str(results)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(Path(results).read_text())
    return {f: (expected[f], result) for f, result in zip(SCORED, found, strict=True)}


@pytest.mark.parametrize("family", SCORED)
def test_a_family_computes_what_the_reference_does(
    scored: dict[str, tuple[list[Expected], Any]], family: str
) -> None:
    """Prompts in chunks, then replies token by token: every log-probability, and greedy tokens."""
    for wanted, got in zip(*scored[family], strict=True):
        torch.testing.assert_close(
            torch.tensor(got["log_probabilities"]),
            torch.tensor(wanted.log_probabilities),
            rtol=0,
            atol=TOLERANCE,
        )
        assert got["likeliest"][len(wanted.prompt) - 1 :] == wanted.reply


def test_the_plain_recurrence_is_transformers_with_one_group(tmp_path: Path) -> None:
    """So that it may stand in for it with several."""
    model = write_tiny_model(tmp_path / "model", "mamba2", seed=SEED)
    for plain, wanted in zip(expect_plain(model, PROMPTS), expect(model, PROMPTS), strict=True):
        assert plain.reply == wanted.reply
        assert plain.log_probabilities == pytest.approx(wanted.log_probabilities, abs=TOLERANCE)
