"""Every operation, every file operation and SQL statement in it, every way each can fail.

`python -m faults.table` (with test/, python/ and scripts/lib on PYTHONPATH) writes the table of
docs/faults.md.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engram.catalog import database
from engram.errors import EngramError
from engram.testing.faults import FaultyFileSystem, SimulatedCrash
from faults.engine import Keeper
from faults.ledger import Ledger, Promise, check_files, check_keeper
from faults.operations import NEW, OPERATIONS, Operation, two_turns
from repository import ROOT

DOCUMENT: Final = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

SPACE_NEEDED: Final = (
    *("mkdir", "create_temp", "write", "fsync", "rename", "fsync_dir", "allocate"),
)
"""File operations that can find the disk full."""
READS: Final = ("open_read", "read_into")
SQL_FAULTS: Final[dict[str, sqlite3.Error]] = {
    "SQLite busy": sqlite3.OperationalError("database is locked"),
    "SQLite full": sqlite3.OperationalError("database or disk is full"),
    "SQLite I/O error": sqlite3.OperationalError("disk I/O error"),
    "SQLite corrupt": sqlite3.DatabaseError("database disk image is malformed"),
}


# ---- SQL that fails ----


class SqlFaults:
    """Counts the statements of the catalog; fails, or dies at, the one of a number."""

    def __init__(self) -> None:
        self.count = 0
        self.armed = False
        self._at: int | None = None
        self._error: BaseException | None = None

    def fail(self, number: int, error: BaseException) -> None:
        """Raise `error` instead of the statement of this number, counted from 0."""
        self._at, self._error = number, error

    def meet(self) -> None:
        if not self.armed:
            return
        self.count += 1
        if self._error is not None and self.count - 1 == self._at:
            raise self._error

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Connections opened within meet the faults."""
        faults, original = self, database._connect
        opened: list[sqlite3.Connection] = []

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                faults.meet()
                return super().execute(*args)

            def executemany(self, *args: Any) -> sqlite3.Cursor:
                faults.meet()
                return super().executemany(*args)

        def connect(path: Path) -> sqlite3.Connection:
            connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, factory=Connection
            )
            connection.row_factory = sqlite3.Row
            opened.append(connection)
            return connection

        database._connect = connect
        try:
            yield
        finally:
            database._connect = original
            # As the kernel does with those of a process that was killed.
            for connection in opened:
                connection.close()


# ---- one case ----


@dataclass(frozen=True)
class Fault:
    """What fails: the call of this number of a file operation, or an SQL statement."""

    kind: str
    operation: str
    number: int
    error: int = 0

    @property
    def where(self) -> str:
        """The row of the table that it belongs to."""
        return f"{self.operation}: {self.kind}" if self.operation != "sql" else self.kind


@dataclass(frozen=True)
class Outcome:
    """What was answered, and what a restart finds: "before", "after", or "same" if they are one."""

    answer: str
    state: str


class NeverBetweenError(AssertionError):
    """A state that is neither the one before the operation nor the one after it."""


