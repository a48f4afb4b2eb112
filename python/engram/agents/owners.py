"""Whose memories and runs are whose: each API key has its own, and can hand them on to another."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from typing import Final

from engram.agents.database import AgentDatabase
from engram.errors import AlreadyExistsError, InvalidRequestError, NotFoundError

EVERYBODY: Final = ""
"""The owner on a server without API keys."""


@dataclass(frozen=True)
class HandedOn:
    """How much has another owner now."""

    memories: int
    runs: int


def owner_of(authorization: str | None, *, keyed: bool) -> str:
    """Whose memories and runs a request means: those of its API key, one for all without keys.

    `authorization` is the request's header, which has been checked already. The key itself is
    not kept.
    """
    if not keyed or not authorization:
        return EVERYBODY
    return owner_of_key(authorization.split(" ", 1)[-1])


def owner_of_key(key: str | None) -> str:
    """The owner that an API key stands for; None for a server without keys."""
    if key is None:
        return EVERYBODY
    return "key-" + hashlib.sha256(b"engram owner\0" + key.encode()).hexdigest()[:32]


async def hand_on(database: AgentDatabase, old: str, new: str) -> HandedOn:
    """Give one owner's memories and runs, with its explorations, to another: all or none.

    No server may use the file. Raises `InvalidRequestError` if they are the same, `NotFoundError`
    if the old one has nothing, `AlreadyExistsError` where both remember something under one key.
    """
    if old == new:
        raise InvalidRequestError("the old and the new key are the same")

    def work(db: sqlite3.Connection) -> HandedOn:
        (both,) = db.execute(
            "SELECT count(*) FROM memories a JOIN memories b ON b.owner = ? "
            "AND b.conversation = a.conversation AND b.key = a.key WHERE a.owner = ?",
            (new, old),
        ).fetchone()
        if both:
            raise AlreadyExistsError(
                f"{both} memories have a place and a name that a memory of the new key has too",
                hint="delete one of each two, with the server under the key it belongs to",
                details={"memories": both},
            )
        changed = [
            db.execute(f"UPDATE {table} SET owner = ? WHERE owner = ?", (new, old)).rowcount
            for table in ("memories", "runs")
        ]
        if not any(changed):
            raise NotFoundError(
                "the old key has neither memories nor runs",
                hint="without --old it is what a server without keys has",
            )
        return HandedOn(*changed)

    return await database.run(work)
