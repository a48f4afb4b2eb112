"""Named prefixes: beginnings of prompts that are computed once, stored, and pinned."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import FinishedRequest, Tag
from engram.core.ids import DEFAULT_BRANCH, new_snapshot_id
from engram.core.tokens import TokenArray, to_tokens, tokens_digest
from engram.core.waiting import within
from engram.errors import (
    AlreadyExistsError,
    CaptureLostError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    SaveQueueFullError,
)
from engram.service.changes import SnapshotChanger
from engram.service.context import ServiceContext
from engram.service.finder import RESERVED
from engram.service.ports import EngineInfo
from engram.service.removals import Remover
from engram.service.restores import Restorer
from engram.service.saves import TurnSaver
from engram.snapshot.manifest import LayerConfig, make_manifest

logger = logging.getLogger(__name__)

MARKED: Final = "marked."
"""How the names of prefixes begin that requests mark with `cache_control`."""
MAX_MARKS: Final = 256
"""Marked prefixes on their way into the store; while there are so many, no other mark is kept."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that is stored; `usable` if its state was made by what this server runs."""

    name: str
    row: SnapshotRow
    usable: bool
    existing: bool = False


@dataclass(slots=True)
class _Progress:
    """How far a prefix is: `computed` is set when the engine has its state, or when it is over.

    `looked_up_at` is when the catalog had said whether it is stored, in monotonic seconds.
    """

    computed: asyncio.Event
    looked_up_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Keeping:
    """A prefix on its way into the store."""

    progress: _Progress
    task: asyncio.Task[Prefix]


