"""Which conversations leave RAM, found out from the ranks and the catalog, and carried out.

What a rank holds is known by segments; whose they are, by the snapshots that name them.  So this is
about what is saved: what is on no disk yet leaves RAM only for want of room (`engram.tiers.ram`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engram.catalog.rows import SnapshotRow
from engram.retention.demotion import DemotionPlan, DemotionPolicy, Resident, plan_demotions
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo, ResidentSegment
from engram.service.results import TierChange
from engram.snapshot.conversation import DEFAULT_PRIORITY

Conversation = tuple[str, str]
Place = tuple[int, str]
"""A rank and a segment's id."""


@dataclass(slots=True)
class DemotionStats:
    """What left RAM by the clocks and limits, or by request, since start."""

    demoted: dict[str, int] = field(default_factory=dict)
    demoted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Warm:
    """What is in RAM of saved conversations: whose each segment is, and how it stands there."""

    owners: dict[Place, frozenset[Conversation]]
    segments: dict[Place, ResidentSegment]

    @property
    def conversations(self) -> set[Conversation]:
        """Those with bytes in RAM."""
        return set().union(*self.owners.values())


class Demoter:
    """Moves conversations out of the ranks' RAM."""

    def __init__(self, context: ServiceContext) -> None:
        self.stats = DemotionStats()
        self._context = context
        self._policy = DemotionPolicy.of(context.settings)

    async def round(self, now: float) -> None:
        """Let those go that are idle for too long, or too many (`now`: seconds since the epoch)."""
        if self._context.settings.enable_memory_tiers:
            await self._context.with_engine(lambda engine: self._round(engine, now))

    async def _round(self, engine: EngineInfo, now: float) -> None:
        context = self._context
        warm = await self.warm(engine)
        uses = await context.in_catalog(context.catalog.last_uses)
        made = await context.in_catalog(self._made, warm.conversations)
        last = {name: max(made[name], uses.get(name, 0.0)) for name in made}
        priorities = await context.conversations.priorities()
        found = plan_demotions(_residents(warm, last, dict(priorities)), self._policy, now)
        leaving = {(d.resident.tenant, d.resident.conversation_id) for d in found.demotions}
        places = [place for place, owners in warm.owners.items() if owners <= leaving]
        if places:
            self._note(found, await self._demote(engine, places))

    def _note(self, found: DemotionPlan, freed: int) -> None:
        for demotion in found.demotions:
            reason = demotion.reason.value
            self.stats.demoted[reason] = self.stats.demoted.get(reason, 0) + 1
            self._context.on_tier_change(
                TierChange(demotion.resident.conversation_id, "ram", "disk", reason)
            )
        self.stats.demoted_bytes += freed

    def _made(self, names: Iterable[Conversation]) -> dict[Conversation, float]:
        newest = self._context.catalog.newest_snapshot
        return {name: newest(*name) for name in names}

    async def demote(self, rows: Sequence[SnapshotRow]) -> int:
        """Let the bytes of snapshots leave RAM now, but for what is in use; how many left."""
        return await self._context.with_engine(lambda engine: self._demote_rows(engine, rows))

    async def _demote_rows(self, engine: EngineInfo, rows: Sequence[SnapshotRow]) -> int:
        context = self._context
        places: set[Place] = set()
        for row in rows:
            if row.namespace != engine.namespace.id:
                continue
            if (row.tenant, row.snapshot_id) not in context.in_use:
                # Else it would end a restore that waits for its turn.
                context.ranks.abandon(restore_owner(row))
            manifest = await context.in_store(
                context.store.get_manifest, row.snapshot_id, row.tenant
            )
            for rank, chain in enumerate(manifest.segments):
                places |= {(rank, ref.segment_id) for ref in chain}
        freed = await self._demote(engine, places)
        self.stats.demoted["request"] = self.stats.demoted.get("request", 0) + 1
        self.stats.demoted_bytes += freed
        for name in sorted({row.conversation_id for row in rows}):
            context.on_tier_change(TierChange(name, "ram", "disk", "request"))
        return freed

    async def _demote(self, engine: EngineInfo, places: Iterable[Place]) -> int:
        by_rank: list[list[str]] = [[] for _ in range(engine.world_size)]
        for rank, segment_id in places:
            by_rank[rank].append(segment_id)
        return await self._context.ranks.demote(engine.namespace.id, by_rank)

    async def warm(self, engine: EngineInfo) -> Warm:
        """What of saved conversations is in RAM now."""
        context = self._context
        answers = await context.ranks.residents(engine.namespace.id)
        segments: dict[Place, ResidentSegment] = {}
        for rank, found in enumerate(answers):
            for one in found:
                # Of one file a rank may hold several beginnings, each its own conversations'.
                place = (rank, one.segment_id)
                other = segments.get(place, ResidentSegment(one.segment_id, 0, held=False))
                size, held = other.bytes + one.bytes, other.held or one.held
                segments[place] = ResidentSegment(one.segment_id, size, held)
        owners = await context.in_catalog(
            context.catalog.owners_of, engine.namespace.id, list(segments)
        )
        return Warm(owners, {place: segments[place] for place in owners})

    def report(self) -> dict[str, Any]:
        """The counters, as an operator sees them."""
        return {"demoted": dict(self.stats.demoted), "demoted_bytes": self.stats.demoted_bytes}


def restore_owner(row: SnapshotRow) -> str:
    """Who holds the lease of a snapshot that was restored."""
    return f"snapshot:{row.tenant}/{row.snapshot_id}"


def _residents(
    warm: Warm, last: dict[Conversation, float], priorities: dict[Conversation, int]
) -> list[Resident]:
    alone: defaultdict[Conversation, int] = defaultdict(int)
    held: set[Conversation] = set()
    for place, owners in warm.owners.items():
        segment = warm.segments[place]
        if len(owners) == 1:
            alone[next(iter(owners))] += segment.bytes
        if segment.held:
            held |= owners
    return [
        Resident(
            conversation_id=name[1],
            used_at=used_at,
            bytes=alone[name],
            tenant=name[0],
            priority=priorities.get(name, DEFAULT_PRIORITY),
            held=name in held,
        )
        for name, used_at in last.items()
    ]
