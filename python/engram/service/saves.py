"""Making a turn durable: segments, then manifest, then catalog, in that order and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import FinishedRequest, Turn
from engram.core.ids import new_snapshot_id
from engram.errors import (
    AlreadyExistsError,
    EngramError,
    NotFoundError,
    SaveQueueFullError,
)
from engram.service.boundaries import SnapshotName
from engram.service.context import ServiceContext
from engram.service.finder import Found
from engram.service.manifests import Manifests
from engram.service.ports import EngineInfo
from engram.service.queue import Ticket
from engram.service.results import SaveResult
from engram.service.states import RequestStates
from engram.snapshot.manifest import Durability

logger = logging.getLogger(__name__)

_Place = tuple[tuple[str, str, str], int]
"""A branch and the number of a turn on it."""


@dataclass(eq=False, slots=True)
class _Saving:
    """The saves of one turn that are under way: they make one snapshot, of this id."""

    snapshot_id: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    deleted: bool = False
    """Its branch has been deleted: nothing of it may be stored any more."""


class TurnSaver:
    """Carries out saves; those of one turn go one after another, so it is saved once."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._states = RequestStates(context)
        self.manifests = Manifests(context)
        self._turns: dict[_Place, _Saving] = {}

    async def save(
        self, found: Found, snapshot_id: str | None, durability: Durability
    ) -> SaveResult:
        """Make a turn durable when its turn has come, or return the snapshot that it is already.

        `SaveQueueFullError` if too many saves wait already.
        """
        begun = time.monotonic()
        with self._counted():
            await self.check_free(found, snapshot_id)
            row = await self._context.row(found.tag, found.number)
            if row is not None:
                async with self._context.guard.shared():
                    await self._context.in_store(self.manifests.check_whole, row)
                return _result(row, begun, existing=True)
            with self._place(found, snapshot_id) as saving:
                if found.turn is None:
                    return await self._alone(found, saving, durability, begun)
                with self._ask() as ticket:
                    await self.admitted(ticket, found.turn)
                    return await self._alone(found, saving, durability, begun)

    async def save_now(self, found: Found, durability: Durability) -> SaveResult:
        """`save` for who has a place in the queue, and has been admitted."""
        with self._counted(), self._place(found, None) as saving:
            return await self._alone(found, saving, durability, time.monotonic())

    async def admitted(self, ticket: Ticket, turn: Turn) -> None:
        """Wait for the turn of a save; the state is not the first to leave RAM meanwhile."""
        if not ticket.ready:
            # What is gone by then is computed again.
            with contextlib.suppress(EngramError):
                await self._states.locate(turn.request)
        await ticket.admitted()

    async def save_later(self, found: Found, snapshot_id: str | None) -> SaveResult:
        """Start a save and return what it will be; its failure is logged and counted.

        `SaveQueueFullError` if too many saves wait already.
        """
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            # Whichever save of the turn comes first, an automatic one perhaps, makes this snapshot.
            saving = stack.enter_context(self._place(found, snapshot_id))
            ticket = None
            if found.turn is not None:
                ticket = stack.enter_context(self._ask())
                request = found.turn.request
                boundary = await self._states.locate(request)
                pending = len(request.tokens) - boundary
            else:
                row = found.stored
                boundary, pending = row.token_count, row.pending_count
            held = stack.pop_all()
        self._context.start(self._save_in_background(found, saving, ticket, held))
        return SaveResult(
            snapshot_id=saving.snapshot_id,
            conversation_id=found.tag.conversation_id,
            branch_name=found.tag.branch_name,
            turn_number=found.number,
            token_count=boundary,
            recompute_tokens=pending,
            bytes=None,
            unique_bytes=None,
            durability="async",
            elapsed_ms=(time.monotonic() - begun) * 1000,
        )

    async def _save_in_background(
        self, found: Found, saving: _Saving, ticket: Ticket | None, held: contextlib.ExitStack
    ) -> None:
        try:
            with held, self._counted():
                if ticket is not None:
                    await ticket.admitted()
                await self._alone(found, saving, "async", time.monotonic())
        except Exception as error:
            self._context.stats.note(f"asynchronous save {saving.snapshot_id}: {error}")
            logger.error("Engram: snapshot %s was not saved: %s", saving.snapshot_id, error)

    @contextlib.contextmanager
    def _place(self, found: Found, snapshot_id: str | None) -> Iterator[_Saving]:
        place = (found.tag.branch, found.number)
        saving = self._turns.get(place)
        if saving is None:
            saving = self._turns[place] = _Saving(snapshot_id or new_snapshot_id())
        saving.users += 1
        try:
            yield saving
        finally:
            saving.users -= 1
            if not saving.users and self._turns.get(place) is saving:
                del self._turns[place]

    def forget(self, tenant: str, conversation_id: str, branch_name: str | None = None) -> None:
        """See to it that no save under way stores a turn of a conversation, or of one of its
        branches, that is being deleted.  One that commits just now is over when the guard can be
        had alone."""
        gone = (tenant, conversation_id, branch_name)[: 2 if branch_name is None else 3]
        for place in [one for one in self._turns if one[0][: len(gone)] == gone]:
            self._turns.pop(place).deleted = True

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._context.stats.save_failures += 1
            raise

    def _ask(self) -> Ticket:
        try:
            return self._context.saves.ask()
        except SaveQueueFullError:
            self._context.stats.refused_saves += 1
            raise

    async def check_free(self, found: Found, snapshot_id: str | None) -> None:
        """Raise `AlreadyExistsError` if the id names the snapshot of another turn."""
        if snapshot_id is None:
            return
        try:
            row = await self._context.in_catalog(
                self._context.catalog.get, snapshot_id, found.tag.tenant
            )
        except NotFoundError:
            return
        place = (row.tenant, row.conversation_id, row.branch_name)
        if place == found.tag.branch and row.turn_number == found.number:
            return
        raise AlreadyExistsError(
            f"snapshot {snapshot_id!r} exists already: turn {row.turn_number} of conversation "
            f"{row.conversation_id!r}, branch {row.branch_name!r}",
            hint="choose another snapshot_id, or leave it out",
            details={"snapshot_id": snapshot_id},
        )

    async def _alone(
        self, found: Found, saving: _Saving, durability: Durability, begun: float
    ) -> SaveResult:
        """The save itself; those of the same turn wait for it and find what it made."""
        async with saving.lock:
            return await self._once(found, saving, durability, begun)

    async def _once(
        self, found: Found, saving: _Saving, durability: Durability, begun: float
    ) -> SaveResult:
        context, snapshot_id = self._context, saving.snapshot_id
        _check_wanted(found, saving)
        await self.check_free(found, snapshot_id)
        row = await context.row(found.tag, found.number)
        if row is not None:
            async with context.guard.shared():
                await context.in_store(self.manifests.check_whole, row)
            return _result(row, begun, existing=True)
        # So that `reached` below meets a branch that is known.
        await context.learn(found.tag)
        recomputed = False
        request = None if found.turn is None else found.turn.request
        async with self._standing(found), self.room(request) as again:
            if found.turn is not None:
                request = found.turn.request
                engine, stored, recomputed = await context.with_engine(
                    lambda engine: self._states.persist(engine, request)
                )
                manifest = await self.manifests.of_turn(
                    found, engine, snapshot_id, durability, stored
                )
            else:
                manifest = await context.in_store(
                    self.manifests.of_branch, found, snapshot_id, durability
                )
            _check_wanted(found, saving)
            await context.in_store(self.manifests.commit, manifest)
            context.stored(manifest)
        context.stats.saves += 1
        recomputed = recomputed or again
        context.stats.recomputed_saves += recomputed
        context.tracker.reached(found.tag, found.number)
        if found.turn is not None and found.turn.tag.branch == found.tag.branch:
            context.tracker.saved(found.turn, manifest.snapshot_id)
        row = await context.in_catalog(context.catalog.get, manifest.snapshot_id, manifest.tenant)
        return _result(row, begun, recomputed=recomputed)

    @contextlib.asynccontextmanager
    async def room(
        self, request: FinishedRequest | None, boundary: int | None = None
    ) -> AsyncIterator[bool]:
        """Within, nothing is removed and there is room on the disk for a request's state; whether
        it had to be computed again to know how much.

        `boundary` is where the state stands, the end of the request unless given.  Without a
        request nothing is written but a manifest.
        """
        guard, quota = self._context.guard, self._context.quota
        if request is None or quota.limit is None:
            async with guard.shared():
                yield False
            return
        reserved, recomputed = 0, False
        async with contextlib.AsyncExitStack() as stack:
            while True:
                async with guard.shared():
                    # Whatever was removed until now may have shared rows with it.
                    needed, again = await self._states.needed(request, boundary)
                    recomputed = recomputed or again
                    if needed <= reserved:
                        yield recomputed
                        return
                # Making room is a removal, for which the guard must be free.
                await stack.enter_async_context(quota.reserved(needed - reserved))
                reserved = needed

    @contextlib.asynccontextmanager
    async def _standing(self, found: Found) -> AsyncIterator[None]:
        """Keep the snapshots that a save stands on from being removed by policy within."""
        with self._context.in_use.held(await self._below(found)):
            yield

    async def _below(self, found: Found) -> list[SnapshotName]:
        """The snapshots that a save stands on, as far as they are known."""
        context, tenant = self._context, found.tag.tenant
        if found.turn is None:
            row = found.stored
            return [(row.tenant, row.snapshot_id)]
        names: list[SnapshotName] = []
        if found.turn.tag.parent_snapshot is not None:
            names.append((tenant, found.turn.tag.parent_snapshot))
        newest = await context.row(found.tag, None)
        if newest is not None:
            names.append((tenant, newest.snapshot_id))
        request = found.turn.request
        beginning = await context.with_engine(lambda engine: self._beginning(engine, request))
        return names if beginning is None else [*names, beginning]

    async def _beginning(self, engine: EngineInfo, request: FinishedRequest) -> SnapshotName | None:
        """The newest snapshot that ends where the longest stored beginning of a request does."""
        context = self._context
        keys = await context.in_store(
            context.ranks.page_keys,
            request.tokens[:-1],
            engine.page_size,
            request.extra_key,
            request.cache_salt,
        )
        stored = context.boundaries.longest(keys, engine.page_size)
        if stored is None:
            return None
        return await context.in_catalog(context.catalog.newest_at, engine.namespace.id, stored.key)


def _check_wanted(found: Found, saving: _Saving) -> None:
    if saving.deleted:
        tag = found.tag
        raise NotFoundError(
            f"conversation {tag.conversation_id!r}, branch {tag.branch_name!r} was deleted while "
            f"its turn {found.number} was being saved",
            details={"conversation_id": tag.conversation_id},
        )


def _result(
    row: SnapshotRow, begun: float, *, existing: bool = False, recomputed: bool = False
) -> SaveResult:
    return SaveResult(
        snapshot_id=row.snapshot_id,
        conversation_id=row.conversation_id,
        branch_name=row.branch_name,
        turn_number=row.turn_number,
        token_count=row.token_count,
        recompute_tokens=row.pending_count,
        bytes=row.bytes,
        unique_bytes=row.unique_bytes,
        durability="sync",
        elapsed_ms=(time.monotonic() - begun) * 1000,
        existing=existing,
        recomputed=recomputed,
    )
