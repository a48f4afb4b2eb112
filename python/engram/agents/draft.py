"""The reply that a run's model is writing now, for who watches it being written.

It is in no journal: a reply counts when it is complete, and one that was cut off is written anew.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """How much of a draft a reader has: `offset` characters of the reply of step `step`."""

    step: int = -1
    offset: int = 0


class Draft:
    """The text of one reply after another, as far as it is written."""

    def __init__(self) -> None:
        self.step = -1
        self.text = ""

    def begin(self, step: int) -> None:
        """The reply of step `step` is asked for; the one before is complete."""
        self.step, self.text = step, ""

    def add(self, text: str) -> Position:
        """More of it is written; where that begins."""
        position = Position(self.step, len(self.text))
        self.text += text
        return position

    def after(self, position: Position) -> tuple[Position, str] | None:
        """What a reader at `position` has not seen yet, and where it begins; None if nothing."""
        start = position if position.step == self.step else Position(self.step, 0)
        text = self.text[start.offset :]
        return (start, text) if text else None


class Changes:
    """Lets any number of tasks wait for something to change, none of which misses a change."""

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def tell(self) -> None:
        """Something has changed."""
        self.count += 1
        # Another event for every change: if readers shared one, the first to clear it would take it
        # from those that have not looked yet.
        self._next.set()
        self._next = asyncio.Event()

    async def past(self, count: int) -> None:
        """Return when there have been more than `count` changes."""
        while self.count <= count:
            await self._next.wait()