class PrefixKeeper:
    """Keeps prefixes as pinned snapshots of conversations of their own: requests find their state
    as they find every other, by page key."""

    def __init__(
        self,
        context: ServiceContext,
        saver: TurnSaver,
        restorer: Restorer,
        remover: Remover,
        changer: SnapshotChanger,
    ) -> None:
        self._context = context
        self._saver = saver
        self._restorer = restorer
        self._remover = remover
        self._changer = changer
        self._running: dict[tuple[str, str], _Keeping] = {}
        # What is written is held in RAM on every rank: one at a time.
        self._storing = asyncio.Lock()

    async def keep(
        self, tenant: str, name: str, ids: Sequence[int], *, expires_at: float | None = None
    ) -> Prefix:
        """Compute and store a prefix, durable on return; the one that exists if it is the same, and
        no request has found it damaged.

        Tokens past the last whole page are left out.  Raises `AlreadyExistsError` if the name is
        another prefix's, `InvalidRequestError` for one shorter than a page.
        """
        while (other := self._running.get((tenant, name))) is not None:
            await asyncio.wait({other.task})
        # A client that goes away must not tear it in the middle.
        return await asyncio.shield(self._begin(tenant, name, ids, expires_at).task)

    async def mark(self, tenant: str, ids: Sequence[int], seconds: float) -> float:
        """Keep a prefix that a request has marked, from its last use on for so many seconds.

        Returns when the engine has its state: the request does not wait until that is stored, and
        what goes wrong there costs the prefix alone.  To learn whether it is stored already, it
        waits for `--snapshot-promote-timeout` at most: the seconds of that are returned.
        `SaveQueueFullError` if too many marks are on their way.
        """
        tokens = to_tokens(ids)
        name = MARKED + tokens_digest(tokens)[:32]
        begun, until = time.monotonic(), time.time() + seconds
        running = self._running.get((tenant, name))
        if running is None:
            marks = sum(other.startswith(MARKED) for _, other in self._running)
            if marks >= MAX_MARKS:
                raise SaveQueueFullError(
                    f"{marks} marked prefixes wait to be stored already",
                    hint="the store is slower than what is marked",
                    details={"waiting": marks, "limit": MAX_MARKS},
                )
            running = self._begin(tenant, name, ids, until)
        self._context.start(self._marked(tenant, running, until))
        await running.progress.computed.wait()
        looked_up_at = running.progress.looked_up_at
        return max((time.monotonic() if looked_up_at is None else looked_up_at) - begun, 0.0)

    def _begin(
        self, tenant: str, name: str, ids: Sequence[int], expires_at: float | None
    ) -> _Keeping:
        progress = _Progress(asyncio.Event())
        work = self._keep(tenant, name, ids, expires_at, progress)
        running = _Keeping(progress, self._context.start(work))
        self._running[tenant, name] = running

        def over(_: asyncio.Task[Prefix]) -> None:
            progress.computed.set()
            del self._running[tenant, name]

        # Before all who wait for the task: they find nothing running.
        running.task.add_done_callback(over)
        return running

    async def _marked(self, tenant: str, running: _Keeping, until: float) -> None:
        """See a mark stored, for as long as it is marked for."""
        try:
            row = (await running.task).row
            if row.expires_at is not None and row.expires_at < until:
                await self._changer.change(tenant, row.snapshot_id, {"expires_at": until})
        except Exception as error:
            self._context.stats.note(f"prefix marked with cache_control: {error}")
            logger.warning("Engram: a prefix marked with cache_control is not kept: %s", error)

    async def get(self, tenant: str, name: str) -> Prefix:
        """A prefix by its name.  `NotFoundError`."""
        row = await self._context.row(_tag(tenant, name), None)
        if row is None:
            raise NotFoundError(f"no prefix {name!r}", details={"name": name})
        return Prefix(name, row, await self._usable(row))

    async def list(
        self, tenant: str, limit: int, after: str | None
    ) -> tuple[list[Prefix], str | None]:
        """Prefixes by name, those past the name `after`, and the last name if there are more."""
        found = await self._context.in_catalog(
            self._context.catalog.conversations_from,
            tenant,
            RESERVED,
            limit=limit + 1,
            after=RESERVED + (after or ""),
        )
        names = [one.conversation_id.removeprefix(RESERVED) for one in found]
        prefixes = []
        for name in names[:limit]:
            try:
                prefixes.append(await self.get(tenant, name))
            except NotFoundError:
                continue  # deleted meanwhile
        return prefixes, names[limit - 1] if len(names) > limit else None

    async def delete(self, tenant: str, name: str) -> Prefix:
        """Remove a prefix, and the bytes that no other snapshot shares."""
        prefix = await self.get(tenant, name)
        await self._remover.remove(prefix.row)
        return prefix

    async def _keep(
        self,
        tenant: str,
        name: str,
        ids: Sequence[int],
        expires_at: float | None,
        progress: _Progress,
    ) -> Prefix:
        tokens, tag = to_tokens(ids, "input_ids"), _tag(tenant, name)
        looking = self._look_up(tag)
        if name.startswith(MARKED):
            timeout = self._context.settings.snapshot_promote_timeout
            try:
                row, engine = await within(timeout, looking)
            except asyncio.TimeoutError:
                raise DeadlineError(
                    f"the store has not said in {timeout:g} s whether it is there"
                ) from None
        else:
            row, engine = await looking
        progress.looked_up_at = time.monotonic()
        if row is not None and row.namespace == engine.namespace.id:
            whole = self._context.boundaries.serves(row.boundary_key)
            if whole:
                progress.computed.set()
            existing = await self._same(name, row, _pages(tokens, engine))
            if whole:
                return existing
        snapshot_id = await self._context.with_engine(
            lambda engine: self._make(engine, tag, _pages(tokens, engine), expires_at, progress)
        )
        catalog = self._context.catalog
        row = await self._context.in_catalog(catalog.get, snapshot_id, tenant)
        return Prefix(name, row, usable=True)

    async def _look_up(self, tag: Tag) -> tuple[SnapshotRow | None, EngineInfo]:
        return await self._context.row(tag, None), await self._context.engine()

    async def _same(self, name: str, row: SnapshotRow, tokens: TokenArray) -> Prefix:
        """The prefix that exists, if it is the one that is wanted."""
        # A mark's name says its tokens.
        if not name.startswith(MARKED) and await self._restorer.digest(row) != tokens_digest(
            tokens
        ):
            raise AlreadyExistsError(
                f"prefix {name!r} exists already, and is another one",
                hint=f"DELETE /v1/prefixes/{name} first, or choose another name",
                details={"name": name, "token_count": row.token_count},
            )
        return Prefix(name, row, usable=True, existing=True)

    async def _make(
        self,
        engine: EngineInfo,
        tag: Tag,
        tokens: TokenArray,
        expires_at: float | None,
        progress: _Progress,
    ) -> str:
        context = self._context
        request = await self._computed(tokens)
        progress.computed.set()
        async with self._storing:
            other = await context.row(tag, None)
            if other is not None:
                # Another model's, another layout's, or damaged: of no use here any more.
                await self._remover.remove(other)
            await context.write_down(engine)
            try:
                return await self._store(engine, tag, request, expires_at)
            except CaptureLostError:
                # It has waited for longer than its state has stayed.
                request = await self._computed(tokens)
                return await self._store(engine, tag, request, expires_at)

    async def _computed(self, tokens: TokenArray) -> FinishedRequest:
        """A request for exactly these tokens, which leaves a state at their end; what it samples
        is unused."""
        params = {"max_new_tokens": 1, "ignore_eos": True}
        try:
            generation = await self._context.generator.generate(tokens.tolist(), params)
        except InvalidRequestError as error:
            if "field" in error.details:
                error.details["field"] = "input_ids"
            raise
        return FinishedRequest(generation.rid, tokens, time.time())

    async def _store(
        self, engine: EngineInfo, tag: Tag, request: FinishedRequest, expires_at: float | None
    ) -> str:
        context, namespace, tokens = self._context, engine.namespace.id, request.tokens
        async with self._saver.room(request, len(tokens)):
            stored = await context.ranks.persist(namespace, request, len(tokens))
            manifest = make_manifest(
                snapshot_id=new_snapshot_id(),
                tenant=tag.tenant,
                conversation_id=tag.conversation_id,
                branch_name=tag.branch_name,
                turn_number=1,
                parent_snapshot=None,
                created_at=time.time(),
                namespace=namespace,
                model_name=engine.model_name,
                layer_config=LayerConfig(
                    num_layers=engine.num_layers, model_type=engine.model_type
                ),
                token_count=stored.boundary,
                pending_tokens=tuple(tokens[stored.boundary :].tolist()),
                tokens_digest=tokens_digest(tokens),
                durability="sync",
                segments=stored.chains,
                bytes=stored.bytes,
                unique_bytes=stored.unique_bytes,
                health=stored.health,
                user_metadata={},
                # Marks are kept until they expire, names until they are deleted.
                pinned=expires_at is None,
                expires_at=expires_at,
                rid=None,
            )
            await context.in_store(self._saver.manifests.commit, manifest)
            context.stored(manifest)
        context.stats.saves += 1
        return manifest.snapshot_id

    async def _usable(self, row: SnapshotRow) -> bool:
        return row.namespace == (await self._context.engine()).namespace.id


def _tag(tenant: str, name: str) -> Tag:
    return Tag(RESERVED + name, DEFAULT_BRANCH, tenant)


def _pages(tokens: TokenArray, engine: EngineInfo) -> TokenArray:
    """The whole pages of a prefix: a state stands at a page's end."""
    whole = tokens[: len(tokens) // engine.page_size * engine.page_size]
    if not len(whole):
        raise InvalidRequestError(
            f"the prefix has {len(tokens)} tokens that no other text could change, a page has "
            f"{engine.page_size}",
            hint="take a longer one",
            details={"token_count": len(tokens)},
        )
    return whole
