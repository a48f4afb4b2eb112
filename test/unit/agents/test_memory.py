"""What agents keep is found again, by whom it belongs to, and survives kill -9."""

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.agents.database import AgentDatabase
from engram.agents.memory import MAX_VALUE_BYTES, MemoryChange, MemoryStore
from engram.errors import (
    InvalidRequestError,
    NotFoundError,
    StoreError,
    StoreFormatError,
    StoreFullError,
)

T = TypeVar("T")


def using(
    path: Path,
    work: Callable[[MemoryStore], Awaitable[T]],
    on_change: Callable[[MemoryChange], None] = lambda change: None,
    max_memories: int = 100,
) -> T:
    async def run() -> T:
        database = AgentDatabase(path)
        try:
            return await work(MemoryStore(database, on_change, max_memories=max_memories))
        finally:
            database.close()

    return asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agents.sqlite"


def test_a_value_comes_back_and_gives_way(path: Path) -> None:
    changes: list[MemoryChange] = []

    async def work(memory: MemoryStore) -> None:
        first = await memory.store("o", "colour", "red", category="taste")
        again = await memory.store("o", "colour", "blue")
        assert again.created_at == first.created_at
        found = await memory.recall("o", "colour")
        assert (found.value, found.category) == ("blue", None)
        assert await memory.count("o") == 1
        assert await memory.search("o", "red") == []
        await memory.delete("o", "colour")
        with pytest.raises(NotFoundError):
            await memory.recall("o", "colour")
        with pytest.raises(NotFoundError):
            await memory.delete("o", "colour")
        assert await memory.search("o", "blue") == []

    using(path, work, changes.append)
    assert [change.action for change in changes] == ["stored", "stored", "deleted"]


def test_a_conversations_memories_go_before_the_owners(path: Path) -> None:
    async def work(memory: MemoryStore) -> None:
        await memory.store("o", "name", "everywhere")
        await memory.store("o", "name", "here", conversation_id="c")
        await memory.store("o", "other", "elsewhere", conversation_id="d")
        assert (await memory.recall("o", "name", conversation_id="c")).value == "here"
        assert (await memory.recall("o", "name", conversation_id="d")).value == "everywhere"
        assert (await memory.recall("o", "name")).value == "everywhere"
        with pytest.raises(NotFoundError):
            await memory.recall("o", "other", conversation_id="c")
        found = await memory.search("o", "here everywhere elsewhere", conversation_id="c")
        assert {one.value for one in found} == {"here", "everywhere"}

    using(path, work)


def test_two_owners_stay_apart(path: Path) -> None:
    async def work(memory: MemoryStore) -> None:
        await memory.store("one", "name", "secret word", category="x", conversation_id="c")
        await memory.store("two", "name", "other word", category="x", conversation_id="c")
        assert (await memory.recall("two", "name", conversation_id="c")).value == "other word"
        for query in ("word", "secret", ""):
            found = await memory.search("two", query, category="x", conversation_id="c")
            assert {one.value for one in found} <= {"other word"}
        await memory.delete("two", "name", conversation_id="c")
        assert (await memory.recall("one", "name", conversation_id="c")).value == "secret word"

    using(path, work)


def test_search_by_words_and_by_category(path: Path) -> None:
    async def work(memory: MemoryStore) -> None:
        await memory.store("o", "a", "The café near the old station", category="place")
        await memory.store("o", "b", "An old friend of the family", category="person")
        await memory.store("o", "c", "The station clock", category="place")

        async def keys(query: str, **more: object) -> list[str]:
            found = await memory.search("o", query, **more)  # type: ignore[arg-type]
            return [one.key for one in found]

        assert (await keys("old station"))[0] == "a"
        assert set(await keys("old station")) == {"a", "b", "c"}
        assert await keys("CAFE") == ["a"]
        assert set(await keys("station", category="place")) == {"a", "c"}
        assert await keys("station", category="person") == []
        assert await keys("", category="place") == ["c", "a"]
        assert await keys("", limit=1) == ["c"]
        assert await keys("person") == ["b"]
        for query in ('"', "*", "AND", "a OR", "NEAR(", "key:x", "^", "-"):
            await keys(query)
        with pytest.raises(InvalidRequestError):
            await keys("", limit=0)

    using(path, work)


@given(query=st.text(max_size=40))
def test_no_query_breaks_the_search(query: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    async def work(memory: MemoryStore) -> None:
        await memory.search("o", query)

    using(tmp_path_factory.mktemp("query") / "agents.sqlite", work)


def test_what_is_too_large_or_too_much_is_refused(path: Path) -> None:
    async def work(memory: MemoryStore) -> None:
        await memory.store("o", "k", "x" * MAX_VALUE_BYTES)
        for key, value, category in (
            ("k", "x" * (MAX_VALUE_BYTES + 1), None),
            ("", "x", None),
            ("k" * 256, "x", None),
            ("a\n", "x", None),
            ("k", "\ud800", None),
            ("k", "x", ""),
        ):
            with pytest.raises(InvalidRequestError):
                await memory.store("o", key, value, category=category)
        await memory.store("o", "second", "x")
        with pytest.raises(StoreFullError):
            await memory.store("o", "third", "x")
        await memory.store("o", "second", "y")
        await memory.store("p", "third", "x")

    using(path, work, max_memories=2)


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:

            async def work() -> None:
                memory = MemoryStore(AgentDatabase(path))
                for number in range(20):
                    await memory.store("o", f"k{number}", f"value {number}", category="c")

            asyncio.run(work())
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)

    async def look(memory: MemoryStore) -> None:
        assert await memory.count("o") == 20
        assert (await memory.recall("o", "k19")).value == "value 19"
        assert [one.key for one in await memory.search("o", "7")] == ["k7"]
        assert len(await memory.search("o", category="c", limit=100)) == 20

    using(path, look)


def test_a_damaged_or_newer_file_is_refused_and_left(path: Path) -> None:
    AgentDatabase(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreFormatError):
        AgentDatabase(path)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match="backup"):
        AgentDatabase(path)
    assert path.read_bytes() == b"no database " * 1000


def test_only_the_owner_of_the_server_can_read_the_file(path: Path) -> None:
    AgentDatabase(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
