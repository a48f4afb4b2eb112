"""How many saves write at once, and where the others wait.

A save that writes holds its chain in RAM on every rank, so few do.  The others wait here, in the
HTTP process, where they hold nothing but their tokens.  Saves that somebody asked for go before
automatic ones, which nobody waits for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final

from engram.errors import SaveQueueFullError

SAVES_AT_ONCE: Final = 2
"""One can be written while the manifest and the row of the other are."""
MAX_WAITING_SAVES: Final = 256
"""Saves asked for that may wait; past that they are refused."""


class Ticket:
    """A place in the queue, until the end of its with-block; `admitted` waits for its turn."""

    def __init__(self, queue: SaveQueue, line: deque[Ticket]) -> None:
        self._queue = queue
        self._line = line
        self._turn = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether its turn has come."""
        return self._turn.is_set()

    async def admitted(self) -> None:
        """Return when this save may write."""
        await self._turn.wait()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.ready:
            self._queue.running -= 1
            self._queue.advance()
        else:
            self._line.remove(self)

    def admit(self) -> None:
        """It is this one's turn."""
        self._turn.set()


class SaveQueue:
    """The saves of one server: `running` ones, and two lines of waiting ones.

    Used on one event loop.  The line of automatic saves is bounded by who fills it.
    """

    def __init__(self) -> None:
        self.running = 0
        self._asked: deque[Ticket] = deque()
        self._automatic: deque[Ticket] = deque()

    @property
    def waiting(self) -> int:
        """Saves asked for that wait for their turn."""
        return len(self._asked)

    def ask(self) -> Ticket:
        """A place for a save that somebody asked for.  `SaveQueueFullError` if too many wait."""
        if len(self._asked) >= MAX_WAITING_SAVES:
            raise SaveQueueFullError(
                f"{len(self._asked)} saves wait to be written already",
                hint="the store is slower than what is saved: retry later, save fewer turns, or "
                "look at the disk",
                details={"waiting": len(self._asked), "limit": MAX_WAITING_SAVES},
            )
        return self._join(self._asked)

    def ask_behind(self) -> Ticket:
        """A place for an automatic save: its turn comes when nobody waits for another."""
        return self._join(self._automatic)

    def advance(self) -> None:
        """Admit whoever is next while there is room."""
        while self.running < SAVES_AT_ONCE and (self._asked or self._automatic):
            ticket = (self._asked or self._automatic).popleft()
            self.running += 1
            ticket.admit()

    def _join(self, line: deque[Ticket]) -> Ticket:
        ticket = Ticket(self, line)
        line.append(ticket)
        self.advance()
        return ticket
