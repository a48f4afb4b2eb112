"""Pins in VRAM: conversations whose newest state SGLang's tree must keep.

A pin follows its branch: after each turn it is set again at the turn's end.  Where the tree does
not hold the state, the pin waits for the next turn.  Pins are the running server's: a restart
forgets them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Final

from engram.conversation.turns import FinishedRequest, Tag, Turn
from engram.errors import PinBudgetError
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo
from engram.service.restores import Restorer

logger = logging.getLogger(__name__)

MAX_PINS: Final = 1_000


@dataclass(frozen=True, slots=True)
class PinResult:
    """A pin that is set; `resident` says whether VRAM holds the state now."""

    tag: Tag
    resident: bool


class VramPinner:
    """The pins of one server.  Used on one event loop."""

    def __init__(self, context: ServiceContext, restorer: Restorer) -> None:
        self._context = context
        self._restorer = restorer
        self._pins: dict[str, Tag] = {}

    async def pin(self, tag: Tag) -> PinResult:
        """Pin the newest state of a branch.  Raises `NotFoundError` or `PinBudgetError`."""
        owner = _owner(tag)
        if owner not in self._pins and len(self._pins) >= MAX_PINS:
            raise PinBudgetError(
                f"{MAX_PINS} conversations are pinned already", hint="unpin another one"
            )
        await self._context.learn(tag)
        turn = self._context.tracker.find(tag)
        if turn is not None:
            resident = await self._set(owner, turn.request, None)
        else:
            row = await self._context.in_catalog(
                self._context.catalog.find, tag.tenant, tag.conversation_id, tag.branch_name
            )
            tokens = await self._restorer.tokens(row)
            request = FinishedRequest(row.rid or "", tokens, time.time())
            resident = await self._set(owner, request, row.token_count)
        self._pins[owner] = tag
        return PinResult(tag, resident)

    async def _set(self, owner: str, request: FinishedRequest, boundary: int | None) -> bool:
        context = self._context

        async def ask(engine: EngineInfo) -> bool:
            end = boundary or context.expected_boundary(request, engine)
            return await context.ranks.pin(engine.namespace.id, request, end, owner)

        return await context.with_engine(ask)

    async def unpin(self, tag: Tag) -> bool:
        """Let go of a branch; whether it was pinned."""
        known = self._pins.pop(_owner(tag), None) is not None
        return await self._context.ranks.unpin(_owner(tag)) or known

    def follow(self, turn: Turn) -> None:
        """A turn has finished: if its branch is pinned, the pin moves to its end."""
        if _owner(turn.tag) in self._pins:
            self._context.start(self._move(turn))

    async def _move(self, turn: Turn) -> None:
        owner = _owner(turn.tag)
        try:
            await self._set(owner, turn.request, None)
            if owner not in self._pins:
                # Unpinned meanwhile: what came after that has nobody to let go of it.
                await self._context.ranks.unpin(owner)
        except Exception as error:
            # It stays pinned where it was.
            self._context.stats.note(f"pin of {turn.tag.conversation_id}: {error}")
            logger.error("Engram: the pin of %s was not moved: %s", turn.tag.conversation_id, error)

    def report(self, resident: set[str]) -> list[dict[str, Any]]:
        """The pins; ``resident`` are the owners of those that VRAM holds."""
        return [
            {
                "conversation_id": tag.conversation_id,
                "branch_name": tag.branch_name,
                "resident": owner in resident,
            }
            for owner, tag in self._pins.items()
        ]


def _owner(tag: Tag) -> str:
    return f"pin:{tag.tenant}/{tag.conversation_id}/{tag.branch_name}"
