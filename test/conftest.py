"""What holds for every test."""

from pathlib import Path

import pytest
from hypothesis import settings

E2E = Path(__file__).parent / "e2e"

# No deadline: how long an example takes says nothing about whether it is right, and the machine may
# be busy. print_blob: a failure names the input that repeats it.
settings.register_profile("engram", deadline=None, print_blob=True)
settings.load_profile("engram")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
