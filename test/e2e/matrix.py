"""What the tests of every family found, written down where the documentation takes it from.

    ENGRAM_MATRIX_RECORD=1 scripts/test --matrix -k lfm2
    scripts/test --gpu -k lfm2
    python test/e2e/matrix.py

The first two write a file for each variant of which all tests were run, on a CPU and on a GPU; the
last puts the files' tables into docs/models.md, and with `--check` says by its exit status whether
they are there.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "test" / "data" / "matrix"
DOCUMENT: Final = ROOT / "docs" / "models.md"
RECORD: Final = "ENGRAM_MATRIX_RECORD"
DEVICES: Final = ("cpu", "gpu")
"""Of each there is a table in the document and, in `RESULTS`, a folder of files."""
MATRIX: Final = "matrix, "
HISTORIES: Final = "random histories"
TABLES: Final = (*(MATRIX + device for device in DEVICES), HISTORIES)
"""What is generated in the document, by the name between its marks."""

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "served": ("test_replies_are_those_of_transformers",),
    "exact after `kill -9`": (
        "test_restored_turn_is_exact",
        "test_same_tokens_find_the_state_without_any_id",
        "test_restored_from_ram_after_vram_forgot_it",
        "test_restored_from_disk_after_vram_forgot_it",
        "test_an_altered_value_is_what_the_next_turn_computes_with",
    ),
    "branch": (
        "test_turn_that_ends_inside_another_path",
        "test_a_branch_starts_near_where_it_parts",
    ),
    "regenerate": (
        "test_what_is_sent_again_computes_one_token",
        "test_a_next_turn_computes_what_is_new",
    ),
    "random histories": ("test_random_histories_are_exact",),
    "adapters": (
        "test_a_state_is_used_with_the_adapter_that_made_it_alone",
        "test_an_adapter_with_other_weights_finds_nothing_of_the_one_before",
        "test_a_generation_from_a_snapshot_needs_its_adapter",
        "test_no_extra_key_reads_as_an_adapter",
        "test_adapters_are_not_loaded_while_the_server_runs",
    ),
}
"""Heading -> the tests of `test_families.py` that it stands for; every other one is of refusals."""

REFUSED: Final = "test_what_sglang_itself_does_not_serve"
UNSERVED: Final = "What SGLang itself does not serve, without Engram too, counts as neither:"


@dataclass
class Result:
    """What was found of one variant: `outcomes` are by test, without its parameters."""

    model_class: str = ""
    pools: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[bool]] = field(default_factory=dict)
    expected: int = 0

    @property
    def complete(self) -> bool:
        """Whether all of its tests were run, and there was a server."""
        return bool(self.pools) and sum(map(len, self.outcomes.values())) == self.expected

    def as_json(self, date: str, device: str) -> dict[str, Any]:
        return {
            "date": date,
            "device": device,
            "model_class": self.model_class,
            "pools": self.pools,
            "passed": {test: sum(found) for test, found in sorted(self.outcomes.items())},
            "run": {test: len(found) for test, found in sorted(self.outcomes.items())},
        }


class Recorder:
    """Collects results in one pytest process, by the variant's name."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.refusals: dict[str, dict[str, str]] = {}

    @property
    def on(self) -> bool:
        return bool(os.environ.get(RECORD))

    def expect(self, variant: str) -> None:
        """One more test of a variant there is, run or not."""
        self.results.setdefault(variant, Result()).expected += 1

    def found(self, variant: str, test: str, passed: bool) -> None:
        outcomes = self.results.setdefault(variant, Result()).outcomes
        outcomes.setdefault(test, []).append(passed)

    def saw(self, variant: str, model: Path, store: Path) -> None:
        """What a running server of the variant serves, and what its snapshots hold."""
        result = self.results.setdefault(variant, Result())
        [result.model_class] = json.loads((model / "config.json").read_text())["architectures"]
        pools: dict[str, str] = {}
        for path in sorted((store / "namespaces").glob("*.json")):
            pools |= pools_of(json.loads(path.read_text()))
        result.pools = pools

    def refused(self, name: str, model: Path, message: str) -> None:
        """What SGLang says where it does not serve a model."""
        [model_class] = json.loads((model / "config.json").read_text())["architectures"]
        self.refusals[name] = {"model_class": model_class, "refusal": message}

    def write(self) -> None:
        """Files for the variants that were run as a whole, and for refusals."""
        date = datetime.now(timezone.utc).date().isoformat()
        card = gpu()
        folder = RESULTS / ("gpu" if card else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        run_on = {"date": date, "device": card or "CPU"}
        found: dict[str, Mapping[str, Any]] = {
            name: result.as_json(**run_on)
            for name, result in self.results.items()
            if result.complete
        }
        found |= {name: {**refusal, **run_on} for name, refusal in self.refusals.items()}
        for name, result in found.items():
            text = json.dumps(result, indent=2, sort_keys=True)
            (folder / f"{name}.json").write_text(text + "\n")


@functools.cache
def gpu() -> str | None:
    """The card that SGLang serves with here; None where it takes the CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def require_gpus(count: int) -> None:
    """Leave out a test that would need more GPUs than a machine with some has; it is not recorded
    then."""
    import pytest
    import torch

    if gpu() and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def pools_of(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Kind of a buffer -> its layers, and dtype and shape of what it holds of a token or of a
    state; from the fields of a namespace."""
    shapes: dict[str, list[str]] = {}
    for name, value in namespace.items():
        if name.startswith("pool."):
            _, kind, _ = name.split(".")
            shapes.setdefault(kind, []).append(value)
    return {
        kind: " and ".join(f"{found.count(shape)} x {shape}" for shape in sorted(set(found)))
        for kind, found in sorted(shapes.items())
    }


def results(device: str) -> dict[str, dict[str, Any]]:
    """The files of a device, by variant."""
    files = sorted((RESULTS / device).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(variants: Iterable[str], found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table: a row for each variant, run or not."""
    headings = ["variant", "model class", "pools", *COLUMNS, "run on"]
    rows = []
    for name in variants:
        if name not in found:
            rows.append([f"`{name}`", *["not run"] * (len(headings) - 1)])
            continue
        result = found[name]
        pools = ", ".join(f"{kind}: {shape}" for kind, shape in result["pools"].items())
        cells = [_cell(result, tests) for tests in COLUMNS.values()]
        where = f"{result['device']}, {result['date']}"
        rows.append([f"`{name}`", f"`{result['model_class']}`", pools, *cells, where])
    return table_of(headings, rows)


def refusals(names: Iterable[str], found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of what SGLang does not serve, in its own words."""
    headings = ["what", "model class", "what SGLang says", "run on"]
    rows = []
    for name in names:
        if name not in found:
            rows.append([f"`{name}`", *["not run"] * (len(headings) - 1)])
            continue
        refusal = found[name]
        where = f"{refusal['device']}, {refusal['date']}"
        rows.append([f"`{name}`", f"`{refusal['model_class']}`", refusal["refusal"], where])
    return table_of(headings, rows)


def _cell(result: Mapping[str, Any], tests: Iterable[str]) -> str:
    run = sum(result["run"].get(test, 0) for test in tests)
    passed = sum(result["passed"].get(test, 0) for test in tests)
    return f"{passed} of {run}" if run else "no test"


def documented(name: str) -> str:
    """What the document has under the name of one of `TABLES`."""
    begin, end = _marks(name)
    return DOCUMENT.read_text().split(begin)[1].split(end)[0].strip()


def made(name: str) -> str:
    """What it should have there."""
    from engram.testing.tiny_model import FAMILIES
    from histories import results as histories

    if name == HISTORIES:
        return histories.table(sorted(FAMILIES), histories.results())
    return _of_device(name.removeprefix(MATRIX))


def _of_device(device: str) -> str:
    """The tables of all variants and refusals, or that none was run."""
    from e2e.exactness import REFUSALS, VARIANTS

    found = results(device)
    if device == "gpu" and not found:
        return "None of it was run on a GPU."
    served = markdown([variant.name for variant in VARIANTS], found)
    refused = refusals([refusal.name for refusal in REFUSALS], found)
    return f"{served}\n\n{UNSERVED}\n\n{refused}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def main() -> None:
    """Write the tables into the document."""
    for name in TABLES:
        begin, end = _marks(name)
        head, rest = DOCUMENT.read_text().split(begin)
        DOCUMENT.write_text(f"{head}{begin}\n{made(name)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    # As pytest has it; a script finds its own folder alone.
    sys.path[0] = str(ROOT / "test")
    if sys.argv[1:] == ["--check"]:
        sys.exit(any(documented(name) != made(name) for name in TABLES))
    main()
