"""The journal of agent runs: what a run did, written before and after each thing it does.

A reply is written before its calls are made, a call before it begins and again when its outcome is
known.  So after a crash each call is known to have ended, not to have begun, or to have begun with
an outcome nobody knows.  The events that clients read are written with what they tell of.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engram.agents.database import AgentDatabase
from engram.errors import NotFoundError

MAX_PAGE: Final = 1_000
MAX_READ_BYTES: Final = 4 << 20
"""Of events at a time: one may hold a result of a tool."""

ACTIVE: Final = "running"
INTERRUPTED: Final = "interrupted"
OVER: Final = ("completed", "limit_reached", "failed", "cancelled")

_COLUMNS: Final = (
    "run_id, owner, conversation_id, request, status, result, created_at, updated_at, bytes, "
    "exploration"
)


@dataclass(frozen=True)
class Retention:
    """How much of the past a journal keeps; what is past one of the bounds goes, the oldest first.

    `runs` and `bytes` are of one owner and count runs that are over; `seconds` is since a run was
    last worked on, and holds for interrupted ones too.
    """

    runs: int = 10_000
    bytes: int = 1 << 30
    seconds: float = 30 * 86400.0


@dataclass
class Call:
    """One call of a tool.

    `call_id` is ours, of this run and place: what models call their calls is not always unique.
    `state` is ``waiting``, ``started`` or ``done``; `outcome` is what the tool answered:
    ``{"result": ...}`` or ``{"error": ...}``.
    """

    number: int
    call_id: str
    tool: str
    arguments: str
    state: str = "waiting"
    outcome: dict[str, Any] | None = None


@dataclass
class Step:
    """One reply of the model, with its calls.

    `reply` holds ``message``, ``finish_reason``, ``rid``, ``output_ids``, the tokens that were
    added to the prompt since the last reply (``prompt_ids``; of a rendered prompt all of them,
    with ``rendered`` true), ``cached_tokens``, ``prompt_tokens`` and what became of the checkpoint.
    """

    number: int
    reply: dict[str, Any]
    calls: list[Call] = field(default_factory=list)


@dataclass
class Run:
    """A run as it stands in the journal; times are seconds since the epoch.

    `bytes` is about what it takes up there, `exploration` what it is one branch of.
    """

    run_id: str
    owner: str
    conversation_id: str
    request: dict[str, Any]
    status: str
    result: dict[str, Any] | None
    created_at: float
    updated_at: float
    bytes: int = 0
    exploration: str | None = None
    steps: list[Step] = field(default_factory=list)


class Journal:
    """The runs of a server.  What a method has done is durable when it returns."""

    def __init__(self, database: AgentDatabase, retention: Retention | None = None) -> None:
        self._database = database
        self._retention = retention or Retention()

    async def create(
        self,
        owner: str,
        conversation_id: str,
        request: dict[str, Any],
        exploration: str | None = None,
    ) -> str:
        """A new run; its id."""
        run_id = f"run-{uuid.uuid4().hex}"
        now = time.time()

        def work(db: sqlite3.Connection) -> None:
            asked = _json(request)
            db.execute(
                f"INSERT INTO runs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, NULL, ?, ?, ?, ?)",
                (run_id, owner, conversation_id, asked, ACTIVE, now, now, len(asked), exploration),
            )
            self._prune(db, owner, now)

        await self._database.run(work)
        return run_id

    async def load(self, owner: str, run_id: str) -> Run:
        """A run with its steps and calls.  `NotFoundError`, for another owner's too."""

        def work(db: sqlite3.Connection) -> Run | None:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM runs WHERE run_id = ? AND owner = ?", (run_id, owner)
            ).fetchone()
            if row is None:
                return None
            run = _run(row)
            for number, reply in db.execute(
                "SELECT step, reply FROM steps WHERE run_id = ? ORDER BY step", (run_id,)
            ):
                run.steps.append(Step(number, json.loads(reply)))
            for step, number, call_id, tool, arguments, state, outcome in db.execute(
                "SELECT step, number, call_id, tool, arguments, state, outcome FROM calls "
                "WHERE run_id = ? ORDER BY step, number",
                (run_id,),
            ):
                known = None if outcome is None else json.loads(outcome)
                run.steps[step].calls.append(Call(number, call_id, tool, arguments, state, known))
            return run

        found = await self._database.run(work)
        if found is None:
            raise _unknown(run_id)
        return found

    async def remove(self, owner: str, run_id: str) -> None:
        """Forget a run with all that is known of it.  `NotFoundError`, for another owner's too."""

        def work(db: sqlite3.Connection) -> int:
            gone = db.execute("DELETE FROM runs WHERE run_id = ? AND owner = ?", (run_id, owner))
            return gone.rowcount

        if not await self._database.run(work):
            raise _unknown(run_id)

    async def require(self, owner: str, run_id: str) -> None:
        """Raise what `load` raises, without reading the run."""

        def work(db: sqlite3.Connection) -> bool:
            known = "SELECT 1 FROM runs WHERE run_id = ? AND owner = ?"
            return db.execute(known, (run_id, owner)).fetchone() is not None

        if not await self._database.run(work):
            raise _unknown(run_id)

    async def newest(self, owner: str, limit: int = 100) -> list[Run]:
        """An owner's runs without their steps and requests, the newest first."""
        # A request has as much as a body may have, and a page has many.
        columns = _COLUMNS.replace("request", "'{}'")

        def work(db: sqlite3.Connection) -> list[Run]:
            rows = db.execute(
                f"SELECT {columns} FROM runs WHERE owner = ? ORDER BY created_at DESC LIMIT ?",
                (owner, min(limit, MAX_PAGE)),
            )
            return [_run(row) for row in rows]

        return await self._database.run(work)

    async def explored(self, owner: str, exploration: str) -> list[str]:
        """The runs of an exploration, the first begun first."""

        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute(
                "SELECT run_id FROM runs WHERE owner = ? AND exploration = ? ORDER BY rowid",
                (owner, exploration),
            )
            return [run_id for (run_id,) in rows]

        return await self._database.run(work)

    async def explored_no_more(self, run_id: str) -> None:
        """The exploration that a run was a branch of is over, and the run is kept."""
        await self._database.run(
            lambda db: (
                db.execute(
                    "UPDATE runs SET exploration = NULL WHERE run_id = ?", (run_id,)
                ).rowcount
            )
        )

    async def interrupt(self) -> list[tuple[str, str]]:
        """Mark what was running when the last server ended; the owners and ids of those runs."""

        def work(db: sqlite3.Connection) -> list[tuple[str, str]]:
            found = db.execute(
                "SELECT owner, run_id FROM runs WHERE status = ?", (ACTIVE,)
            ).fetchall()
            now = time.time()
            db.execute(
                "UPDATE runs SET status = ?, updated_at = ? WHERE status = ?",
                (INTERRUPTED, now, ACTIVE),
            )
            for (owner,) in db.execute("SELECT DISTINCT owner FROM runs").fetchall():
                self._prune(db, owner, now)
            return found

        return await self._database.run(work)

    def _prune(self, db: sqlite3.Connection, owner: str, now: float) -> None:
        """Let go of what nobody has room or time for any more."""
        keep = self._retention
        db.execute(
            "DELETE FROM runs WHERE status != ? AND updated_at < ?", (ACTIVE, now - keep.seconds)
        )
        marks = ", ".join("?" * len(OVER))
        db.execute(
            "DELETE FROM runs WHERE run_id IN (SELECT run_id FROM (SELECT run_id, "
            "row_number() OVER newest AS runs, sum(bytes) OVER newest AS total FROM runs "
            f"WHERE owner = ? AND status IN ({marks}) "
            "WINDOW newest AS (ORDER BY updated_at DESC, run_id)) "
            "WHERE runs > 1 AND (runs > ? OR total > ?))",
            (owner, *OVER, keep.runs, keep.bytes),
        )

    async def set_status(
        self, run_id: str, status: str, result: dict[str, Any] | None, event: dict[str, Any]
    ) -> None:
        """A run begins again, or ends."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE runs SET status = ?, result = ? WHERE run_id = ?",
                (status, None if result is None else _json(result), run_id),
            )
            _tell(db, run_id, event)

        await self._database.run(work)

    async def add_step(self, run_id: str, step: Step, event: dict[str, Any]) -> None:
        """A reply, and the calls it asks for, none of which has begun."""
        now, reply = time.time(), _json(step.reply)
        size = len(reply) + sum(len(call.arguments) for call in step.calls)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?)",
                (run_id, step.number, reply, now),
            )
            db.executemany(
                "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)",
                [
                    (run_id, step.number, c.number, c.call_id, c.tool, c.arguments, c.state, now)
                    for c in step.calls
                ],
            )
            _tell(db, run_id, event, size)

        await self._database.run(work)

    async def set_reply(self, run_id: str, step: Step, event: dict[str, Any]) -> None:
        """Something more is known of a reply: what became of its checkpoint."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE steps SET reply = ? WHERE run_id = ? AND step = ?",
                (_json(step.reply), run_id, step.number),
            )
            _tell(db, run_id, event)

        await self._database.run(work)

    async def set_call(self, run_id: str, step: int, call: Call, event: dict[str, Any]) -> None:
        """A call begins, or its outcome is known."""
        outcome = None if call.outcome is None else _json(call.outcome)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE calls SET state = ?, outcome = ?, updated_at = ? "
                "WHERE run_id = ? AND step = ? AND number = ?",
                (call.state, outcome, time.time(), run_id, step, call.number),
            )
            _tell(db, run_id, event, len(outcome or ""))

        await self._database.run(work)

    async def tell(self, run_id: str, event: dict[str, Any]) -> None:
        """An event that changes nothing."""
        await self._database.run(lambda db: _tell(db, run_id, event))

    async def events(
        self, run_id: str, after: int, limit: int = 256
    ) -> Sequence[tuple[int, dict[str, Any]]]:
        """Events past number `after`, the oldest first, with their numbers.

        Not more than about `MAX_READ_BYTES` of them, but at least one if there is one.
        """

        def work(db: sqlite3.Connection) -> list[tuple[int, dict[str, Any]]]:
            found: list[tuple[int, dict[str, Any]]] = []
            size = 0
            for seq, event in db.execute(
                "SELECT seq, event FROM events WHERE run_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (run_id, after, limit),
            ):
                found.append((seq, json.loads(event)))
                size += len(event)
                if size >= MAX_READ_BYTES:
                    break
            return found

        return await self._database.run(work)


def _tell(db: sqlite3.Connection, run_id: str, event: dict[str, Any], more: int = 0) -> None:
    """Write an event down, with the `more` bytes that were written with it."""
    now = time.time()
    told = _json({**event, "run_id": run_id, "timestamp": now})
    db.execute(
        "INSERT INTO events SELECT ?, coalesce(max(seq), 0) + 1, ? FROM events WHERE run_id = ?",
        (run_id, told, run_id),
    )
    db.execute(
        "UPDATE runs SET bytes = bytes + ?, updated_at = ? WHERE run_id = ?",
        (len(told) + more, now, run_id),
    )


def _unknown(run_id: str) -> NotFoundError:
    return NotFoundError(f"no run {run_id[:100]!r}", details={"run_id": run_id[:100]})


def _run(row: tuple[Any, ...]) -> Run:
    run_id, owner, conversation_id, request, status, result, *numbers = row
    known = None if result is None else json.loads(result)
    return Run(run_id, owner, conversation_id, json.loads(request), status, known, *numbers)


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
