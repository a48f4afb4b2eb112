"""Removing segments that no snapshot names, while the server runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engram.catalog.rows import UnreferencedSegment
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo
from engram.store.base import StoredSegment
from engram.upkeep.collect import (
    GRACE_SECONDS,
    CollectionPlan,
    NamedSegments,
    as_rows,
    forget_rows,
    plan_collection,
)

REMOVED_AT_ONCE: Final = 128
"""Saves wait while so many files are removed, and come in between."""


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a round did with the part of the store that was its turn; ``bytes`` are of files.

    ``last`` says that with this part the whole store has been gone through.
    """

    listed: int
    young: int
    removed: int
    bytes: int
    rows: int
    temporary_files: int
    last: bool


async def collect_once(
    context: ServiceContext, *, grace: float = GRACE_SECONDS, now: float | None = None
) -> CollectReport:
    """Look at the next part of the store, and remove what nothing has named for ``grace`` seconds.

    Segments become durable before the manifest that names them. So a file that looks like an orphan
    is removed only while no save is under way, and only if still nothing names it then.
    Raises what the store or a rank raises; what was not removed is met again in the next round.
    """
    now = time.time() if now is None else now
    part, last = await context.in_store(context.sweep.next, context.store)
    plan = await context.in_catalog(_first_look, context, part, now, grace)
    removed = freed = 0
    for start in range(0, len(plan.remove), REMOVED_AT_ONCE):
        batch = plan.remove[start : start + REMOVED_AT_ONCE]
        # Whoever cancels this must not let a save in while files are on their way out.
        gone = await asyncio.shield(context.start(_remove(context, batch, now, grace)))
        removed += len(gone)
        freed += sum(segment.bytes for segment in gone)
    rows = await context.in_store(forget_rows, context.store, context.catalog)
    temps = await context.in_store(context.store.remove_abandoned_temps) if last else 0
    context.stats.collected_segments += removed
    context.stats.collected_bytes += freed
    context.stats.collected_temps += temps
    return CollectReport(len(part), plan.young, removed, freed, rows, temps, last)


def _first_look(
    context: ServiceContext, part: Sequence[StoredSegment], now: float, grace: float
) -> CollectionPlan:
    """What the catalog alone does not name: cheap, so that saves are held up for real orphans."""
    catalog = context.catalog
    referenced = {
        (segment.shard, segment.segment_id)
        for segment in part
        if now - segment.written_at >= grace
        and catalog.is_referenced(segment.shard, segment.segment_id)
    }
    return plan_collection(part, referenced, now, grace)


async def _remove(
    context: ServiceContext, batch: Sequence[StoredSegment], now: float, grace: float
) -> Sequence[StoredSegment]:
    async with context.guard.alone():
        gone = await context.in_store(_second_look, context, batch, now, grace)
        if gone:
            await context.with_engine(lambda engine: drop_segments(context, engine, as_rows(gone)))
        return gone


def _second_look(
    context: ServiceContext, batch: Sequence[StoredSegment], now: float, grace: float
) -> Sequence[StoredSegment]:
    named = NamedSegments(context.store, context.catalog)
    return plan_collection(batch, named, now, grace).remove


async def drop_segments(
    context: ServiceContext, engine: EngineInfo, orphans: Sequence[UnreferencedSegment]
) -> None:
    """Remove the files of segments that no snapshot names, and their rows; no save may be under
    way.

    Files of this engine's namespace go through the ranks, which may hold them in RAM.
    """
    by_rank: list[list[str]] = [[] for _ in range(engine.world_size)]
    ours = engine.namespace.id, engine.world_size
    for orphan in orphans:
        if (orphan.shard.namespace, orphan.shard.world_size) == ours:
            by_rank[orphan.shard.rank].append(orphan.segment_id)
        else:
            await context.in_store(context.store.delete_segment, orphan.shard, orphan.segment_id)
    if any(by_rank):
        await context.ranks.drop(engine.namespace.id, by_rank)
    await context.in_catalog(context.catalog.forget_segments, orphans)
