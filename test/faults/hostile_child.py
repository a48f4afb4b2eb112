"""Runs hostile files in a process of their own, and judges its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engram.testing.samples import SEED_VARIABLE
from faults.hostile import MEMORY_LIMIT
from faults.hostile_files import KINDS
from repository import ROOT


def judge(folder: Path, *, cases: int) -> dict[str, Any]:
    """Run so many cases. Every kind of file must have been refused and accepted; none wrongly.

    The seed is printed; ``ENGRAM_TEST_SEED`` repeats it.
    """
    seed = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "big"))
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201  pytest shows it with a failure
    progress = folder / "progress"
    paths = [str(ROOT / "python"), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [
            *(sys.executable, "-X", "faulthandler", "-m", "faults.hostile"),
            *("--cases", str(cases), "--seed", str(seed), "--progress", str(progress)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    # A hang ends by SIGALRM, memory beyond the bound by an error or a signal of its own.
    last = progress.read_text().strip() if progress.exists() else "none"
    assert result.returncode in (0, 1), f"case {last}: {result.returncode}\n{result.stderr[-4000:]}"
    report: dict[str, Any] = json.loads(result.stdout)
    print({name: value for name, value in report.items() if name != "wrong"})  # noqa: T201
    assert report["wrong"] == []
    assert report["cases"] == cases
    assert report["peak_growth_mib"] * 2**20 < MEMORY_LIMIT
    for kind in KINDS:
        outcomes = report["outcomes"][kind]
        assert outcomes.get("accepted, byte for byte"), f"no {kind} was ever accepted"
        assert len(outcomes) > 1, f"no {kind} was ever refused"
    return report
