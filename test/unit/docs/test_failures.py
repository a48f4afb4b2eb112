"""Every line of what happens when things fail names tests, and they are there."""

import re

import pytest

from repository import ROOT
from unit.docs.test_reference import rows

TABLE = rows((ROOT / "docs" / "architecture.md").read_text(), "When things fail")


@pytest.mark.parametrize("row", TABLE, ids=[event for event, *_ in TABLE])
def test_every_failure_has_tests_that_exist(row: list[str]) -> None:
    _, seen, shown = row
    assert seen
    tests = re.findall(r"`(test/[\w/]+\.py)::(\w+)`", shown)
    assert tests
    for path, name in tests:
        assert re.search(rf"def {name}\(", (ROOT / path).read_text()), name
