"""`SnapshotService`: everything a route, the request gate or a command can ask of snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from engram.catalog.catalog import Catalog
from engram.catalog.rows import BranchRow, ConversationRow, SnapshotPage, SnapshotRow
from engram.conversation.turns import Tag, Turn
from engram.core.ids import DEFAULT_BRANCH
from engram.core.settings import Settings
from engram.core.tokens import TokenArray
from engram.errors import AlreadyExistsError, NotFoundError
from engram.service.automatic import AutomaticSaver
from engram.service.changes import SnapshotChanger
from engram.service.context import ServiceContext
from engram.service.demotion import Demoter
from engram.service.explaining import Explainer
from engram.service.finder import Found, TurnFinder, check_not_reserved, need_place
from engram.service.housekeeping import Housekeeper
from engram.service.linking import PrefixLinks
from engram.service.pins import PinResult, VramPinner
from engram.service.ports import EngineInfo, Generator, Ranks
from engram.service.prefixes import PrefixKeeper
from engram.service.recorded import Recorded
from engram.service.removals import Remover
from engram.service.requests import RequestGate
from engram.service.restores import Continuation, Restorer
from engram.service.results import RestoreResult, SaveResult
from engram.service.saves import TurnSaver
from engram.service.transfer import Transfer
from engram.snapshot.conversation import DEFAULT_PRIORITY
from engram.snapshot.manifest import Durability
from engram.store.base import Store

VRAM_SUMS: Final = (
    "capacity_bytes",
    "bytes",
    "tokens",
    "states",
    "pinned_bytes",
    "pin_budget_bytes",
)
RAM_SUMS: Final = {
    "capacity_bytes": "ram_capacity",
    "bytes": "ram_bytes",
    "held_bytes": "ram_held_bytes",
    "segments": "ram_segments",
    "captured": "captured",
    "promoted_bytes": "promoted_bytes",
    "persisted_bytes": "persisted_bytes",
    "evicted": "evicted",
    "demoted": "demoted",
}
"""What the RAM tiers of all ranks add up to -> its name in their counters."""


class SnapshotService:
    """The snapshot subsystem of one server.  Used on one event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        catalog: Catalog,
        ranks: Ranks,
        generator: Generator,
    ) -> None:
        self.context = ServiceContext(settings, store, catalog, ranks, generator)
        self._saver = TurnSaver(self.context)
        self._automatic = AutomaticSaver(self.context, self._saver)
        self._finder = TurnFinder(self.context)
        self._restorer = Restorer(self.context)
        self.recorded = Recorded(self.context, self._restorer)
        self.links = PrefixLinks(self.context, self.recorded)
        self._remover = Remover(self.context)
        self._changer = SnapshotChanger(self.context)
        self.prefixes = PrefixKeeper(
            self.context, self._saver, self._restorer, self._remover, self._changer
        )
        self.transfer = Transfer(self.context)
        self._demoter = Demoter(self.context)
        self._pinner = VramPinner(self.context, self._restorer)
        self.housekeeper = Housekeeper(self.context, self._remover, self._demoter)
        self.gate = RequestGate(self.context, self._automatic)
        self.explainer = Explainer(self.context, self._restorer, self.gate.served)
        self.context.on_turn = self._turn_finished

    def _turn_finished(self, turn: Turn) -> None:
        self._automatic.finished(turn)
        self._pinner.follow(turn)

    def start(self) -> None:
        """Begin what is done in the background; on the event loop."""
        self.housekeeper.start()

    async def close(self) -> None:
        """Save what is due, wait for what is under way."""
        self._automatic.close()
        self.housekeeper.close()
        await self.context.drain()
        await self.context.conversations.write_down()

    async def save(
        self,
        *,
        tenant: str,
        conversation_id: str | None = None,
        rid: str | None = None,
        snapshot_id: str | None = None,
        turn_number: int | None = None,
        branch_name: str | None = None,
        durability: Durability = "sync",
    ) -> SaveResult:
        """Save a turn; saving one that is saved returns the snapshot that exists.

        With "sync" the snapshot is durable when this returns; with "async" it is on its way.
        """
        need_place(conversation_id, rid)
        if rid is not None:
            found = await self._finder.by_rid(tenant, rid, conversation_id, branch_name)
        else:
            assert conversation_id is not None
            found = await self._finder.by_place(tenant, conversation_id, branch_name, turn_number)
        if not found.saved:
            check_not_reserved("conversation_id", found.tag.conversation_id)
        await self._saver.check_free(found, snapshot_id)
        if durability == "async" and not found.saved:
            return await self._saver.save_later(found, snapshot_id)
        # A client that goes away must not tear a save in the middle.
        work = self._saver.save(found, snapshot_id, durability)
        return await asyncio.shield(self.context.start(work))

    async def restore(
        self, row: SnapshotRow, continuation: Continuation | None = None
    ) -> RestoreResult:
        """Bring a snapshot into memory, and generate from it if asked to."""
        if continuation is not None:
            # The generation is the next turn of the snapshot's conversation.
            check_not_reserved("create_new_request", row.conversation_id)
        return await self._restorer.restore(row, continuation)

    async def find(
        self,
        *,
        tenant: str,
        conversation_id: str | None = None,
        rid: str | None = None,
        turn_number: int | None = None,
        branch_name: str | None = None,
    ) -> SnapshotRow:
        """The snapshot of a turn, or of a branch's newest saved one.  `NotFoundError` otherwise."""
        need_place(conversation_id, rid)
        if rid is not None:
            return await self._find_by_rid(tenant, rid, conversation_id)
        assert conversation_id is not None
        tag = Tag(conversation_id, branch_name or DEFAULT_BRANCH, tenant)
        try:
            return await self.context.in_catalog(
                self.context.catalog.find,
                tenant,
                conversation_id,
                tag.branch_name,
                turn_number,
            )
        except NotFoundError as error:
            if self.context.tracker.find(tag, turn_number) is not None:
                error.hint = "that turn is not saved yet: POST /save_snapshot first"
            raise

    async def _find_by_rid(self, tenant: str, rid: str, conversation_id: str | None) -> SnapshotRow:
        row = await self.context.in_catalog(self.context.catalog.find_rid, rid, tenant)
        if row is None:
            raise NotFoundError(
                f"no snapshot of a request {rid!r}", hint="save it first", details={"rid": rid}
            )
        if conversation_id not in (None, row.conversation_id):
            raise NotFoundError(
                f"request {rid!r} is a turn of conversation {row.conversation_id!r}, "
                f"not of {conversation_id!r}",
                hint="leave one of the two out",
                details={"rid": rid},
            )
        return row

    async def list(self, tenant: str, conversation_id: str) -> list[SnapshotRow]:
        """All snapshots of a conversation, oldest first.  `NotFoundError` if there is none."""
        rows: list[SnapshotRow] = []
        after = None
        while True:
            page = await self.context.in_catalog(
                self.context.catalog.list_snapshots,
                tenant,
                conversation_id,
                limit=1000,
                after=after,
            )
            rows.extend(page.snapshots)
            after = page.after
            if after is None:
                break
        if not rows:
            raise NotFoundError(
                f"no snapshots of a conversation {conversation_id!r}",
                details={"conversation_id": conversation_id},
            )
        return rows

    async def tokens(self, row: SnapshotRow) -> TokenArray:
        """All recorded tokens of a snapshot, pending ones included."""
        return await self._restorer.tokens(row)

    async def tier(self, row: SnapshotRow) -> str:
        """The fastest tier that holds the snapshot now, as the ranks see it."""
        tokens = (await self.tokens(row))[: row.token_count]

        async def ask(engine: EngineInfo) -> str:
            if row.namespace != engine.namespace.id:
                return "disk"
            ranks = self.context.ranks
            return await ranks.tier(engine.namespace.id, row.boundary_key, tokens)

        return await self.context.with_engine(ask)

    async def page(
        self,
        tenant: str,
        conversation_id: str | None,
        branch_name: str | None,
        limit: int,
        after: str | None,
    ) -> SnapshotPage:
        """Some of a tenant's snapshots, of a conversation or branch if given, oldest first."""
        return await self.context.in_catalog(
            self.context.catalog.list_snapshots,
            tenant,
            conversation_id,
            branch_name,
            limit=limit,
            after=after,
        )

    async def conversations(
        self, tenant: str, limit: int, after: str | None
    ) -> Sequence[ConversationRow]:
        """Saved conversations by id, those past the id `after`."""
        catalog = self.context.catalog
        return await self.context.in_catalog(
            catalog.conversations, tenant, limit=limit, after=after
        )

    async def conversation(
        self, tenant: str, conversation_id: str
    ) -> tuple[ConversationRow | None, Sequence[BranchRow]]:
        """A conversation and its saved branches; no row if nothing of it is saved yet.

        `NotFoundError` for one of which neither a snapshot nor a turn is known.
        """
        context = self.context
        row = await context.in_catalog(context.catalog.conversation, tenant, conversation_id)
        if row is None and not context.tracker.knows_conversation(tenant, conversation_id):
            raise NotFoundError(
                f"no conversation {conversation_id!r}", details={"conversation_id": conversation_id}
            )
        if row is None:
            return None, []
        branches = await context.in_catalog(context.catalog.branches, tenant, conversation_id)
        return row, branches

    async def delete_conversation(self, tenant: str, conversation_id: str) -> int:
        """Remove all of a conversation, saved or not; the number of snapshots that went."""
        await self.conversation(tenant, conversation_id)
        context = self.context
        for branch in context.tracker.branches_of(tenant, conversation_id):
            await self._pinner.unpin(Tag(conversation_id, branch, tenant))
        removed = await self._delete(tenant, conversation_id, None)
        await context.conversations.set_priority(tenant, conversation_id, DEFAULT_PRIORITY)
        return removed

    async def delete_branch(self, tag: Tag) -> int:
        """Remove all of a branch, saved or not; the number of snapshots that went."""
        await self._pinner.unpin(tag)
        return await self._delete(tag.tenant, tag.conversation_id, tag.branch_name)

    async def _delete(self, tenant: str, conversation_id: str, branch_name: str | None) -> int:
        """Remove what is saved, what is remembered, and what is on its way from there to there."""
        context, gone = self.context, (tenant, conversation_id, branch_name)
        removed = 0
        while True:
            if branch_name is None:
                context.tracker.forget_conversation(tenant, conversation_id)
            else:
                context.tracker.forget_branch(Tag(conversation_id, branch_name, tenant))
            self._automatic.forget(*gone)
            self._saver.forget(*gone)
            async with context.guard.alone():
                pass  # a save that was past its last look is committed now
            page = await self.page(*gone, 500, None)
            if not page.snapshots:
                return removed
            for row in page.snapshots:
                await self._remover.remove(row)
                removed += 1

    async def branch(
        self,
        row: SnapshotRow,
        conversation_id: str | None,
        branch_name: str | None,
        snapshot_id: str | None,
    ) -> SaveResult:
        """Begin a branch, or a conversation, at a snapshot: another manifest, no state copied."""
        tag = Tag(
            conversation_id or row.conversation_id,
            branch_name or DEFAULT_BRANCH,
            row.tenant,
        )
        check_not_reserved("conversation_id", tag.conversation_id)
        if tag.conversation_id != row.conversation_id:
            self.recorded.require_references("conversation_id")
        await self.context.learn(tag)
        if self.context.tracker.newest(tag) or await self.context.row(tag, None) is not None:
            raise AlreadyExistsError(
                f"conversation {tag.conversation_id!r} has a branch {tag.branch_name!r} already",
                hint="name one that is new",
                details={
                    "conversation_id": tag.conversation_id,
                    "branch_name": tag.branch_name,
                },
            )
        work = self._saver.save(Found(tag, row=row), snapshot_id, "sync")
        return await asyncio.shield(self.context.start(work))

    async def delete(self, row: SnapshotRow) -> None:
        """Remove a snapshot, and the segments that no other snapshot names."""
        await self._remover.remove(row)

    async def get(self, tenant: str, snapshot_id: str) -> SnapshotRow:
        """A snapshot by its id.  `NotFoundError`."""
        return await self.context.in_catalog(self.context.catalog.get, snapshot_id, tenant)

    async def change(self, tenant: str, snapshot_id: str, **fields: Any) -> SnapshotRow:
        """Change `pinned`, `expires_at` or `user_metadata` of a snapshot, durably."""
        return await self._changer.change(tenant, snapshot_id, fields)

    async def set_priority(self, tenant: str, conversation_id: str, priority: int) -> None:
        """Say what a conversation is worth, from 0 to 100, durably.

        `NotFoundError` for one of which neither a snapshot nor a turn is known.
        """
        catalog, tracker = self.context.catalog, self.context.tracker
        if not await self.context.in_catalog(
            catalog.count_snapshots, tenant, conversation_id
        ) and not tracker.knows_conversation(tenant, conversation_id):
            raise NotFoundError(
                f"no conversation {conversation_id!r}",
                hint="a first request can bring its conversation_priority along",
                details={"conversation_id": conversation_id},
            )
        await self.context.conversations.set_priority(tenant, conversation_id, priority)

    async def pin(self, tag: Tag) -> PinResult:
        """Keep the newest state of a branch in VRAM, turn after turn."""
        return await self._pinner.pin(tag)

    async def unpin(self, tag: Tag) -> bool:
        """Let a branch leave VRAM again; whether it was pinned."""
        return await self._pinner.unpin(tag)

    async def demote(self, rows: Sequence[SnapshotRow]) -> int:
        """Let the bytes of snapshots leave RAM now, but for what is in use; how many left."""
        return await self._demoter.demote(rows)

    async def tiers(self) -> dict[str, Any]:
        """What each tier holds now, as it is found there; sizes in bytes."""
        context = self.context
        ranks = await context.ranks.stats()
        warm = await context.with_engine(self._demoter.warm)
        counts = await context.in_catalog(context.catalog.counts)
        store = await context.in_store(context.store.health)
        files, size = await context.in_store(_measured, context.store)
        vram = [rank["vram"] for rank in ranks]
        resident = _pinned(ranks)
        return {
            "vram": {
                **{name: sum(one[name] for one in vram) for name in VRAM_SUMS},
                "pins": self._pinner.report(resident),
            },
            "ram": {
                **{name: sum(rank[key] for rank in ranks) for name, key in RAM_SUMS.items()},
                "conversations": len(warm.conversations),
                "pinned_bytes": 0,
            },
            "disk": {
                "capacity_bytes": context.quota.limit,
                "free_bytes": store.free_bytes,
                "bytes": size,
                "segments": files,
                "named_bytes": counts.segment_bytes,
                "snapshots": counts.snapshots,
                "conversations": counts.conversations,
            },
        }

    async def stats(self) -> dict[str, Any]:
        """Counters of the service and of every rank, what waits now, and the store's health."""
        service, catalog = self.context.stats, self.context.catalog
        store = await self.context.in_store(self.context.store.health)
        return {
            "service": {name: getattr(service, name) for name in service.__slots__},
            "queues": {
                "requests_held": self.gate.holding,
                "saves_running": self.context.saves.running,
                "saves_waiting": self.context.saves.waiting,
                "automatic_saves_waiting": self._automatic.waiting,
            },
            "housekeeping": self.housekeeper.report(),
            "ranks": await self.context.ranks.stats(),
            "stored_boundaries": len(self.context.boundaries),
            "store": asdict(store),
            "catalog": asdict(catalog.report),
        }


def _pinned(ranks: list[dict[str, Any]]) -> set[str]:
    """The owners of what all ranks of a replica have pinned."""
    by_replica: dict[int, set[str]] = {}
    for rank in ranks:
        found, replica = set(rank["vram"]["pinned"]), rank["replica"]
        by_replica[replica] = by_replica.get(replica, found) & found
    return set().union(*by_replica.values())


def _measured(store: Store) -> tuple[int, int]:
    """How many segment files there are, and their bytes: by a walk over them."""
    sizes = [segment.bytes for segment in store.iter_segments()]
    return len(sizes), sum(sizes)
