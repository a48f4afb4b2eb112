"""How long these runs are. ENGRAM_FAULT_SCALE below 1 makes them shorter: 0.1 is a tenth."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def scaled() -> Callable[[float], int]:
    """How many rounds, or seconds, of so many."""
    scale = float(os.environ.get("ENGRAM_FAULT_SCALE", "1"))
    return lambda count: max(1, round(count * scale))


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder whose fsync takes no time where the system has one: what is durable is modelled."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="engram-faults-") as folder:
        yield Path(folder)
