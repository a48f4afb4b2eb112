"""The recorded tokens of conversations, for who goes on from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.core.tokens import TokenArray
from engram.errors import (
    ConversationBusyError,
    InvalidRequestError,
    NamespaceMismatchError,
    NotFoundError,
    UnsupportedError,
)
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo
from engram.service.restores import Restorer

SAME_MODEL: Final = ("model.config", "model.weights")
"""Fields of the namespace without which recorded tokens are not this model's.

Another layout, page size or dtype computes them again; another model reads them as something else.
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A turn that a request goes on from; the newest of its branch without `turn_number`."""

    conversation_id: str
    branch_name: str | None = None
    turn_number: int | None = None


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """A turn's tokens, prompt and reply, u32; the first `prompt_count` are the prompt, if known."""

    tag: Tag
    number: int
    tokens: TokenArray
    prompt_count: int | None
    snapshot_id: str | None


@dataclass(frozen=True, slots=True)
class Start:
    """What a stateful request goes on from, None at a beginning, and the tag of the turn it is."""

    tag: Tag
    source: RecordedTurn | None


class Recorded:
    """Finds turns, in memory or in the store, and says how a request goes on from one."""

    def __init__(self, context: ServiceContext, restorer: Restorer) -> None:
        self._context = context
        self._restorer = restorer
        self._busy: set[tuple[str, str, str]] = set()

    async def find(self, tag: Tag, number: int | None = None) -> RecordedTurn | None:
        """A turn of a branch, the newest without `number`; None if none is recorded.

        Raises `NamespaceMismatchError` for tokens of another model, and as a restore does for files
        that are damaged.
        """
        await self._context.learn(tag)
        turn = self.at_hand(tag, number)
        if turn is not None:
            return turn
        row = await self._context.row(tag, number)
        if row is None:
            return None
        await self._require_model(row)
        tokens, prompt_count = await self._restorer.recorded(row)
        return RecordedTurn(tag, row.turn_number, tokens, prompt_count, row.snapshot_id)

    def at_hand(self, tag: Tag, number: int | None = None) -> RecordedTurn | None:
        """`find` where it needs no store: a conversation that goes on does not wait for it.

        What is saved of a branch that is known is counted there: no snapshot is newer than the
        newest turn.
        """
        turn = self._context.tracker.find(tag, number)
        if turn is None:
            return None
        request = turn.request
        return RecordedTurn(
            tag, turn.number, request.tokens, request.prompt_count, turn.snapshot_id
        )

    async def start(
        self, tenant: str, conversation_id: str, branch_name: str | None, source: Place | None
    ) -> Start:
        """Where the next turn of a branch begins; at `source` if that is given.

        A branch that is not known begins at the newest turn of `main`; a conversation that is not
        known, anew.
        """
        tag = Tag(conversation_id, branch_name or DEFAULT_BRANCH, tenant)
        if source is None:
            turn = await self.find(tag)
            if turn is None and tag.branch_name != DEFAULT_BRANCH:
                turn = await self.find(replace(tag, branch_name=DEFAULT_BRANCH))
        else:
            turn = await self._source(tag, source)
        if turn is None:
            if self._context.tracker.newest(tag):
                raise NotFoundError(
                    f"the newest turn of conversation {conversation_id!r} was not saved, and is "
                    "not remembered any more",
                    hint="continue_from an earlier turn that is saved, or save turns as they end",
                    details={"conversation_id": conversation_id},
                )
            return Start(tag, None)
        if turn.tag.branch == tag.branch and source is None:
            return Start(tag, turn)
        return Start(replace(tag, parent_snapshot=turn.snapshot_id, after_turn=turn.number), turn)

    async def again(self, tag: Tag) -> tuple[Start, TokenArray]:
        """What the reply of a branch's newest turn was an answer to, to be answered again."""
        turn = await self._newest(tag)
        if turn.prompt_count is None:
            raise UnsupportedError(
                f"where the reply of turn {turn.number} begins was not recorded",
                hint="send the last message again, with continue_from the turn before it",
                details={"conversation_id": tag.conversation_id},
            )
        return Start(tag, turn), turn.tokens[: turn.prompt_count]

    async def further(self, tag: Tag) -> Start:
        """The newest turn of a branch, whose reply is to be written further."""
        return Start(tag, await self._newest(tag))

    def require_references(self, field: str) -> None:
        """Raise `UnsupportedError` where conversations may not begin at turns of others."""
        if not self._context.settings.enable_cross_session_refs:
            raise UnsupportedError(
                "a conversation cannot begin at another one's turn here",
                hint="start the server with --enable-cross-session-refs",
                details={"field": field},
            )

    def hold(self, tag: Tag) -> None:
        """Take a branch for one stateful request; `ConversationBusyError` if another has it."""
        if tag.branch in self._busy:
            raise ConversationBusyError(
                f"a reply of conversation {tag.conversation_id!r}, branch {tag.branch_name!r} is "
                "still being written",
                hint="wait for it, or go on from an earlier turn on another branch",
                details={
                    "conversation_id": tag.conversation_id,
                    "branch_name": tag.branch_name,
                },
            )
        self._busy.add(tag.branch)

    def release(self, tag: Tag) -> None:
        """The request that held a branch is over."""
        self._busy.discard(tag.branch)

    async def _source(self, tag: Tag, source: Place) -> RecordedTurn:
        if source.conversation_id != tag.conversation_id:
            self.require_references("continue_from.conversation_id")
            if await self._known(tag):
                raise InvalidRequestError(
                    f"conversation {tag.conversation_id!r} has turns on branch "
                    f"{tag.branch_name!r} already: it cannot begin at another one's",
                    hint="name a conversation or a branch that is new",
                    details={"field": "continue_from.conversation_id"},
                )
        place = Tag(source.conversation_id, source.branch_name or DEFAULT_BRANCH, tag.tenant)
        turn = await self.find(place, source.turn_number)
        if turn is None:
            number = source.turn_number
            what = "no turn" if number is None else f"no turn {number}"
            raise NotFoundError(
                f"{what} is recorded of conversation {place.conversation_id!r}, branch "
                f"{place.branch_name!r}",
                hint="turns that were not saved are forgotten when the server stops",
                details={"conversation_id": place.conversation_id},
            )
        return turn

    async def _newest(self, tag: Tag) -> RecordedTurn:
        turn = await self.find(tag)
        if turn is None:
            raise NotFoundError(
                f"no turn is recorded of conversation {tag.conversation_id!r}, branch "
                f"{tag.branch_name!r}",
                details={"conversation_id": tag.conversation_id},
            )
        return turn

    async def _known(self, tag: Tag) -> bool:
        await self._context.learn(tag)
        return self._context.tracker.newest(tag) > 0

    async def _require_model(self, row: SnapshotRow) -> None:
        async def check(engine: EngineInfo) -> None:
            if row.namespace == engine.namespace.id:
                return
            store = self._context.store
            found = (await self._context.in_store(store.get_namespace, row.namespace)).fields
            ours = engine.namespace.fields
            for field in SAME_MODEL:
                if ours.get(field) != found.get(field):
                    raise NamespaceMismatchError.of(field, ours.get(field), found.get(field))

        await self._context.with_engine(check)
