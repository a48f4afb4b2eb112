"""Saves turns by themselves, as the trigger policy says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
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


class AutomaticSaver:
    """One task a branch at a time; a turn put off gives way to a newer one of its branch."""

    def __init__(self, context: ServiceContext, saver: TurnSaver) -> None:
        self._context = context
        self._saver = saver
        self._due: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._last: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._closing = asyncio.Event()

    def finished(self, turn: Turn) -> None:
        """A turn has just finished: start its save if it is due."""
        settings = self._context.settings
        last = self._last.get(turn.tag.branch)
        since = None if last is None else time.monotonic() - last
        trigger = decide(settings, turn.number, since)
        if trigger.when is When.NEVER:
            return
        # Whoever asked that a reply ends when its snapshot is durable does not want it put off.
        delay = 0.0 if settings.snapshot_durability == "sync" else trigger.delay
        branch = turn.tag.branch
        task = self._context.start(self._save(turn, delay, self._due.get(branch)))
        self._due[branch] = task
        task.add_done_callback(lambda done: self._done(branch, done))

    async def settled(self, turn: Turn) -> None:
        """Return when the save of the turn, if one was due, is over."""
        task = self._due.get(turn.tag.branch)
        if task is not None:
            await asyncio.wait({task})

    def close(self) -> None:
        """Put nothing off any longer: what is due is saved now."""
        self._closing.set()

    def _done(self, branch: tuple[str, str, str], task: asyncio.Task[None]) -> None:
        if self._due.get(branch) is task:
            del self._due[branch]

    async def _save(self, turn: Turn, delay: float, before: asyncio.Task[None] | None) -> None:
        if delay:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)
        if before is not None:
            await asyncio.wait({before})
        if delay and self._due.get(turn.tag.branch) is not asyncio.current_task():
            return  # a newer turn that is due has its own task, which waits for this one
        if turn.snapshot_id is not None:
            return  # saved meanwhile by request; if it was deleted again, it stays deleted
        self._note(turn.tag.branch)
        durability = self._context.settings.snapshot_durability
        try:
            await self._saver.save(Found(turn.tag, turn=turn), None, durability)
        except Exception as error:
            what = f"turn {turn.number} of {turn.tag.conversation_id}/{turn.tag.branch_name}"
            self._context.stats.note(f"automatic save of {what}: {error}")
            expected = isinstance(error, EngramError)
            logger.error("Engram: %s was not saved: %s", what, error, exc_info=not expected)

    def _note(self, branch: tuple[str, str, str]) -> None:
        self._last[branch] = time.monotonic()
        self._last.move_to_end(branch)
        if len(self._last) > MAX_CLOCKS:
            self._last.popitem(last=False)