class Stage:
    """Stores to begin with, made once: an empty one and one with two turns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cases = 0
        self.tokens: dict[str, list[int]] = {}
        self._template = folder / "template"

        async def make() -> None:
            keeper = Keeper.start(self._template)
            await two_turns(keeper)
            self.tokens = keeper.tokens
            keeper.stop()

        asyncio.run(make())

    def store(self, operation: Operation) -> Path:
        """A store of its own for one case."""
        self._cases += 1
        root = self._folder / f"case-{self._cases}"
        if not operation.empty:
            shutil.copytree(self._template, root)
            operation.alter(root)
        return root

    # ---- what there is to fail ----

    def points(self, operation: Operation) -> tuple[Counter[str], int]:
        """How often each file operation is called, and how many SQL statements are made."""
        fs, sql = FaultyFileSystem(), SqlFaults()
        root = self.store(operation)
        self._run(operation, root, fs, sql, None)
        calls = Counter(name for name, _ in fs.calls if name != "close")
        shutil.rmtree(root)
        return calls, sql.count

    def faults(self, operation: Operation, *, every: bool = True) -> Iterator[Fault]:
        """Every fault at every point; or at each SQL statement another one, in turn."""
        calls, statements = self.points(operation)
        sql = [*SQL_FAULTS, "killed at an SQL statement"]
        for name, count in sorted(calls.items()):
            for number in range(count):
                yield Fault("EIO", name, number, errno.EIO)
                if name in SPACE_NEEDED:
                    yield Fault("ENOSPC", name, number, errno.ENOSPC)
                if name not in READS:
                    yield Fault("killed", name, number)
        for number in range(statements):
            for kind in sql if every else [sql[number % len(sql)]]:
                yield Fault(kind, "sql", number)

    # ---- what happens ----

    def outcome(self, operation: Operation, fault: Fault) -> Outcome:
        """Run into one fault, restart, check everything. Raises `NeverBetweenError` or another
        `AssertionError`."""
        root = self.store(operation)
        # Short writes as well: every write is of 100 bytes at most, and is gone on with.
        fs, sql = FaultyFileSystem(short=100), SqlFaults()
        if fault.operation == "sql":
            crash = fault.kind not in SQL_FAULTS
            sql.fail(fault.number, SimulatedCrash("sql") if crash else SQL_FAULTS[fault.kind])
        answer = self._run(operation, root, fs, sql, fault)
        state = self._after_restart(operation, root)
        if answer == "done" and state == "before":
            raise NeverBetweenError("acknowledged, and not there after a restart")
        shutil.rmtree(root)
        return Outcome(answer, state)

    def _run(
        self,
        operation: Operation,
        root: Path,
        fs: FaultyFileSystem,
        sql: SqlFaults,
        fault: Fault | None,
    ) -> str:
        def arm() -> None:
            fs.calls.clear()
            sql.armed = True
            if fault is not None and fault.operation != "sql":
                crash = fault.kind == "killed"
                fs.fail(fault.operation, after=fault.number, error=fault.error, crash=crash)

        async def run() -> None:
            if operation.act is None:
                arm()
            keeper = Keeper.start(root, fs)
            keeper.tokens = dict(self.tokens) if not operation.empty else {}
            try:
                if operation.act is not None:
                    await operation.prepare(keeper)
                    await keeper.service.context.engine()
                    arm()
                    await operation.act(keeper)
            finally:
                sql.armed = False
                if operation.act is not None or NEW in keeper.tokens:
                    self.tokens.update(keeper.tokens)
                keeper.stop()

        with sql.installed():
            try:
                asyncio.run(run())
            except SimulatedCrash:
                return "killed"
            except EngramError as error:
                return f"{error.http_status} `{error.code}`"
        return "done"

    def _after_restart(self, operation: Operation, root: Path) -> str:
        async def look() -> str:
            keeper = Keeper.start(root)
            try:
                assert keeper.catalog.report.damaged == []
                listed = frozenset(row.snapshot_id for row in keeper.catalog.all_snapshots())
                if listed not in (operation.before, operation.after):
                    raise NeverBetweenError(f"{sorted(listed)} are listed")
                promises = {name: Promise(self.tokens[name], saved=True) for name in listed}
                await check_keeper(keeper, Ledger(promises))
                # What SQLite calls damaged when a server starts is moved aside and built anew.
                check_files(keeper, aside=operation.act is None)
                # And it works: the operation may be done again, to its end.
                if operation.again and listed == operation.before:
                    keeper.tokens = dict(self.tokens) if not operation.empty else {}
                    await operation.prepare(keeper)
                    await operation.act(keeper)
                    rows = keeper.catalog.all_snapshots()
                    assert {row.snapshot_id for row in rows} == operation.after
                if operation.before == operation.after:
                    return "same"
                return "before" if listed == operation.before else "after"
            finally:
                keeper.stop()

        return asyncio.run(look())


# ---- the table ----


@dataclass
class Row:
    """All points of one operation at which one fault was met."""

    operation: str
    fault: str
    outcomes: Counter[Outcome]

    @property
    def cells(self) -> str:
        answers = Counter[str]()
        states = Counter[str]()
        for outcome, count in self.outcomes.items():
            answers[outcome.answer] += count
            states[outcome.state] += count
        return " | ".join(
            (
                self.operation,
                self.fault,
                str(sum(answers.values())),
                _counted(answers),
                _counted(states),
            )
        )


def _counted(found: Counter[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items()))


def rows_of(stage: Stage, operation: Operation, *, every: bool = True) -> list[Row]:
    """Meet the faults of one operation."""
    rows: dict[str, Row] = {}
    for fault in stage.faults(operation, every=every):
        row = rows.setdefault(fault.where, Row(operation.name, fault.where, Counter()))
        try:
            row.outcomes[stage.outcome(operation, fault)] += 1
        except AssertionError as error:
            raise AssertionError(f"{operation.name}, {fault}: {error}") from error
    return list(rows.values())


def markdown(rows: list[Row]) -> str:
    """The table as it stands in the document."""
    head = ["| operation | fault | points | answer | after a restart |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {row.cells} |" for row in rows)])


def documented() -> str:
    """The table that the document has."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Write the table into the document."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        stage = Stage(Path(folder))
        rows = [row for operation in OPERATIONS for row in rows_of(stage, operation)]
    head, rest = DOCUMENT.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{markdown(rows)}\n{END}{tail}")


if __name__ == "__main__":
    main()
