"""Saves turns by themselves, as the trigger policy says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from engram.conversation.turns import Turn
from engram.errors import EngramError
from engram.service.context import ServiceContext
from engram.service.finder import Found
from engram.service.saves import TurnSaver
from engram.service.triggers import When, decide

logger = logging.getLogger(__name__)

MAX_CLOCKS: Final = 100_000
"""Conversations whose last automatic save is remembered for the least interval."""
MAX_WAITING_TURNS: Final = 1_024
"""Turns that may wait for their automatic save."""

_Branch = tuple[str, str, str]


@dataclass(eq=False)
class _Due:
    """A turn that waits for its save: from `at` on (monotonic seconds) it need not be put off."""

    turn: Turn
    at: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)


class AutomaticSaver:
    """One save a branch at a time, in the order of turns, while a bounded number of others waits.

    A turn put off gives way to a newer one of its branch.  When too many wait, the older turn of a
    branch gives way to the newer one, whose chain contains its state; only when every branch has
    just its last turn waiting is a new one left out.  What is left out is counted and noted.
    """

    def __init__(self, context: ServiceContext, saver: TurnSaver) -> None:
        self._context = context
        self._saver = saver
        self._due: dict[_Branch, deque[_Due]] = {}
        self._saving: dict[_Branch, _Due] = {}
        self._workers: dict[_Branch, asyncio.Task[None]] = {}
        self._last: OrderedDict[_Branch, float] = OrderedDict()
        self._closing = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Turns that wait for their save."""
        return sum(len(line) for line in self._due.values())

    def finished(self, turn: Turn, *, tool_calls: bool = False) -> None:
        """A turn has just finished: see to its save if it is due.

        Said again `tool_calls` when its reply turns out to contain some, before its client has it.
        """
        settings = self._context.settings
        branch = turn.tag.branch
        now = time.monotonic()
        last = self._last.get(branch)
        since = None if last is None else now - last
        trigger = decide(settings, turn.number, since, tool_calls=tool_calls)
        if trigger.when is When.NEVER:
            return
        # Whoever asked that a reply ends when its snapshot is durable does not want it put off.
        put_off = trigger.delay if settings.snapshot_durability == "async" else 0.0
        line = self._due.get(branch)
        if line and line[-1].at > now:
            # It was put off for exactly this: that a newer turn may come.
            line.pop().over.set()
        if self.waiting >= MAX_WAITING_TURNS and not self._make_room(branch):
            self._leave_out(turn)
            return
        self._due.setdefault(branch, deque()).append(_Due(turn, now + put_off if put_off else 0.0))
        if branch not in self._workers:
            self._workers[branch] = self._context.start(self._work(branch))

    async def settled(self, turn: Turn) -> None:
        """Return when the save of the turn, if one is due, is over."""
        branch = turn.tag.branch
        for due in (self._saving.get(branch), *self._due.get(branch, ())):
            if due is not None and due.turn is turn:
                await due.over.wait()

    def forget(self, tenant: str, conversation_id: str, branch_name: str | None = None) -> None:
        """A conversation, or one of its branches, is being deleted: none of its turns is due."""
        for branch, line in self._due.items():
            if branch[:2] == (tenant, conversation_id) and branch_name in (None, branch[2]):
                while line:
                    line.popleft().over.set()

    def close(self) -> None:
        """Put nothing off any longer: what is due is saved now."""
        self._closing.set()

    def _make_room(self, branch: _Branch) -> bool:
        """Leave out a turn that a newer one contains: of this branch, else of another."""
        line = self._due.get(branch)
        if not line:
            line = next((line for line in self._due.values() if len(line) > 1), None)
        if not line:
            return False
        older = line.popleft()
        older.over.set()
        self._leave_out(older.turn)
        return True

    def _leave_out(self, turn: Turn) -> None:
        what = f"automatic save of {_shown(turn)}: left out, {self.waiting} turns wait to be saved"
        self._context.stats.left_out_saves += 1
        self._context.stats.note(what)
        logger.warning("Engram: %s; the store is slower than what is saved", what)

    async def _work(self, branch: _Branch) -> None:
        """Save what is due on a branch, one turn after another."""
        try:
            while line := self._due.get(branch):
                await self._ripen(line)
                with self._context.saves.ask_behind() as ticket:
                    if line:
                        await self._saver.admitted(ticket, line[-1].turn)
                    if not line:
                        break  # left out meanwhile
                    due = line.popleft()
                    if not line:
                        del self._due[branch]
                    self._saving[branch] = due
                    try:
                        await self._save(due.turn)
                    finally:
                        del self._saving[branch]
                        due.over.set()
        finally:
            self._due.pop(branch, None)
            del self._workers[branch]

    async def _ripen(self, line: deque[_Due]) -> None:
        """Wait until the first of a line is not to be put off any longer."""
        while line and (delay := line[0].at - time.monotonic()) > 0 and not self._closing.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)

    async def _save(self, turn: Turn) -> None:
        if turn.snapshot_id is not None:
            return  # saved meanwhile by request; if it was deleted again, it stays deleted
        self._note(turn.tag.branch)
        durability = self._context.settings.snapshot_durability
        try:
            await self._saver.save_now(Found(turn.tag, turn=turn), durability)
        except Exception as error:
            self._context.stats.note(f"automatic save of {_shown(turn)}: {error}")
            expected = isinstance(error, EngramError)
            logger.error("Engram: %s was not saved: %s", _shown(turn), error, exc_info=not expected)

    def _note(self, branch: _Branch) -> None:
        self._last[branch] = time.monotonic()
        self._last.move_to_end(branch)
        if len(self._last) > MAX_CLOCKS:
            self._last.popitem(last=False)


def _shown(turn: Turn) -> str:
    return f"turn {turn.number} of {turn.tag.conversation_id}/{turn.tag.branch_name}"
