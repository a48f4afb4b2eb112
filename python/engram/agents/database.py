"""The SQLite file of agents: what they remember, and the journal of their runs.

Unlike the catalog it is no index of something else: what is lost here is lost.  So every commit is
on the disk before it is acknowledged (WAL with full syncs), and a damaged file stops the server
instead of being made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from engram.errors import StoreError, StoreFormatError, StoreFullError

T = TypeVar("T")

AGENT_FILE: Final = "agents.sqlite"
"""Below the snapshot directory, beside the catalog."""
CLOSE_TIMEOUT_S: Final = 30.0

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """
        CREATE TABLE memories (
            id INTEGER PRIMARY KEY,
            owner TEXT NOT NULL,
            conversation TEXT NOT NULL,
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            category TEXT,
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL,
            UNIQUE (owner, conversation, key)
        )
        """,
        "CREATE INDEX memories_by_category ON memories (owner, category, updated_at)",
        """
        CREATE VIRTUAL TABLE memory_words USING fts5(
            key, value, category, content='memories', content_rowid='id',
            tokenize='unicode61 remove_diacritics 2'
        )
        """,
        """
        CREATE TRIGGER memories_added AFTER INSERT ON memories BEGIN
            INSERT INTO memory_words (rowid, key, value, category)
            VALUES (new.id, new.key, new.value, new.category);
        END
        """,
        """
        CREATE TRIGGER memories_removed AFTER DELETE ON memories BEGIN
            INSERT INTO memory_words (memory_words, rowid, key, value, category)
            VALUES ('delete', old.id, old.key, old.value, old.category);
        END
        """,
        """
        CREATE TRIGGER memories_changed AFTER UPDATE ON memories BEGIN
            INSERT INTO memory_words (memory_words, rowid, key, value, category)
            VALUES ('delete', old.id, old.key, old.value, old.category);
            INSERT INTO memory_words (rowid, key, value, category)
            VALUES (new.id, new.key, new.value, new.category);
        END
        """,
        """
        CREATE TABLE runs (
            run_id TEXT PRIMARY KEY,
            owner TEXT NOT NULL,
            conversation_id TEXT NOT NULL,
            request TEXT NOT NULL,
            status TEXT NOT NULL,
            result TEXT,
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL
        )
        """,
        "CREATE INDEX runs_by_owner ON runs (owner, created_at)",
        """
        CREATE TABLE steps (
            run_id TEXT NOT NULL REFERENCES runs (run_id) ON DELETE CASCADE,
            step INTEGER NOT NULL,
            reply TEXT NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (run_id, step)
        )
        """,
        """
        CREATE TABLE calls (
            run_id TEXT NOT NULL,
            step INTEGER NOT NULL,
            number INTEGER NOT NULL,
            call_id TEXT NOT NULL,
            tool TEXT NOT NULL,
            arguments TEXT NOT NULL,
            state TEXT NOT NULL,
            outcome TEXT,
            updated_at REAL NOT NULL,
            PRIMARY KEY (run_id, step, number),
            FOREIGN KEY (run_id, step) REFERENCES steps (run_id, step) ON DELETE CASCADE
        )
        """,
        """
        CREATE TABLE events (
            run_id TEXT NOT NULL REFERENCES runs (run_id) ON DELETE CASCADE,
            seq INTEGER NOT NULL,
            event TEXT NOT NULL,
            PRIMARY KEY (run_id, seq)
        )
        """,
    ),
    (
        "ALTER TABLE runs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        """
        UPDATE runs SET bytes = length(request)
            + (SELECT coalesce(sum(length(reply)), 0) FROM steps WHERE steps.run_id = runs.run_id)
            + (SELECT coalesce(sum(length(event)), 0) FROM events WHERE events.run_id = runs.run_id)
            + (
                SELECT coalesce(sum(length(arguments) + coalesce(length(outcome), 0)), 0)
                FROM calls WHERE calls.run_id = runs.run_id
            )
        """,
        "CREATE INDEX runs_by_age ON runs (updated_at)",
        "ALTER TABLE runs ADD COLUMN exploration TEXT",
        "CREATE INDEX runs_by_exploration ON runs (exploration) WHERE exploration IS NOT NULL",
    ),
    (
        # All that is asked to see what has to go: behind a request of a megabyte the rest of its
        # row is a megabyte away, and every run that begins would read the requests of all.
        "CREATE INDEX runs_by_status ON runs (owner, status, updated_at, run_id, bytes)",
    ),
)


class AgentDatabase:
    """One connection on one thread of its own: what is asked for is done in order, and no event
    loop waits for a disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = _open(path)
        self._thread = ThreadPoolExecutor(1, "engram-agents")

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns, in a transaction of its own: durable when this returns.

        `work` runs to its end even if nobody waits for it any more.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, partial(self._do, work)))

    def close(self) -> None:
        """Finish what was asked for, and close the file.  May be called again.

        A disk that hangs does not keep the server from ending: nothing was acknowledged that is not
        on it, and the file is valid however it is left.
        """
        with contextlib.suppress(RuntimeError):  # it was closed already
            wait([self._thread.submit(self._connection.close)], CLOSE_TIMEOUT_S)
        self._thread.shutdown(wait=False)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                found = work(self._connection)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise database_error(self.path, error) from error
        return found


def database_error(path: Path, error: Exception) -> StoreError:
    """SQLite's error as one of the tree."""
    if "disk is full" in str(error):
        return StoreFullError(
            f"no space left for {path}", hint="free space", details={"file": str(path)}
        )
    return StoreError(
        f"{path}: {error}",
        hint="what agents remember and the journal of their runs are in this file; restore it "
        "from a backup, or move it away to begin anew",
        details={"file": str(path)},
    )


def _open(path: Path) -> sqlite3.Connection:
    try:
        # Made here and not by SQLite, so that only the owner may read it. Empty is valid.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise database_error(path, error) from error
    try:
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(path, connection)
    except sqlite3.Error as error:
        connection.close()
        raise database_error(path, error) from error
    except StoreError:
        connection.close()
        raise
    return connection


def _migrate(path: Path, connection: sqlite3.Connection) -> None:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreFormatError.of(str(path), version, len(MIGRATIONS))
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
