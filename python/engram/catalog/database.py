"""One SQLite connection, shared by all threads under one lock, with transactions that nest."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from engram.catalog.checksum import damaged_row, with_checksum
from engram.catalog.schema import migrate, schema_problem
from engram.errors import EngramError, StoreError, StoreFullError

BUSY_TIMEOUT_MS: Final = 10_000
# What SQLite says when not the file but its surroundings are the trouble; all else is damage.
_NOT_DAMAGE: Final = ("locked", "busy", "disk is full", "unable to open")


class CatalogDamagedError(Exception):
    """The file is no intact catalog. Caught by `Catalog.open`, which rebuilds it."""


class Database:
    """The catalog's connection. SQLite's errors come out as `StoreError` or `StoreFullError`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.RLock()
        self._depth = 0

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open and check, or make, a catalog file. Raises `CatalogDamagedError` or `StoreError`."""
        connection: sqlite3.Connection | None = None
        try:
            # Made here and not by SQLite, so that only the owner may read it. Empty is valid.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _catalog_error(path, error) from error
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            connection.row_factory = sqlite3.Row
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            problem = _problem(connection)
            if problem is None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                migrate(connection)
                problem = schema_problem(connection) or damaged_row(connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error) and any(t in str(error) for t in _NOT_DAMAGE):
                raise _catalog_error(path, error) from error
            # Damaged names come back as undecodable text.
            raise CatalogDamagedError(str(error)) from error
        if problem is not None:
            connection.close()
            raise CatalogDamagedError(problem)
        return cls(path, connection)

    def close(self) -> None:
        """Close the connection. May be called again."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """A transaction: all statements within, or none. They nest: an inner one that fails undoes
        its own part, and the outer one decides about the rest.
        """
        with self._lock:
            depth = self._depth
            begin, commit, rollback = (
                (f"SAVEPOINT s{depth}", f"RELEASE s{depth}", f"ROLLBACK TO s{depth}")
                if depth
                else ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
            )
            self._run(begin)
            self._depth = depth + 1
            try:
                yield
                self._run(commit)
            except BaseException:
                # A full disk makes SQLite roll back by itself; then nothing is left to undo.
                if self._connection.in_transaction:
                    self._run(rollback)
                raise
            finally:
                self._depth = depth

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Execute one statement; how many rows it changed."""
        with self._lock:
            return self._run(sql, parameters).rowcount

    def insert(
        self, table: str, rows: Sequence[Mapping[str, Any]], *, or_keep: bool = False
    ) -> None:
        """Insert rows, with their checksums. With ``or_keep``, those that are there stay."""
        checked = [with_checksum(row) for row in rows]
        names = ", ".join(f'"{name}"' for name in checked[0])
        marks = ", ".join("?" * len(checked[0]))
        conflict = " ON CONFLICT DO NOTHING" if or_keep else ""
        self.run_many(
            f"INSERT INTO {table} ({names}) VALUES ({marks}){conflict}",
            [tuple(row.values()) for row in checked],
        )

    def run_many(self, sql: str, parameters: Sequence[Sequence[Any]]) -> None:
        """Execute one statement for each item of ``parameters``."""
        with self._lock:
            try:
                self._connection.executemany(sql, parameters)
            except sqlite3.Error as error:
                raise _catalog_error(self._path, error) from error

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            cursor = self._run(sql, parameters)
            try:
                return cursor.fetchall()
            except sqlite3.Error as error:
                raise _catalog_error(self._path, error) from error

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(self.rows(sql, parameters)), None)

    def _run(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(sql, parameters)
        except sqlite3.Error as error:
            raise _catalog_error(self._path, error) from error


def _problem(connection: sqlite3.Connection) -> str | None:
    """Why a database cannot be trusted; None if it can, or is empty."""
    # Not quick_check, which does not compare tables with their indexes: a link row that points to
    # another segment would let the collector remove one that is in use.
    first = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if first != "ok":
        return f"integrity check: {first}"
    if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        return "a row refers to one that is not there"
    return None


def _catalog_error(path: Path, error: sqlite3.Error | OSError) -> EngramError:
    if "disk is full" in str(error):
        return StoreFullError.of(needed=0, free=None, where=str(path.parent))
    return StoreError(
        f"catalog {path}: {error}",
        hint="restart the server: a damaged catalog is rebuilt from the manifests",
        details={"file": str(path)},
    )
