"""Before or after, never between: every operation, with each of its steps failing in each way.

At each SQL statement one way is tried here, another at the next; `scripts/test --faults` tries all.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.operations import OPERATIONS, Operation
from faults.table import Stage, documented, rows_of


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder, prefix="engram-faults-") as name:
        yield Stage(Path(name))


def document() -> dict[tuple[str, str], list[str]]:
    """The documented points, answers and states by operation and fault."""
    lines = [line.strip("| ").split(" | ") for line in documented().splitlines()[2:]]
    return {(operation, fault): cells for operation, fault, *cells in lines}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_what_is_found_is_what_the_document_says(stage: Stage, operation: Operation) -> None:
    told = document()
    points = Counter((operation.name, fault.where) for fault in stage.faults(operation))
    assert {key: int(told[key][0]) for key in told if key[0] == operation.name} == points
    for row in rows_of(stage, operation, every=False):
        _, answers, states = told[row.operation, row.fault]
        for outcome in row.outcomes:
            assert outcome.answer in answers, row
            assert outcome.state in states, row


def test_every_operation_is_in_the_document() -> None:
    assert {operation for operation, _ in document()} == {found.name for found in OPERATIONS}
