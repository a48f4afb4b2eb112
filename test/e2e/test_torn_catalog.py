"""The catalog damaged under a running server: the last thing that is done to its world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.battered_world import OTHER_SETTINGS, of_setting
from e2e.helpers import assert_close
from e2e.worlds import World
from engram.store.layout import Layout
from refusals import refusal


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(0)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("suffix", ["-wal", ""], ids=["log", "catalog"])
@pytest.mark.parametrize("damage", [overwrite, truncate, remove])
def test_catalog_damaged_under_a_running_server(
    battered: World, damage: Callable[[Path], None], suffix: str
) -> None:
    """Requests get right tokens; a route works, or says what to do. The next start rebuilds."""
    catalog = Layout(battered.store).catalog
    path = catalog.with_name(catalog.name + suffix)
    if path.exists():
        damage(path)
    case = battered.cases[of_setting(next(iter(OTHER_SETTINGS)))]
    for tag in (None, case.name):
        reply = case.talk.peek(battered.client, case.message, tag)
        assert_close(reply, case.reference, 1e-3)
    for path, allowed in (("/list_snapshots", 200), ("/restore_snapshot", 409)):
        response = battered.client.post(path, {"conversation_id": case.name})
        if response.status_code != allowed:
            assert response.status_code == 500, response.text
            assert refusal(response)["error"] == "store_error"
            assert "restart" in refusal(response)["hint"]
