"""What happens to a request on its way through the HTTP process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Final, TypeVar

from engram.conversation.turns import RunningRequest, Tag
from engram.core.waiting import within
from engram.errors import DeadlineError, NotFoundError, SnapshotCorruptError
from engram.service.automatic import AutomaticSaver
from engram.service.boundaries import StoredBoundary
from engram.service.context import ServiceContext
from engram.service.explaining import ServedRequests
from engram.service.ports import EngineInfo
from engram.service.results import TierChange
from engram.snapshot.manifest import SegmentRef

logger = logging.getLogger(__name__)

HOLD_LEASE_S: Final = 60.0
"""How long a promoted prefix waits in RAM for the request it was promoted for."""


T = TypeVar("T")


class RequestGate:
    """Holds a request until its stored prefix is in RAM, and counts its turn when it is done.

    The scheduler must never wait for a disk, so the request waits here, tagged or not, for at most
    `--snapshot-promote-timeout`; then it is recomputed.
    """

    def __init__(self, context: ServiceContext, automatic: AutomaticSaver) -> None:
        self._context = context
        self._automatic = automatic
        self.served = ServedRequests()
        self.holding = 0

    async def admit(self, request: RunningRequest) -> None:
        """Called before a request goes to the scheduler.

        Whatever goes wrong here costs the hit, never the request.
        """
        context = self._context
        context.tracker.begin(request)
        self.served.begin(request)
        if request.tag is not None:
            context.conversations.used(request.tag.tenant, request.tag.conversation_id)
            if request.tag.priority is not None:
                context.start(self._prioritise(request.tag, request.tag.priority))
        if not context.settings.snapshot_auto_restore or self._nothing_to_do(request):
            return
        timeout = context.settings.snapshot_promote_timeout
        try:
            await self.in_time(self._prepare(request, timeout), request.waited)
        except asyncio.CancelledError:
            context.ranks.abandon(request.rid)
            raise
        except Exception as error:
            if isinstance(error, DeadlineError):
                context.stats.hold_timeouts += 1
                # What has not begun to be read must not keep others waiting.
                context.ranks.abandon(request.rid)
            else:
                context.stats.hold_failures += 1
            context.stats.note(f"prefix of {request.rid}: {error}")
            self.served.failed(request.rid, str(error))
            logger.warning(
                "Engram: the stored prefix of %s cannot be used, it is recomputed: %s",
                request.rid,
                error,
            )

    async def in_time(self, work: Awaitable[T], waited: float = 0.0) -> T:
        """Hold a request until something it could use of the store is there.

        `DeadlineError` when it has waited for `--snapshot-promote-timeout` in all; `waited` seconds
        of that are over.
        """
        timeout = self._context.settings.snapshot_promote_timeout
        self.holding += 1
        try:
            return await within(max(timeout - waited, 0.0), work)
        except asyncio.TimeoutError:
            raise DeadlineError(f"it is not there after {timeout:g} s") from None
        finally:
            self.holding -= 1

    async def _prioritise(self, tag: Tag, priority: int) -> None:
        """Keep what a request says of its conversation; if that fails, the request goes on."""
        try:
            await self._context.conversations.set_priority(
                tag.tenant, tag.conversation_id, priority
            )
        except Exception as error:
            self._context.stats.note(f"priority of {tag.conversation_id}: {error}")
            logger.error("Engram: the priority of %s is lost: %s", tag.conversation_id, error)

    def _nothing_to_do(self, request: RunningRequest) -> bool:
        context = self._context
        known = request.tag is None or context.tracker.knows_branch(request.tag)
        return context.described and known and not len(context.boundaries)

    async def _prepare(self, request: RunningRequest, timeout: float) -> None:
        if request.tag is not None:
            await self._context.learn(request.tag)
        await self._promote_prefix(request, timeout)

    def finished(self, rid: str, output: Sequence[int]) -> None:
        """Called when a reply is complete, before the client sees its end.

        Whatever goes wrong here costs the turn, never the server: this is called inside the
        engine's receive loop, which ends the process when it fails.
        """
        try:
            turn = self._context.tracker.finish(rid, output)
            if turn is not None:
                self._context.on_turn(turn)
                return
            unnumbered = self._context.tracker.unnumbered(rid)
            if unnumbered is not None:
                self._context.start(self._number(rid, unnumbered))
        except Exception as error:
            self._context.stats.lost_turns += 1
            self._context.stats.note(f"the turn that {rid} was: {error}")
            logger.exception("Engram: %s was not counted as a turn; it cannot be saved", rid)

    async def _number(self, rid: str, tag: Tag) -> None:
        """Find out the number of a turn that has finished before the catalog could tell it."""
        try:
            await self._context.learn(tag)
        except Exception as error:
            self._context.stats.note(f"the number of the turn that {rid} was: {error}")
            logger.error("Engram: the number of the turn that %s was is unknown: %s", rid, error)

    async def tool_called(self, rid: str) -> None:
        """Called when a reply turns out to contain tool calls, before the client sees its end.

        Whatever goes wrong here costs the save, never the reply.
        """
        context = self._context
        try:
            unnumbered = context.tracker.unnumbered(rid)
            if unnumbered is not None:
                await context.learn(unnumbered)
            turn = context.tracker.turn_of(rid)
            if turn is None:
                return
            self._automatic.finished(turn, tool_calls=True)
            if context.settings.snapshot_durability == "sync":
                await self._automatic.settled(turn)
        except Exception as error:
            context.stats.note(f"tool calls of {rid}: {error}")
            logger.exception("Engram: the turn that %s was is not saved for its tool calls", rid)

    async def settled(self, rid: str) -> None:
        """Return when the automatic save of a finished request, if any, is over."""
        turn = self._context.tracker.turn_of(rid)
        if turn is not None:
            await self._automatic.settled(turn)

    def abandoned(self, rid: str) -> None:
        """Called when the engine ended a request without a reply."""
        self._context.tracker.abandon(rid)

    def left(self, request: RunningRequest) -> None:
        """Called when nobody waits for a request any longer, finished or not."""
        self._context.tracker.left(request)

    async def _promote_prefix(self, request: RunningRequest, timeout: float) -> None:
        await self._context.with_engine(lambda engine: self._promote(engine, request, timeout))

    async def _promote(self, engine: EngineInfo, request: RunningRequest, timeout: float) -> None:
        context = self._context
        boundaries = context.boundaries
        if boundaries.namespace != engine.namespace.id or not len(boundaries):
            return
        # At least one token is always computed: a boundary at the very end is of no use.
        keys = context.ranks.page_keys(
            request.prompt[:-1], engine.page_size, request.extra_key, request.cache_salt
        )
        stored = boundaries.longest(keys, engine.page_size)
        context.stats.held_requests += stored is not None
        damage: SnapshotCorruptError | None = None
        while stored is not None:
            chains: list[list[SegmentRef]] = []
            try:
                chains = await self._chains(engine, stored)
                brought = await context.ranks.promote(
                    engine.namespace.id,
                    chains,
                    owner=request.rid,
                    seconds=HOLD_LEASE_S,
                    exact=False,
                    timeout=timeout,
                )
            except SnapshotCorruptError as error:
                if not await self._still(engine, stored, chains):
                    continue  # removed while it was read: no damage
                # Where it is damaged, an earlier state of the conversation may be whole.
                damage = error
                boundaries.forget(stored.key)
                stored = boundaries.longest(keys, engine.page_size)
            except NotFoundError:
                # Removed meanwhile, or no boundary on every rank: an earlier one will do.
                boundaries.forget(stored.key)
                stored = boundaries.longest(keys, engine.page_size)
            else:
                self.served.fetched(request.rid, stored.end, brought.source_tier)
                if brought.source_tier == "disk":
                    whose = None if request.tag is None else request.tag.conversation_id
                    context.on_tier_change(
                        TierChange(whose, "disk", "ram", "request", bytes=brought.bytes)
                    )
                break
        if damage is not None:
            raise damage

    async def _chains(self, engine: EngineInfo, stored: StoredBoundary) -> list[list[SegmentRef]]:
        catalog = self._context.catalog
        return await self._context.in_catalog(
            catalog.chains, engine.namespace.id, engine.world_size, stored.key
        )

    async def _still(
        self, engine: EngineInfo, stored: StoredBoundary, chains: list[list[SegmentRef]]
    ) -> bool:
        """Whether these chains are the ones to read for a boundary, as they were before."""
        try:
            return await self._chains(engine, stored) == chains
        except NotFoundError:
            return False
