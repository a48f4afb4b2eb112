"""Two SQLite connections: one that writes, under one lock, with transactions that nest, and one
that reads, so that no reader waits for a commit to reach the disk.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from engram.catalog.checksum import damaged_row, with_checksum
from engram.catalog.schema import migrate, schema_problem
from engram.errors import EngramError, StoreError, StoreFullError

BUSY_TIMEOUT_MS: Final = 10_000
PROGRESS_STEPS: Final = 10_000
"""Steps of SQLite's machine, some hundred a millisecond, after which a check sees that it is to
end."""
PAGE_BYTES: Final = 4096
"""What SQLite writes at least; how much more it wanted it does not tell."""
# What SQLite says when not the file but its surroundings are the trouble; all else is damage.
_NOT_DAMAGE: Final = ("locked", "busy", "disk is full", "unable to open", "interrupted")


class CatalogDamagedError(Exception):
    """The file is no intact catalog. Caught by `Catalog.open`, which rebuilds it."""


class Database:
    """The catalog's connection. SQLite's errors come out as `StoreError` or `StoreFullError`."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, reader: sqlite3.Connection
    ) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()
        self._depth = 0
        self._writer: int | None = None
        self._reader = reader
        self._read_lock = threading.RLock()
        self._closed = False
        self.checked = False
        """Whether every page, reference and row has been found intact since it was opened."""

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> Database:
        """Open or make a catalog file, and `check` it at once unless told not to.

        Raises `CatalogDamagedError` or `StoreError`.
        """
        connection: sqlite3.Connection | None = None
        try:
            # Made here and not by SQLite, so that only the owner may read it. Empty is valid.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _catalog_error(path, error) from error
        try:
            connection = _connect(path)
            problem = _problem(connection) if check else None
            if problem is None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                migrate(connection)
                problem = schema_problem(connection)
                if check and problem is None:
                    problem = damaged_row(connection)
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
        try:
            reader = _connect(path)
            reader.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            connection.close()
            raise _catalog_error(path, error) from error
        database = cls(path, connection, reader)
        database.checked = check
        return database

    def close(self) -> None:
        """Close the connections. May be called again."""
        with self._lock, self._read_lock:
            self._closed = True
            self._reader.close()
            self._connection.close()

    def check(self) -> None:
        """Read everything and see whether it is intact, while others go on; takes seconds.

        Raises `CatalogDamagedError`, or `StoreError` where it could not be found out.
        """
        try:
            with closing(_connect(self.path)) as connection:
                connection.set_progress_handler(lambda: self._closed, PROGRESS_STEPS)
                problem = _problem(connection) or damaged_row(connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.Error) and any(t in str(error) for t in _NOT_DAMAGE):
                raise _catalog_error(self.path, error) from error
            raise CatalogDamagedError(str(error)) from error
        if problem is not None:
            raise CatalogDamagedError(problem)
        self.checked = True

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
            self._writer = threading.get_ident()
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
                if not depth:
                    self._writer = None

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Queries within see one state of the catalog, whatever others commit meanwhile."""
        if self._writer == threading.get_ident():
            yield
            return
        with self._read_lock:
            if self._reader.in_transaction:
                yield
                return
            self._read("BEGIN")
            try:
                yield
            finally:
                self._read("COMMIT")

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
                raise _catalog_error(self.path, error) from error

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query; within `atomic` it sees what was changed there."""
        if self._writer == threading.get_ident():
            return self._fetch(self._run(sql, parameters))
        with self._read_lock:
            return self._fetch(self._read(sql, parameters))

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(self.rows(sql, parameters)), None)

    def damaged(self, what: str) -> EngramError:
        """The error for a value that cannot be relied on."""
        return _catalog_error(self.path, sqlite3.DatabaseError(what))

    def _run(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(sql, parameters)
        except sqlite3.Error as error:
            raise _catalog_error(self.path, error) from error

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._reader.execute(sql, parameters)
        except sqlite3.Error as error:
            raise _catalog_error(self.path, error) from error

    def _fetch(self, cursor: sqlite3.Cursor) -> list[sqlite3.Row]:
        try:
            return cursor.fetchall()
        except sqlite3.Error as error:
            raise _catalog_error(self.path, error) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    return connection


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
        return StoreFullError.of(
            needed=PAGE_BYTES, free=_free_bytes(path.parent), where=str(path.parent)
        )
    locked = any(word in str(error) for word in ("locked", "busy"))
    return StoreError(
        f"catalog {path}: {error}",
        hint="end the other program that has the catalog open, then try again"
        if locked
        else "restart the server: a damaged catalog is rebuilt from the manifests",
        details={"file": str(path)},
    )


def _free_bytes(path: Path) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
