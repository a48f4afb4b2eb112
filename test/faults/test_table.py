"""The whole fault table, as docs/faults.md has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.operations import OPERATIONS
from faults.table import Stage, documented, markdown, rows_of


@pytest.mark.timeout(3600)
def test_the_document_has_the_whole_table(in_memory: Path) -> None:
    stage = Stage(in_memory)
    rows = [row for operation in OPERATIONS for row in rows_of(stage, operation)]
    assert markdown(rows) == documented(), "python -m faults.table writes it"
