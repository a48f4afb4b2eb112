"""What all parts of the service share."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from engram.catalog.catalog import Catalog
from engram.catalog.rows import SnapshotRow
from engram.conversation.tracker import ConversationTracker
from engram.conversation.turns import FinishedRequest, Tag, Turn
from engram.core.settings import Settings
from engram.errors import EngramError, NamespaceChangedError, NotFoundError
from engram.service.boundaries import BoundaryIndex
from engram.service.conversations import Conversations
from engram.service.guard import SharedLock
from engram.service.in_use import SnapshotsInUse
from engram.service.ports import EngineInfo, Generator, Ranks
from engram.service.queue import SaveQueue
from engram.service.quota import DiskQuota
from engram.service.results import ServiceStats, TierChange
from engram.snapshot.manifest import Manifest
from engram.store.base import Store
from engram.upkeep.collect import Sweep

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS: Final = 3
"""How often something is asked of the ranks while their weights keep changing."""
STORE_THREADS: Final = 16
CATALOG_THREADS: Final = 2


class ServiceContext:
    """Store, catalog, engine and tracker of one server, and the tasks in its background.

    Used on one event loop; the store and the catalog are touched on threads of the service's own.
    The event loop's default threads are SGLang's too: a disk that hangs must not use them up.
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
        self.boundaries = BoundaryIndex("")
        self.tracker = ConversationTracker()
        self.on_turn: Callable[[Turn], None] = lambda turn: None
        """Called for every turn that has finished and has its number."""
        self.on_tier_change: Callable[[TierChange], None] = lambda change: None
        """Called when a conversation's bytes have come into RAM or left it; must not raise."""
        self.saves = SaveQueue()
        self.conversations = Conversations(self)
        quota = settings.snapshot_disk_quota_gb
        self.quota = DiskQuota(self, None if quota is None else int(quota * 1e9))
        self.in_use = SnapshotsInUse()
        self.changes = 0
        """Counts what changes about snapshots: saved, removed, pinned, worth more or less."""
        # Saves share it, a deletion has it alone: between segments that are durable and the
        # manifest that names them, a deletion would take them for orphans.
        self.guard = SharedLock()
        self.sweep = Sweep()
        self._store_threads = ThreadPoolExecutor(STORE_THREADS, "engram-store")
        # Quick by comparison: not behind reads of files.
        self._catalog_threads = ThreadPoolExecutor(CATALOG_THREADS, "engram-catalog")
        self._engine: EngineInfo | None = None
        self._describing: asyncio.Task[EngineInfo] | None = None
        self._checking: asyncio.Future[None] | None = None
        self._forgotten = 0
        self._written_down = ""
        self._learning: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def in_store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what touches files on a thread."""
        call = functools.partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._store_threads, call)

    async def in_catalog(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what asks the catalog on a thread."""
        call = functools.partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._catalog_threads, call)

    async def engine(self) -> EngineInfo:
        """Who the engine is; asked once, and again when it may have become another one."""
        if self._engine is not None:
            return self._engine
        if self._describing is None or self._describing.done():
            self._describing = self.start(self._find_out())
        # Whoever gives up waiting leaves the answer to the others.
        return await asyncio.shield(self._describing)

    @property
    def described(self) -> bool:
        """Whether `engine` answers at once."""
        return self._engine is not None

    async def _find_out(self) -> EngineInfo:
        while self._engine is None:
            forgotten = self._forgotten
            engine = await self._describe()
            if forgotten == self._forgotten:
                self._engine = engine
        return self._engine

    def forget_engine(self) -> None:
        """The engine's weights have changed, or may have: ask again before it matters."""
        self._engine = None
        self._forgotten += 1

    async def with_engine(self, work: Callable[[EngineInfo], Awaitable[T]]) -> T:
        """The result of `work`, which is begun again if the engine's weights changed meanwhile."""
        for attempt in range(ATTEMPTS):
            engine = await self.engine()
            try:
                return await work(engine)
            except NamespaceChangedError:
                if self._engine is engine:
                    self.forget_engine()
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def _describe(self) -> EngineInfo:
        engine = await self.ranks.describe()
        namespace = engine.namespace.id
        if self.boundaries.namespace != namespace or not self.boundaries.complete:
            self.boundaries = boundaries = BoundaryIndex(namespace)
            known = await self.in_catalog(self.catalog.boundary_keys, namespace)
            for name, keys in known.items():
                boundaries.fill(name, keys)
            boundaries.filled()
            if known:
                await self.write_down(engine)
        if not self.catalog.checked and self._checking is None:
            # Not among the tasks that a stop waits for: the next start does it again.
            loop = asyncio.get_running_loop()
            self._checking = loop.run_in_executor(self._store_threads, self._check_catalog)
        return engine

    def _check_catalog(self) -> None:
        try:
            self.catalog.check()
        except EngramError as error:
            logger.warning("Engram: the catalog could not be checked: %s", error)

    async def write_down(self, engine: EngineInfo) -> None:
        """Describe the engine's namespace in the store, before a snapshot names it.

        Not as soon as it is known: weights may change every few seconds without a single save.
        """
        if self._written_down != engine.namespace.id:
            await self.in_store(self.store.put_namespace, engine.namespace)
            self._written_down = engine.namespace.id

    def stored(self, manifest: Manifest) -> None:
        """A snapshot is durable: requests may start from it, if its namespace is the engine's."""
        self.changed()
        self.quota.wrote(manifest.unique_bytes)
        if manifest.namespace == self.boundaries.namespace:
            name = (manifest.tenant, manifest.snapshot_id)
            self.boundaries.add(name, manifest.boundary_keys)

    def changed(self) -> None:
        """Something about snapshots is another than it was."""
        self.changes += 1

    def deleted(self, row: SnapshotRow, keys: list[str]) -> None:
        """A snapshot is gone."""
        self.changed()
        if row.namespace == self.boundaries.namespace:
            self.boundaries.remove((row.tenant, row.snapshot_id), keys)

    async def learn(self, tag: Tag) -> None:
        """See to it that the tracker knows how far the tag's branch is saved."""
        while not self.tracker.knows_branch(tag):
            task = self._learning.get(tag.branch)
            if task is None:
                task = self._learning[tag.branch] = self.start(self._learn(tag))
                task.add_done_callback(lambda _: self._learning.pop(tag.branch))
            # Whoever gives up waiting leaves the answer to the others.
            await asyncio.shield(task)

    async def _learn(self, tag: Tag) -> None:
        newest = await self.in_catalog(self._newest_saved, tag)
        for turn in self.tracker.learn(tag, newest):
            self.on_turn(turn)

    def expected_boundary(self, request: FinishedRequest, engine: EngineInfo) -> int:
        """Where the state of a finished request stands if no rank remembers: the last sampled
        token is pending, and a boundary lies on a page."""
        return (len(request.tokens) - 1) // engine.page_size * engine.page_size

    async def row(self, tag: Tag, turn_number: int | None) -> SnapshotRow | None:
        """The snapshot of a turn, or of the branch's newest saved one."""
        try:
            return await self.in_catalog(
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
