"""What the server does by itself in the background: it removes what the policy lets go, and files
that nothing names.

Decided by `engram.retention` over the catalog, carried out by `Remover`.  Nothing is planned while
nothing has changed and nothing has come due.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from engram.errors import EngramError
from engram.retention import Removal, RetentionPlan, RetentionPolicy, Snapshot, plan
from engram.retention.inventory import snapshots_in
from engram.service.boundaries import SnapshotName
from engram.service.collecting import collect_once
from engram.service.context import ServiceContext
from engram.service.demotion import Demoter
from engram.service.removals import Remover
from engram.snapshot.conversation import DEFAULT_PRIORITY

logger = logging.getLogger(__name__)

MAX_REMOVALS: Final = 5_000
"""Snapshots that one round removes; the next one goes on."""


@dataclass(slots=True)
class HousekeepingStats:
    """What was done in the background since start; ``last`` are the newest removals."""

    rounds: int = 0
    failed_rounds: int = 0
    plans: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    freed_bytes: int = 0
    rooms_made: int = 0
    over_quota_bytes: int = 0
    last: list[str] = field(default_factory=list)

    def note(self, removals: list[Removal], freed: int) -> None:
        """Count what has gone, and keep the newest with their reasons."""
        self.freed_bytes += freed
        for removal in removals:
            one = removal.snapshot
            self.removed[removal.reason.value] += 1
            place = f"{one.conversation_id}/{one.branch_name} turn {one.turn_number}"
            self.last.append(f"{one.snapshot_id} ({place}): {removal.text}")
        del self.last[:-20]


class Housekeeper:
    """Rounds of retention, every `--tier-cleanup-interval` seconds or when a save needs room."""

    def __init__(self, context: ServiceContext, remover: Remover, demoter: Demoter) -> None:
        self.stats = HousekeepingStats()
        self.clock = time.time
        self._context = context
        self._remover = remover
        self._demoter = demoter
        self._policy = RetentionPolicy.of(context.settings)
        self._one_at_a_time = asyncio.Lock()
        self._seen_changes = -1
        self._next_due = 0.0
        self._closing = asyncio.Event()
        context.quota.make_room = self.make_room

    def start(self) -> None:
        """Begin the rounds, unless the operator has switched them off."""
        if self._context.settings.enable_tier_background_cleanup:
            self._context.start(self._run())

    def close(self) -> None:
        """Begin no further round."""
        self._closing.set()

    async def _run(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._closing.wait(), self._context.settings.tier_cleanup_interval
                )
            if self._closing.is_set():
                return
            try:
                await self.round()
            except Exception as error:
                self.stats.failed_rounds += 1
                self._context.stats.note(f"clean-up: {error}")
                expected = isinstance(error, EngramError)
                logger.error("Engram: a clean-up failed: %s", error, exc_info=not expected)

    async def round(self) -> None:
        """Write down what was used, remove what is to go and what nothing names, let go of RAM."""
        context = self._context
        self.stats.rounds += 1
        await context.conversations.write_down()
        async with self._one_at_a_time:
            await self._retain(self.clock())
        collected = await collect_once(context, now=self.clock())
        if collected.removed:
            # What nothing named did not count; what a removal has failed to free did.
            context.quota.recount()
        await self._demoter.round(self.clock())

    async def _retain(self, now: float) -> None:
        if self._context.changes == self._seen_changes and now < self._next_due:
            return
        seen = self._context.changes
        snapshots = await self._inventory()
        found = await self._plan(snapshots, self._policy, now)
        self._context.quota.recount()
        self.stats.over_quota_bytes = found.over_quota
        await self._carry_out(found.removals[:MAX_REMOVALS], now)
        if found.removals:
            return  # seen again next time: what changed meanwhile has stayed
        self._seen_changes = seen
        self._next_due = _next_due(snapshots, self._policy)
        await self._forget_conversations(snapshots, now)

    async def make_room(self, allowed: int) -> None:
        """Remove the least valuable until the segments have at most `allowed` bytes.

        Nothing is removed if that would not do, and nothing that is in use.
        """
        async with self._one_at_a_time:
            now = self.clock()
            snapshots = _protect(await self._inventory(), self._context.in_use)
            found = await self._plan(snapshots, replace(self._policy, disk_quota=allowed), now)
            if found.over_quota:
                return
            self.stats.rooms_made += 1
            await self._carry_out(found.removals, now)

    async def _carry_out(self, removals: tuple[Removal, ...], planned_at: float) -> None:
        if not removals:
            return
        gone, freed = await self._remover.carry_out(removals, planned_at)
        self.stats.note(gone, freed)
        if gone:
            logger.info("Engram: %d snapshots removed, %d bytes freed", len(gone), freed)

    async def _inventory(self) -> list[Snapshot]:
        context = self._context
        await context.conversations.write_down()
        priorities = dict(await context.conversations.priorities())
        return await context.in_catalog(self._read, priorities)

    def _read(self, priorities: Mapping[tuple[str, str], int]) -> list[Snapshot]:
        catalog = self._context.catalog
        return snapshots_in(catalog.inventory(), used_at=catalog.last_uses(), priorities=priorities)

    async def _plan(
        self, snapshots: list[Snapshot], policy: RetentionPolicy, now: float
    ) -> RetentionPlan:
        self.stats.plans += 1
        return await self._context.in_store(plan, snapshots, policy, now)

    async def _forget_conversations(self, snapshots: list[Snapshot], now: float) -> None:
        """Drop what is known of conversations that have no snapshot and were not used for long."""
        context = self._context
        before = now - context.settings.conversation_cold_retention
        there = {snapshot.conversation for snapshot in snapshots}
        used = context.conversations.used_since(before)
        for name in await context.conversations.prioritised():
            if name not in there and not await context.in_catalog(used, name):
                await context.conversations.set_priority(*name, DEFAULT_PRIORITY)
        await context.in_catalog(context.catalog.forget_uses, before)

    def report(self) -> dict[str, Any]:
        """The counters, as an operator sees them."""
        removed = dict(self.stats.removed)
        return {**asdict(self.stats), "removed": removed, **self._demoter.report()}


def _protect(snapshots: list[Snapshot], in_use: Container[SnapshotName]) -> list[Snapshot]:
    """The same snapshots, of which those in use are pinned."""
    return [
        replace(one, pinned=True) if (one.tenant, one.snapshot_id) in in_use else one
        for one in snapshots
    ]


def _next_due(snapshots: list[Snapshot], policy: RetentionPolicy) -> float:
    """When the first snapshot expires or turns cold, if nothing changes until then."""
    due = [one.expires_at for one in snapshots if one.expires_at is not None]
    if policy.cold_retention is not None and snapshots:
        due.append(min(one.used_at for one in snapshots) + policy.cold_retention)
    return min(due, default=float("inf"))
