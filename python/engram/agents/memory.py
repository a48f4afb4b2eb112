"""What agents keep: values under keys, found again by key, by words and by category.

A memory belongs to an owner, and there to one conversation or, without one, to all of them.  Within
a conversation its own memories go before those of the owner.
"""

from __future__ import annotations

import sqlite3
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engram.agents.database import AgentDatabase
from engram.core.ids import check_id
from engram.errors import InvalidRequestError, NotFoundError, StoreFullError

MAX_KEY: Final = 255
MAX_VALUE_BYTES: Final = 64 << 10
MAX_CATEGORY: Final = 64
MAX_MEMORIES: Final = 100_000
"""Of one owner."""
MAX_FOUND: Final = 100
MAX_WORDS: Final = 32
EVERYWHERE: Final = ""
"""The conversation of what belongs to all of an owner's."""

_COLUMNS: Final = "key, value, category, conversation, created_at, updated_at"


@dataclass(frozen=True)
class Memory:
    """One memory; times are seconds since the epoch, `conversation_id` None for all of them."""

    key: str
    value: str
    category: str | None
    conversation_id: str | None
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class MemoryChange:
    """Told of when a memory was stored or deleted."""

    owner: str
    conversation_id: str | None
    key: str
    category: str | None
    action: str


class MemoryStore:
    """The memories of a server.  What was stored is durable when `store` returns."""

    def __init__(
        self,
        database: AgentDatabase,
        on_change: Callable[[MemoryChange], None] = lambda change: None,
        *,
        max_memories: int = MAX_MEMORIES,
    ) -> None:
        self._database = database
        self._on_change = on_change
        self._max = max_memories

    async def store(
        self,
        owner: str,
        key: str,
        value: str,
        *,
        category: str | None = None,
        conversation_id: str | None = None,
    ) -> Memory:
        """Keep a value, in place of the one of that key.  `StoreFullError` for one too many."""
        place = _place(conversation_id)
        _check(key, "key", MAX_KEY)
        if category is not None:
            _check(category, "category", MAX_CATEGORY)
        _check_value(value)
        now = time.time()

        def work(db: sqlite3.Connection) -> Memory:
            known = db.execute(
                "SELECT created_at FROM memories WHERE owner = ? AND conversation = ? AND key = ?",
                (owner, place, key),
            ).fetchone()
            if known is None and _count(db, owner) >= self._max:
                raise StoreFullError(
                    f"{self._max} memories are kept already",
                    hint="delete some, or store under a key that exists",
                    details={"limit": self._max},
                )
            db.execute(
                "INSERT INTO memories (owner, conversation, key, value, category, created_at, "
                "updated_at) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner, conversation, key) "
                "DO UPDATE SET value = excluded.value, category = excluded.category, "
                "updated_at = excluded.updated_at",
                (owner, place, key, value, category, now, now),
            )
            created = now if known is None else known[0]
            return Memory(key, value, category, conversation_id, created, now)

        stored = await self._database.run(work)
        self._on_change(MemoryChange(owner, conversation_id, key, category, "stored"))
        return stored

    async def recall(self, owner: str, key: str, *, conversation_id: str | None = None) -> Memory:
        """The memory of a key: of the conversation, else of the owner.  `NotFoundError`."""
        place = _place(conversation_id)
        _check(key, "key", MAX_KEY)

        def work(db: sqlite3.Connection) -> Memory | None:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM memories WHERE owner = ? AND key = ? "
                "AND conversation IN (?, ?) ORDER BY conversation = ? DESC LIMIT 1",
                (owner, key, place, EVERYWHERE, place),
            ).fetchone()
            return None if row is None else _memory(row)

        found = await self._database.run(work)
        if found is None:
            raise _unknown(key)
        return found

    async def search(
        self,
        owner: str,
        query: str = "",
        *,
        category: str | None = None,
        conversation_id: str | None = None,
        limit: int = 10,
    ) -> list[Memory]:
        """Memories with words of the query, the best first; without words the newest first.

        Of the conversation and of the owner; without a conversation those of the owner alone.
        """
        place = _place(conversation_id)
        if not 1 <= limit <= MAX_FOUND:
            raise InvalidRequestError(
                f"limit must be from 1 to {MAX_FOUND}", details={"field": "limit"}
            )
        words = words_of(query)
        if query.strip() and not words:
            return []
        columns = ", ".join(f"m.{name}" for name in _COLUMNS.split(", "))
        where = "m.owner = ? AND m.conversation IN (?, ?)"
        values: list[object] = [owner, place, EVERYWHERE]
        if category is not None:
            where += " AND m.category = ?"
            values.append(category)
        if words:
            # In quotes, so that no word is an operator of the query language.
            match = " OR ".join(f'"{word}"' for word in words)
            text = (
                f"SELECT {columns} FROM memory_words JOIN memories m ON m.id = memory_words.rowid "
                f"WHERE memory_words MATCH ? AND {where} "
                "ORDER BY bm25(memory_words), m.updated_at DESC, m.id LIMIT ?"
            )
            values.insert(0, match)
        else:
            text = (
                f"SELECT {columns} FROM memories m WHERE {where} "
                "ORDER BY m.updated_at DESC, m.id DESC LIMIT ?"
            )
        values.append(limit)
        return await self._database.run(
            lambda db: [_memory(row) for row in db.execute(text, values).fetchall()]
        )

    async def delete(self, owner: str, key: str, *, conversation_id: str | None = None) -> None:
        """Forget a memory of exactly this place.  `NotFoundError`."""
        place = _place(conversation_id)
        _check(key, "key", MAX_KEY)
        gone = await self._database.run(
            lambda db: (
                db.execute(
                    "DELETE FROM memories WHERE owner = ? AND conversation = ? AND key = ?",
                    (owner, place, key),
                ).rowcount
            )
        )
        if not gone:
            raise _unknown(key)
        self._on_change(MemoryChange(owner, conversation_id, key, None, "deleted"))

    async def count(self, owner: str) -> int:
        """How many memories an owner has."""
        return await self._database.run(lambda db: _count(db, owner))


def words_of(query: str) -> list[str]:
    """The words of a query, as the index splits text: letters and digits, nothing else."""
    kept = [
        character if unicodedata.category(character)[0] in "LNM" else " "
        for character in query[:10_000]
    ]
    return "".join(kept).split()[:MAX_WORDS]


def _place(conversation_id: str | None) -> str:
    return EVERYWHERE if conversation_id is None else check_id("conversation_id", conversation_id)


def _check(text: str, field: str, limit: int) -> None:
    if not (0 < len(text) <= limit and text.isprintable()):
        raise InvalidRequestError(
            f"{field} must have 1 to {limit} printable characters", details={"field": field}
        )


def _check_value(value: str) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError("value is no text", details={"field": "value"}) from None
    if size > MAX_VALUE_BYTES:
        raise InvalidRequestError(
            f"value has {size} bytes, {MAX_VALUE_BYTES} may be", details={"field": "value"}
        )


def _count(db: sqlite3.Connection, owner: str) -> int:
    row = db.execute("SELECT count(*) FROM memories WHERE owner = ?", (owner,)).fetchone()
    return int(row[0])


def _memory(row: tuple[str, str, str | None, str, float, float]) -> Memory:
    key, value, category, conversation, created_at, updated_at = row
    return Memory(key, value, category, conversation or None, created_at, updated_at)


def _unknown(key: str) -> NotFoundError:
    return NotFoundError(
        f"nothing is remembered under {key!r}",
        hint="memory_search finds what is",
        details={"key": key},
    )
