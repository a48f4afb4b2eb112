"""Bringing a snapshot back: verified, into memory, and on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.tokens import TokenArray, to_tokens, tokens_digest
from engram.errors import (
    EngramError,
    ManifestCorruptError,
    NamespaceMismatchError,
    NotFoundError,
    SnapshotCorruptError,
    UnsupportedError,
)
from engram.service.context import ServiceContext
from engram.service.demotion import restore_owner
from engram.service.ports import Brought, EngineInfo
from engram.service.results import RestoreResult, TierChange
from engram.snapshot.manifest import Manifest, rows_of
from engram.snapshot.segment import Shard

RESTORE_TIMEOUT_S: Final = 600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A generation that goes on from a restored snapshot: these tokens follow the recorded ones."""

    tokens: Sequence[int]
    sampling_params: Mapping[str, Any]
    rid: str | None = None


class Restorer:
    """Reads snapshots: their tokens for who lists them, their state for who continues them."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def restore(
        self, row: SnapshotRow, continuation: Continuation | None = None
    ) -> RestoreResult:
        """Bring a snapshot's state into RAM on every rank, and generate from it if asked to."""
        with self._context.in_use.held([(row.tenant, row.snapshot_id)]):
            return await self._restore(row, continuation)

    async def _restore(self, row: SnapshotRow, continuation: Continuation | None) -> RestoreResult:
        begun = time.monotonic()
        context = self._context
        try:
            tokens, brought = await context.with_engine(
                lambda engine: self._bring(engine, row, unseeded=continuation is not None)
            )
        except EngramError as error:
            context.stats.restore_failures += 1
            if isinstance(error, SnapshotCorruptError):
                await self._check_listed(row)
            raise
        context.stats.restores += 1
        context.conversations.used(row.tenant, row.conversation_id)
        if brought.source_tier == "disk":
            context.on_tier_change(
                TierChange(
                    row.conversation_id, "disk", "ram", "restore", row.snapshot_id, brought.bytes
                )
            )
        elapsed_ms = (time.monotonic() - begun) * 1000
        generation = None
        if continuation is not None:
            generation = await context.generator.generate(
                [*tokens.tolist(), *continuation.tokens],
                continuation.sampling_params,
                rid=continuation.rid,
                tag=Tag(row.conversation_id, row.branch_name, row.tenant, row.snapshot_id),
            )
        return RestoreResult(
            snapshot=row,
            token_count=row.token_count,
            recompute_tokens=row.pending_count,
            source_tier="vram" if brought.in_vram else brought.source_tier,
            tier="vram" if brought.in_vram else "ram",
            bytes=brought.bytes,
            state_slot=brought.state_slot,
            elapsed_ms=elapsed_ms,
            generation=generation,
        )

    async def _bring(
        self, engine: EngineInfo, row: SnapshotRow, *, unseeded: bool
    ) -> tuple[TokenArray, Brought]:
        manifest, tokens = await self._reading(self._read, row, engine)
        if unseeded:
            self._check_unseeded(row, tokens, engine)
        brought = await self._context.ranks.promote(
            engine.namespace.id,
            manifest.segments,
            owner=restore_owner(row),
            seconds=self._context.settings.conversation_active_timeout,
            exact=True,
            timeout=RESTORE_TIMEOUT_S,
            tokens=tokens[: row.token_count],
        )
        return tokens, brought

    def _check_unseeded(self, row: SnapshotRow, tokens: TokenArray, engine: EngineInfo) -> None:
        """Refuse to generate under other page keys than those of the snapshot.

        What they were seeded with is not recorded: a salt is a secret of the client's.
        """
        keys = self._context.ranks.page_keys(
            tokens[: row.token_count], engine.page_size, None, None
        )
        if keys[-1] != row.boundary_key:
            raise UnsupportedError(
                "this conversation was held under an extra_key, a cache_salt or a LoRA adapter, "
                "without which its state cannot be used",
                hint="restore without create_new_request, and send the next turn to /generate "
                "with the same extra_key, cache_salt and lora_path",
                details={"field": "create_new_request"},
            )

    async def tokens(self, row: SnapshotRow) -> TokenArray:
        """All recorded tokens of a snapshot, u32 [token_count + pending]."""
        return await self._reading(self._tokens_of, row)

    async def digest(self, row: SnapshotRow) -> str:
        """`tokens_digest` of all recorded tokens of a snapshot, whatever state its segments are
        in."""
        return await self._reading(lambda row: self._manifest(row).tokens_digest, row)

    async def recorded(self, row: SnapshotRow) -> tuple[TokenArray, int | None]:
        """All recorded tokens of a snapshot, and how many of them are its turn's prompt."""
        return await self._reading(self._recorded_of, row)

    async def _reading(self, work: Callable[..., T], row: SnapshotRow, *args: Any) -> T:
        """Read a snapshot's files on a thread; damage that is found there is counted."""
        try:
            return await self._context.in_store(work, row, *args)
        except SnapshotCorruptError:
            await self._check_listed(row)
            self._context.stats.corrupt += 1
            raise

    def _recorded_of(self, row: SnapshotRow) -> tuple[TokenArray, int | None]:
        manifest = self._manifest(row)
        return self._tokens(manifest), manifest.prompt_count

    async def _check_listed(self, row: SnapshotRow) -> None:
        """Raise `NotFoundError` for a snapshot that is being removed, or was: to who reads its
        files it looks damaged."""
        context = self._context
        # Files go before the row does. By the time this can be shared, a removal is over.
        async with context.guard.shared():
            await context.in_catalog(context.catalog.get, row.snapshot_id, row.tenant)

    def _tokens_of(self, row: SnapshotRow) -> TokenArray:
        return self._tokens(self._manifest(row))

    def _manifest(self, row: SnapshotRow) -> Manifest:
        """The manifest of a listed snapshot; that it is listed says that it was durable."""
        try:
            return self._context.store.get_manifest(row.snapshot_id, row.tenant)
        except NotFoundError as error:
            file = error.details.get("file")
            raise ManifestCorruptError(
                f"the manifest of snapshot {row.snapshot_id!r} is missing: {file}",
                hint="restore another turn, put the file back from a backup, or delete the "
                "snapshot",
                details={"snapshot_id": row.snapshot_id, "file": file},
            ) from None

    def _read(self, row: SnapshotRow, engine: EngineInfo) -> tuple[Manifest, TokenArray]:
        if row.namespace != engine.namespace.id:
            self._require_namespace(row, engine)
        manifest = self._manifest(row)
        return manifest, self._tokens(manifest)

    def _require_namespace(self, row: SnapshotRow, engine: EngineInfo) -> None:
        """Raise `NamespaceMismatchError` for a snapshot of another namespace, by field if it can
        be told."""
        try:
            found = self._context.store.get_namespace(row.namespace)
        except NotFoundError as lost:
            error = NamespaceMismatchError.of("namespace", engine.namespace.id, row.namespace)
            error.message += f"; which field differs cannot be told: {lost.message}"
            raise error from None
        engine.namespace.require(found)

    def _tokens(self, manifest: Manifest) -> TokenArray:
        """The tokens stored with the rows, checked against the manifest."""
        shard = Shard(manifest.namespace, 0, manifest.world_size)
        state = manifest.segments[0][-1]
        if not self._context.store.has_segment(shard, state.segment_id, state.bytes):
            # Whoever asks for the tokens is told that nothing can go on from them.
            self._context.store.verify_segment(shard, state.segment_id)
        parts = [
            self._context.store.read_tokens(shard, ref.segment_id)[1][: ref.end - ref.start]
            for ref in rows_of(manifest.segments[0])
        ]
        tokens: TokenArray = np.concatenate([*parts, to_tokens(manifest.pending_tokens)])
        if tokens_digest(tokens) != manifest.tokens_digest:
            raise SnapshotCorruptError(
                f"the tokens of snapshot {manifest.snapshot_id!r} are not the ones it recorded",
                hint="delete the snapshot, or restore another turn",
                details={"segments": [ref.segment_id for ref in manifest.segments[0]]},
            )
        return tokens
