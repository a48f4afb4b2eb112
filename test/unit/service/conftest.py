"""A server's service over a directory of its own."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from engram.testing.samples import seeded_random
from unit.service.engine import Server


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def server(tmp_path: Path, rng: Random) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", rng)
    yield server
    server.stop()
