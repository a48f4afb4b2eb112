"""A live server for the tests of the client and of the command."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engram.client import EngramClient
from engram.testing.samples import seeded_random
from unit.client.live import Live, serving
from unit.service.engine import Server


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    server = Server.start(tmp_path / "store", seeded_random())
    with serving(server) as live:
        yield live
    server.stop()


@pytest.fixture
def client(live: Live) -> Iterator[EngramClient]:
    with EngramClient(live.url) as client:
        yield client
