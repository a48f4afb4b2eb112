"""Removing snapshots: manifests, then rows, then the segments that nothing names any more.

The one way in which anything is removed, by request or by policy.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from engram.catalog.rows import SnapshotRow, UnreferencedSegment
from engram.errors import NotFoundError
from engram.retention import Reason, Removal
from engram.service.collecting import drop_segments
from engram.service.context import ServiceContext
from engram.snapshot.listing import manifest_name
from engram.upkeep.collect import mentioned_segments

BATCH: Final = 64
"""Snapshots that a policy removes while saves wait."""
PAUSE_S: Final = 0.05
"""From one batch to the next, for the saves that have waited."""


class Remover:
    """Removes snapshots of one server."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        # What a crash has left between the steps of a removal goes with the first one.
        self._swept = False

    async def remove(self, row: SnapshotRow) -> None:
        """Remove a snapshot that somebody asked to remove, and what only it needed."""

        async def one() -> None:
            async with self._context.guard.alone():
                await self._remove([row])

        # A client that goes away must not let others in between a removal's steps.
        await asyncio.shield(self._context.start(one()))

    async def carry_out(
        self, removals: Sequence[Removal], planned_at: float
    ) -> tuple[list[Removal], int]:
        """Remove what was planned at a time (seconds since the epoch), in batches.

        What has changed since, so that it would not go any longer, stays. Returns what has gone and
        the bytes that became free.
        """
        gone: list[Removal] = []
        freed = 0
        for start in range(0, len(removals), BATCH):
            if start:
                await asyncio.sleep(PAUSE_S)
            batch = removals[start : start + BATCH]
            done, size = await asyncio.shield(self._context.start(self._batch(batch, planned_at)))
            gone += done
            freed += size
        return gone, freed

    async def _batch(
        self, removals: Sequence[Removal], planned_at: float
    ) -> tuple[list[Removal], int]:
        context = self._context
        async with context.guard.alone():
            used = context.conversations.used_since(planned_at)
            found = await context.in_catalog(self._still_due, removals, used, planned_at)
            freed = await self._remove([row for _, row in found]) if found else 0
        return [removal for removal, _ in found], freed

    def _still_due(
        self,
        removals: Sequence[Removal],
        used: Callable[[tuple[str, str]], bool],
        planned_at: float,
    ) -> list[tuple[Removal, SnapshotRow]]:
        """Those whose snapshot is as it was when the plan was made (blocks: SQLite)."""
        catalog = self._context.catalog
        found: list[tuple[Removal, SnapshotRow]] = []
        going: Counter[tuple[str, str]] = Counter()
        for removal in removals:
            snapshot = removal.snapshot
            try:
                row = catalog.get(snapshot.snapshot_id, snapshot.tenant)
            except NotFoundError:
                continue
            name = snapshot.conversation
            match removal.reason:
                case _ if row.pinned or (row.tenant, row.snapshot_id) in self._context.in_use:
                    due = False
                case Reason.EXPIRED:
                    due = row.expires_at is not None and row.expires_at <= planned_at
                case Reason.COLD:
                    due = not used(name)
                case Reason.COUNT | Reason.QUOTA:
                    due = catalog.count_snapshots(*name) > going[name] + 1
            if due:
                going[name] += 1
                found.append((removal, row))
        return found

    async def _remove(self, rows: Sequence[SnapshotRow]) -> int:
        """Remove snapshots, held alone; the bytes that became free."""
        context = self._context
        catalog = context.catalog
        keys = await context.in_catalog(
            lambda: [catalog.boundary_keys_of(row.snapshot_id, row.tenant) for row in rows]
        )
        gone: list[SnapshotRow] = []
        try:
            orphans = await context.in_store(self._take_out, rows, gone)
        finally:
            for row, own in zip(gone, keys, strict=False):
                context.deleted(row, own)
            context.quota.recount()
        if not self._swept:
            orphans = await context.in_catalog(context.catalog.unreferenced_segments)
        if orphans:
            orphans = await context.in_store(self._unmentioned, orphans, rows)
        self._swept = False
        await context.with_engine(lambda engine: drop_segments(context, engine, orphans))
        self._swept = True
        return sum(orphan.bytes for orphan in orphans)

    def _take_out(
        self, rows: Sequence[SnapshotRow], gone: list[SnapshotRow]
    ) -> list[UnreferencedSegment]:
        # The manifest first: a row without its file is healed at the next start, and what was
        # deleted must not come back.
        store, catalog = self._context.store, self._context.catalog
        with store.reserve_at_hand():
            try:
                for row in rows:
                    store.delete_manifest(row.snapshot_id, row.tenant)
                    gone.append(row)
            finally:
                orphans = catalog.remove_snapshots([(r.snapshot_id, r.tenant) for r in gone])
        return orphans

    def _unmentioned(
        self, orphans: Sequence[UnreferencedSegment], rows: Sequence[SnapshotRow]
    ) -> list[UnreferencedSegment]:
        """Those that no manifest may still need that the catalog does not have: one that is newer,
        or damaged and not of these `rows` (blocks: it reads them)."""
        store, catalog = self._context.store, self._context.catalog
        mentioned = mentioned_segments(
            store,
            [found.name for found in catalog.report.damaged if found.quarantined_to is None],
            but={manifest_name(row.snapshot_id, row.tenant) for row in rows},
        )
        return [orphan for orphan in orphans if orphan.segment_id not in mentioned]
