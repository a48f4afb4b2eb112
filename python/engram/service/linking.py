"""Which recorded conversations an untagged chat may be the next turn of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import uuid4

import numpy as np

from engram.conversation.turns import Tag
from engram.core.canonical import blake3_hex
from engram.core.tokens import to_tokens
from engram.errors import EngramError
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo
from engram.service.recorded import Recorded, RecordedTurn

LINKED: Final = "linked-"
"""How the ids of conversations begin that nobody named."""
MAX_LOOKED_AT: Final = 256
"""Branches in memory whose tokens are compared, the most recently used ones."""
MAX_CANDIDATES: Final = 8
"""Whose texts are compared, of each kind."""


class PrefixLinks:
    """Finds conversations by what they say.

    Three ways, for no single one finds all: by tokens in memory, by the page key at which a stored
    turn ends, and by the opening, from which the id of a conversation that nobody named is made.
    The last finds those whose replies are tokenised differently, also after a restart.
    """

    def __init__(self, context: ServiceContext, recorded: Recorded) -> None:
        self._context = context
        self._recorded = recorded

    async def candidates(self, tenant: str, ids: Sequence[int], opening: str) -> list[RecordedTurn]:
        """Newest turns of branches that may begin as the prompt does, the likeliest first.

        Args:
            ids: the prompt as it is tokenised.
            opening: the text of the prompt up to where its first reply begins.
        """
        tags = dict.fromkeys(
            [
                *self._in_memory(tenant, ids),
                *await self._context.with_engine(lambda engine: self._stored(engine, tenant, ids)),
                *await self._context.in_catalog(self._opened, tenant, opening),
            ]
        )
        found = []
        for tag in tags:
            try:
                turn = await self._recorded.find(tag)
            except EngramError as error:
                self._context.stats.note(f"tokens of {tag.conversation_id}: {error}")
                continue
            if turn is not None:
                found.append(turn)
        return sorted(found, key=lambda turn: -len(turn.tokens))

    def begin(self, tenant: str, opening: str) -> Tag:
        """The tag of a conversation that begins with a request nobody tagged."""
        return Tag(f"{_opening_id(opening)}.{uuid4().hex}", tenant=tenant)

    def _in_memory(self, tenant: str, ids: Sequence[int]) -> list[Tag]:
        prompt = to_tokens(ids)
        likely = []
        for turn in self._context.tracker.newest_turns(tenant, MAX_LOOKED_AT):
            count = min(len(prompt), len(turn.request.tokens))
            differs = np.flatnonzero(prompt[:count] != turn.request.tokens[:count])
            common = int(differs[0]) if len(differs) else count
            if common:
                likely.append((common, turn.tag))
        likely.sort(key=lambda one: -one[0])
        return [Tag(tag.conversation_id, tag.branch_name, tenant) for _, tag in likely][
            :MAX_CANDIDATES
        ]

    async def _stored(self, engine: EngineInfo, tenant: str, ids: Sequence[int]) -> list[Tag]:
        context = self._context
        if context.boundaries.namespace != engine.namespace.id or not len(context.boundaries):
            return []
        keys = context.ranks.page_keys(to_tokens(ids)[:-1], engine.page_size, None, None)
        boundary = context.boundaries.longest(keys, engine.page_size)
        if boundary is None:
            return []
        rows = await context.in_catalog(
            context.catalog.ending_at, tenant, engine.namespace.id, boundary.key, MAX_CANDIDATES
        )
        return [Tag(row.conversation_id, row.branch_name, tenant) for row in rows]

    def _opened(self, tenant: str, opening: str) -> list[Tag]:
        begun = self._context.catalog.branches_of_many(
            tenant, f"{_opening_id(opening)}.", MAX_CANDIDATES
        )
        return [Tag(conversation_id, branch_name, tenant) for conversation_id, branch_name in begun]


def _opening_id(opening: str) -> str:
    # Half a surrogate pair has no UTF-8 of its own, and is no reason to fail.
    return LINKED + blake3_hex(opening.encode("utf-8", "surrogatepass"))[:32]
