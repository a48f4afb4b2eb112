"""`engram agents rekey`: what one API key has belongs to another then, all or nothing of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.agents.database import AGENT_FILE, AgentDatabase
from engram.agents.journal import Journal
from engram.agents.memory import MemoryStore
from engram.agents.owners import owner_of
from engram.cli.main import app
from engram.store.disk import DiskStore

OLD, NEW, NONE = (
    *(owner_of(f"Bearer {key}", keyed=True) for key in ("old-secret", "new-secret")),
    owner_of(None, keyed=False),
)


def rekey(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["agents", "rekey", "--dir", str(folder / "store"), *arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store whose agents have something under the old key and without one; both keys in files."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(f"{name}-secret\n")
    store = tmp_path / "store"
    DiskStore.open(store).close()

    async def fill() -> None:
        database = AgentDatabase(store / AGENT_FILE)
        memory, journal = MemoryStore(database), Journal(database)
        await memory.store(OLD, "mine", "an old station", conversation_id="c")
        await memory.store(OLD, "both", "of the old key")
        await journal.create(OLD, "c", {}, "explore-1")
        await memory.store(NONE, "anybody", "a clock")
        database.close()

    asyncio.run(fill())
    return tmp_path


def seen(folder: Path, owner: str) -> tuple[list[str], int, int]:
    """What an owner remembers, how much is found by a word, how many runs it has explored by."""

    async def look() -> tuple[list[str], int, int]:
        database = AgentDatabase(folder / "store" / AGENT_FILE)
        memory, journal = MemoryStore(database), Journal(database)
        keys = [one.key for one in await memory.search(owner, conversation_id="c")]
        found = await memory.search(owner, "station", conversation_id="c")
        runs = await journal.explored(owner, "explore-1")
        database.close()
        return sorted(keys), len(found), len(runs)

    return asyncio.run(look())


def keys(folder: Path) -> list[str]:
    return ["--old", str(folder / "old"), "--new", str(folder / "new")]


def test_everything_goes_to_the_new_key(folder: Path) -> None:
    assert seen(folder, NEW) == ([], 0, 0)
    result = rekey(folder, *keys(folder))
    assert result.exit_code == 0, result.output
    assert "2 memories and 1 runs" in result.output
    assert "secret" not in result.output
    assert seen(folder, NEW) == (["both", "mine"], 1, 1)
    assert seen(folder, OLD) == ([], 0, 0)
    assert seen(folder, NONE) == (["anybody"], 0, 0)
    again = rekey(folder, *keys(folder))
    assert again.exit_code == 2
    assert "neither memories nor runs" in again.output


def test_a_server_gets_its_first_key_and_loses_it(folder: Path) -> None:
    assert rekey(folder, "--new", str(folder / "new")).exit_code == 0
    assert seen(folder, NEW)[0] == ["anybody"]
    assert seen(folder, NONE)[0] == []
    assert rekey(folder, "--old", str(folder / "new")).exit_code == 0
    assert seen(folder, NONE)[0] == ["anybody"]


def test_nothing_is_given_where_not_all_can_be(folder: Path) -> None:
    async def clash() -> None:
        database = AgentDatabase(folder / "store" / AGENT_FILE)
        await MemoryStore(database).store(NEW, "both", "of the new key")
        database.close()

    asyncio.run(clash())
    before = [seen(folder, owner) for owner in (OLD, NEW)]
    result = rekey(folder, *keys(folder))
    assert result.exit_code == 2
    assert "1 memories" in result.output
    assert [seen(folder, owner) for owner in (OLD, NEW)] == before


def test_what_cannot_be_done(folder: Path) -> None:
    with DiskStore.open(folder / "store"):
        busy = rekey(folder, *keys(folder))
    (folder / "empty").write_text("\n")
    same, none, empty = (
        rekey(folder, "--old", str(folder / "old"), *more)
        for more in (
            ("--new", str(folder / "old")),
            ("--new", str(folder / "none")),
            ("--new", str(folder / "empty")),
        )
    )
    (folder / "store" / AGENT_FILE).unlink()
    nothing = rekey(folder, *keys(folder))
    for result, told in (
        (busy, "another server uses"),
        (same, "are the same"),
        (none, "cannot be read"),
        (empty, "is empty"),
        (nothing, "does not exist"),
    ):
        assert result.exit_code == 2, result.output
        assert told in result.output
    assert not (folder / "store" / AGENT_FILE).exists()
