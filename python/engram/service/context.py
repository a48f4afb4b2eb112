"""What all parts of the service share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from engram.catalog.catalog import Catalog
from engram.catalog.rows import SnapshotRow
from engram.conversation.tracker import ConversationTracker
from engram.conversation.turns import FinishedRequest, Tag
from engram.core.settings import Settings
from engram.errors import NotFoundError
from engram.service.boundaries import BoundaryIndex
from engram.service.guard import SharedLock
from engram.service.ports import EngineInfo, Generator, Ranks
from engram.service.results import ServiceStats
from engram.store.base import Store

T = TypeVar("T")


class ServiceContext:
    """Store, catalog, engine and tracker of one server, and the tasks in its background.

    Used on one event loop; the store and the catalog are touched on worker threads.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        catalog: Catalog,
        ranks: Ranks,
        generator: Generator,
    ) -> None:
        self.settings = settings
        self.store = store
        self.catalog = catalog
        self.ranks = ranks
        self.generator = generator
        self.stats = ServiceStats()
        self.boundaries = BoundaryIndex()
        self.tracker = ConversationTracker(self._newest_saved)
        # Saves share it, a deletion has it alone: between segments that are durable and the
        # manifest that names them, a deletion would take them for orphans.
        self.guard = SharedLock()
        self._engine: EngineInfo | None = None
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def engine(self) -> EngineInfo:
        """Who the engine is; asked once, and its namespace written down."""
        if self._engine is None:
            async with self._starting:
                if self._engine is None:
                    self._engine = await self._describe()
        return self._engine

    async def _describe(self) -> EngineInfo:
        engine = await self.ranks.describe()
        await asyncio.to_thread(self.store.put_namespace, engine.namespace)
        for row in await asyncio.to_thread(self.catalog.all_snapshots):
            if row.namespace == engine.namespace.id:
                keys = await asyncio.to_thread(self.boundary_keys, row)
                self.boundaries.add(keys)
        return engine

    def boundary_keys(self, row: SnapshotRow) -> list[str]:
        """The page keys at which the segments of a snapshot end (blocks: SQLite)."""
        return [ref.key for ref in self.catalog.chain(row.namespace, 0, row.boundary_key)]

    def expected_boundary(self, request: FinishedRequest, engine: EngineInfo) -> int:
        """Where the state of a finished request stands if no rank remembers: the last sampled
        token is pending, and a boundary lies on a page."""
        return (len(request.tokens) - 1) // engine.page_size * engine.page_size

    async def row(self, tag: Tag, turn_number: int | None) -> SnapshotRow | None:
        """The snapshot of a turn, or of the branch's newest saved one."""
        try:
            return await asyncio.to_thread(
                self.catalog.find, tag.tenant, tag.conversation_id, tag.branch_name, turn_number
            )
        except NotFoundError:
            return None

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run in the background; `drain` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Wait until nothing runs in the background."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _newest_saved(self, tag: Tag) -> int:
        try:
            return self.catalog.find(tag.tenant, tag.conversation_id, tag.branch_name).turn_number
        except NotFoundError:
            return 0
