"""Branches: a snapshot as the start of another branch, or of another conversation. O(1)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.errors import AlreadyExistsError, InvalidRequestError, UnsupportedError
from engram.service.context import ServiceContext
from engram.service.finder import Found
from engram.service.results import SaveResult
from engram.service.saves import TurnSaver


class Brancher:
    """Starts branches of one server's conversations."""

    def __init__(self, context: ServiceContext, saver: TurnSaver) -> None:
        self._context = context
        self._saver = saver

    async def branch(
        self,
        row: SnapshotRow,
        *,
        branch_name: str | None,
        conversation_id: str | None,
        snapshot_id: str | None,
    ) -> SaveResult:
        """Make a snapshot the start of a new branch of its conversation, or of a new conversation.

        To ask for the same once more returns what there is. `AlreadyExistsError` if the branch has
        other turns; `UnsupportedError` for another conversation where those are kept apart.
        """
        tag = self._target(row, branch_name, conversation_id)
        await self._check_new(row, tag)
        found = Found(tag, row=row)
        await self._saver.check_free(found, snapshot_id)
        # A client that goes away must not tear a save in the middle.
        work = self._saver.save(found, snapshot_id, "sync")
        return await asyncio.shield(self._context.start(work))

    def _target(
        self, row: SnapshotRow, branch_name: str | None, conversation_id: str | None
    ) -> Tag:
        own = Tag(row.conversation_id, row.branch_name, row.tenant)
        if conversation_id in (None, row.conversation_id):
            if branch_name is None:
                raise InvalidRequestError(
                    "branch_name or conversation_id is needed", details={"field": "branch_name"}
                )
            return replace(own, branch_name=branch_name)
        if not self._context.settings.enable_cross_session_refs:
            raise UnsupportedError(
                "a conversation cannot start from another's snapshot here",
                hint="the server runs with --no-enable-cross-session-refs",
                details={"field": "conversation_id"},
            )
        assert conversation_id is not None
        return replace(
            own, conversation_id=conversation_id, branch_name=branch_name or DEFAULT_BRANCH
        )

    async def _check_new(self, row: SnapshotRow, tag: Tag) -> None:
        """The branch has no turns, or just the one that would be made."""
        await self._context.learn(tag)
        newest = await self._context.row(tag, None)
        if newest is None and not self._context.tracker.newest(tag):
            return
        only = newest is not None and newest.turn_number == self._context.tracker.newest(tag)
        if only and newest is not None and newest.parent_snapshot == row.snapshot_id:
            return
        raise AlreadyExistsError(
            f"branch {tag.branch_name!r} of conversation {tag.conversation_id!r} has turns of its "
            "own already",
            hint="choose another branch_name or conversation_id",
            details={"branch_name": tag.branch_name, "conversation_id": tag.conversation_id},
        )
