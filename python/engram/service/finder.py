"""Which turn a save means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag, Turn
from engram.core.ids import DEFAULT_BRANCH, check_id
from engram.errors import AlreadyExistsError, InvalidRequestError, NotFoundError
from engram.service.context import ServiceContext

HOW_TO_TAG = (
    'send "conversation_id" with the request (or the header x-override-conversation-id), or save '
    'a finished request by its id: {"rid": ..., "conversation_id": ...}'
)
RESERVED: Final = "prefix:"
"""How the ids of the conversations begin that prefixes are kept as; no client may write to them."""


def check_not_reserved(field: str, conversation_id: str) -> None:
    """Raise `InvalidRequestError` for a conversation that a turn of a client's cannot be of."""
    if conversation_id.startswith(RESERVED):
        raise InvalidRequestError(
            f"ids that begin with {RESERVED!r} are those of named prefixes",
            hint="a request need not name a prefix: it starts from the one that it begins with",
            details={"field": field},
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A turn to save on the branch `tag`: not saved yet (`turn`) or a snapshot already (`row`).

    A `row` of another branch is where the branch of `tag` starts.
    """

    tag: Tag
    turn: Turn | None = None
    row: SnapshotRow | None = None

    @property
    def number(self) -> int:
        """The number of the turn."""
        if self.turn is not None:
            return self.turn.number
        assert self.row is not None
        return self.row.turn_number

    @property
    def stored(self) -> SnapshotRow:
        """The snapshot that it is, or that its branch starts from; only where there is no turn."""
        assert self.row is not None
        return self.row

    @property
    def saved(self) -> bool:
        """True when there is nothing left to do."""
        row = self.row
        return row is not None and self.tag.branch == (
            row.tenant,
            row.conversation_id,
            row.branch_name,
        )


class TurnFinder:
    """Resolves ids to turns; a turn in memory goes before an older snapshot."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def by_rid(
        self, tenant: str, rid: str, conversation_id: str | None, branch_name: str | None
    ) -> Found:
        """The turn that a finished request is; with a conversation id it is adopted by that."""
        tracker = self._context.tracker
        unnumbered = tracker.unnumbered(rid)
        if unnumbered is not None:
            await self._context.learn(unnumbered)
        turn = tracker.turn_of(rid)
        if turn is not None and turn.tag.tenant == tenant:
            if conversation_id not in (None, turn.tag.conversation_id):
                raise AlreadyExistsError(
                    f"request {rid!r} is turn {turn.number} of conversation "
                    f"{turn.tag.conversation_id!r} already",
                    hint="save it there, or leave conversation_id out",
                )
            tag = replace(turn.tag, branch_name=branch_name or turn.tag.branch_name)
        else:
            row = None
            if not tracker.is_untagged(rid):
                # Else a client has used the id of a saved request again, and means the newer one.
                catalog = self._context.catalog
                row = await self._context.in_catalog(catalog.find_rid, rid, tenant)
            if row is not None and conversation_id in (None, row.conversation_id):
                tag = Tag(row.conversation_id, branch_name or row.branch_name, tenant)
                return Found(tag, row=row)
            # A request that was in no conversation starts one under its own id, if that can be one.
            name = conversation_id or check_id("rid", rid)
            check_not_reserved("rid" if conversation_id is None else "conversation_id", name)
            tag = Tag(name, branch_name or DEFAULT_BRANCH, tenant)
            await self._context.learn(tag)
            turn = tracker.adopt(rid, tag)
        return await self._prefer_row(tag, turn)

    async def by_place(
        self, tenant: str, conversation_id: str, branch_name: str | None, turn_number: int | None
    ) -> Found:
        """A turn of a branch; on a branch not known yet, the turn of `main` it starts at."""
        tag = Tag(conversation_id, branch_name or DEFAULT_BRANCH, tenant)
        found = await self._at(tag, tag, turn_number)
        if found is None and not await self._known(tag):
            main = replace(tag, branch_name=DEFAULT_BRANCH)
            found = await self._at(main, tag, turn_number)
        if found is None:
            raise await self._unknown(tag, turn_number)
        return found

    async def _at(self, source: Tag, tag: Tag, turn_number: int | None) -> Found | None:
        await self._context.learn(source)
        row = await self._context.row(source, turn_number)
        turn = self._context.tracker.find(source, turn_number)
        if turn is not None and (row is None or row.turn_number < turn.number):
            return await self._prefer_row(tag, turn)
        return None if row is None else Found(tag, row=row)

    async def _prefer_row(self, tag: Tag, turn: Turn) -> Found:
        """The snapshot of a turn, where it has one: then a branch costs no state."""
        for place in (tag, turn.tag):
            row = await self._context.row(place, turn.number)
            if row is not None:
                return Found(tag, row=row)
        return Found(tag, turn=turn)

    async def _known(self, tag: Tag) -> bool:
        await self._context.learn(tag)
        if self._context.tracker.newest(tag):
            return True
        return await self._context.row(tag, None) is not None

    async def _unknown(self, tag: Tag, turn_number: int | None) -> Exception:
        if await self._known(tag):
            return NotFoundError(
                f"conversation {tag.conversation_id!r} has no turn {turn_number} on branch "
                f"{tag.branch_name!r} that could be saved",
                hint=f"its newest turn is {self._context.tracker.newest(tag)}; turns that were "
                "not saved are forgotten when the server stops",
            )
        main = replace(tag, branch_name=DEFAULT_BRANCH)
        if tag.branch_name != DEFAULT_BRANCH and await self._known(main):
            return NotFoundError(
                f"conversation {tag.conversation_id!r} has neither a branch {tag.branch_name!r} "
                f"nor a turn {turn_number} that it could start at",
            )
        return NotFoundError(f"no conversation {tag.conversation_id!r}", hint=HOW_TO_TAG)


def need_place(conversation_id: str | None, rid: str | None) -> None:
    """One of the two must be given."""
    if conversation_id is None and rid is None:
        raise InvalidRequestError(
            "conversation_id or rid is needed", details={"field": "conversation_id"}
        )
