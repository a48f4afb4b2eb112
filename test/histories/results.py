"""What runs of random histories have shown, written down where the documentation takes it from.

    ENGRAM_HISTORY_RECORD=1 scripts/test --histories -k lfm2
    python test/e2e/matrix.py

The first writes a file for each kind of histories that a family passed; the last puts the table of
all files into docs/models.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from e2e.matrix import table_of

RESULTS: Final = Path(__file__).parents[1] / "data" / "histories"
RECORD: Final = "ENGRAM_HISTORY_RECORD"
KINDS: Final = {"linear": "bfloat16", "branching": "float32"}
"""Kind of histories -> the dtype in which they are played."""


def record(family: str, kind: str, seed: int, counts: Mapping[str, int]) -> None:
    """Write down what was counted in a run that passed, if it is to be."""
    if not os.environ.get(RECORD):
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).date().isoformat()
    found = {"counts": dict(counts), "date": date, "seed": seed}
    text = json.dumps(found, indent=2, sort_keys=True)
    (RESULTS / f"{family}-{kind}.json").write_text(text + "\n")


def results() -> dict[tuple[str, str], dict[str, Any]]:
    """The files, by family and kind."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        family, kind = path.stem.rsplit("-", 1)
        found[family, kind] = json.loads(path.read_text())
    return found


def table(families: Iterable[str], found: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """A row for each family and kind, run or not."""
    headings = ["family", "kind", "histories", "turns", "ends of the server", "seen", "seed", "run"]
    rows = []
    for family in families:
        for kind, dtype in KINDS.items():
            begin = [f"`{family}`", f"{kind}, {dtype}"]
            result = found.get((family, kind))
            if result is None:
                rows.append([*begin, *["not run"] * (len(headings) - len(begin))])
                continue
            counts = result["counts"]
            ends = f"{counts.get('killed', 0)} kills, {counts.get('stopped', 0)} stops"
            seen = {
                "linear": f"{counts.get('broken off', 0)} replies broken off, "
                f"{counts.get('restored', 0)} restored by request; all bits equal",
                "branching": f"{counts.get('together', 0)} turns at the same time with others, "
                f"{counts.get('restored twice', 0)} snapshots restored twice",
            }[kind]
            cells = [f"{counts[name]:,}" for name in ("histories", "turns")]
            rows.append([*begin, *cells, ends, seen, str(result["seed"]), result["date"]])
    return table_of(headings, rows)
