"""`SnapshotService`: everything a route, the request gate or a command can ask of snapshots."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from engram.catalog.catalog import Catalog
from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.core.settings import Settings
from engram.core.tokens import TokenArray
from engram.errors import NotFoundError
from engram.service.automatic import AutomaticSaver
from engram.service.collecting import drop_segments
from engram.service.context import ServiceContext
from engram.service.finder import TurnFinder, need_place
from engram.service.ports import EngineInfo, Generator, Ranks
from engram.service.requests import RequestGate
from engram.service.restores import Continuation, Restorer
from engram.service.results import RestoreResult, SaveResult
from engram.service.saves import TurnSaver
from engram.snapshot.manifest import Durability
from engram.store.base import Store


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
        self.gate = RequestGate(self.context, self._automatic)
        self.context.on_turn = self._automatic.finished

    async def close(self) -> None:
        """Save what is due, wait for what is under way."""
        self._automatic.close()
        await self.context.drain()

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

    async def delete(self, row: SnapshotRow) -> None:
        """Remove a snapshot, and the segments that no other snapshot names."""
        # A client that goes away must not let others in between a deletion's steps.
        await asyncio.shield(self.context.start(self._delete(row)))

    async def _delete(self, row: SnapshotRow) -> None:
        context = self.context
        async with context.guard.alone():
            keys = await context.in_catalog(
                context.catalog.boundary_keys_of, row.snapshot_id, row.tenant
            )
            await context.in_store(self._remove, row)
            context.deleted(row, keys)
            orphans = await context.in_catalog(context.catalog.unreferenced_segments)
            await context.with_engine(lambda engine: drop_segments(context, engine, orphans))

    def _remove(self, row: SnapshotRow) -> None:
        # The manifest first: a row without its file is healed at the next start, and what was
        # deleted must not come back.
        with self.context.store.reserve_at_hand():
            self.context.store.delete_manifest(row.snapshot_id, row.tenant)
            self.context.catalog.delete(row.snapshot_id, row.tenant)

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
            "ranks": await self.context.ranks.stats(),
            "stored_boundaries": len(self.context.boundaries),
            "store": asdict(store),
            "catalog": asdict(catalog.report),
        }
