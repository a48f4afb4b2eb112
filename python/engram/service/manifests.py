"""Manifests of turns and of branches: made, committed, and checked before they are named again."""

from __future__ import annotations

import time
from typing import Final

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag, Turn
from engram.core.ids import DEFAULT_BRANCH
from engram.core.tokens import tokens_digest
from engram.errors import (
    InternalError,
    ManifestCorruptError,
    NotFoundError,
    SnapshotCorruptError,
)
from engram.service.context import ServiceContext
from engram.service.finder import Found
from engram.service.ports import EngineInfo, Stored
from engram.snapshot.manifest import (
    Durability,
    LayerConfig,
    Manifest,
    change_manifest,
    make_manifest,
)

SAVE_AGAIN: Final = (
    "this turn was saved, and its snapshot has been damaged since: delete it, then save the turn "
    "again, or save a later one"
)


class Manifests:
    """Makes and commits manifests."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def of_turn(
        self,
        found: Found,
        engine: EngineInfo,
        snapshot_id: str,
        durability: Durability,
        stored: Stored,
    ) -> Manifest:
        turn, tag = found.turn, found.tag
        assert turn is not None
        tokens = turn.request.tokens
        if stored.boundary > len(tokens):
            raise InternalError(
                f"the state stands at token {stored.boundary}, {len(tokens)} are recorded"
            )
        keys = {ref.key for ref in stored.chains[0]}
        parent = turn.tag.parent_snapshot or await self._context.in_catalog(
            self._parent, turn, tag, keys
        )
        return make_manifest(
            snapshot_id=snapshot_id,
            tenant=tag.tenant,
            conversation_id=tag.conversation_id,
            branch_name=tag.branch_name,
            turn_number=turn.number,
            parent_snapshot=parent,
            created_at=time.time(),
            namespace=engine.namespace.id,
            model_name=engine.model_name,
            layer_config=LayerConfig(num_layers=engine.num_layers, model_type=engine.model_type),
            token_count=stored.boundary,
            pending_tokens=tuple(tokens[stored.boundary :].tolist()),
            tokens_digest=tokens_digest(tokens),
            durability=durability,
            segments=stored.chains,
            bytes=stored.bytes,
            unique_bytes=stored.unique_bytes,
            health=stored.health,
            user_metadata={},
            pinned=False,
            expires_at=None,
            rid=turn.request.rid,
            prompt_count=turn.request.prompt_count,
        )

    def of_branch(self, found: Found, snapshot_id: str, durability: Durability) -> Manifest:
        """The start of a branch: another manifest over the same segments, no state copied."""
        row = found.stored
        origin = self.check_whole(row)
        same = found.tag.conversation_id == row.conversation_id
        return change_manifest(
            origin,
            snapshot_id=snapshot_id,
            conversation_id=found.tag.conversation_id,
            # The request it came from was one of the other conversation.
            rid=origin.rid if same else None,
            branch_name=found.tag.branch_name,
            parent_snapshot=row.snapshot_id,
            created_at=time.time(),
            durability=durability,
            unique_bytes=0,
            pinned=False,
            expires_at=None,
            user_metadata={},
        )

    def check_whole(self, row: SnapshotRow) -> Manifest:
        """The manifest of a snapshot that is about to be acknowledged once more; in the guard.

        Raises `SnapshotCorruptError` if it or a file it names is gone, cut or known as damaged, and
        `NotFoundError` if it was deleted since ``row`` was read.
        """
        store = self._context.store
        self._context.catalog.get(row.snapshot_id, row.tenant)
        try:
            manifest = store.get_manifest(row.snapshot_id, row.tenant)
            for shard, chain in manifest.shards():
                for ref in chain:
                    if not store.has_segment(shard, ref.segment_id, ref.bytes):
                        # Says what is wrong with it, and moves a damaged file aside.
                        store.verify_segment(shard, ref.segment_id)
        except NotFoundError as lost:
            self._context.stats.corrupt += 1
            raise ManifestCorruptError(
                f"the manifest of snapshot {row.snapshot_id!r} is missing",
                hint=SAVE_AGAIN,
                details=lost.details,
            ) from None
        except SnapshotCorruptError as error:
            self._context.stats.corrupt += 1
            error.hint = SAVE_AGAIN
            raise
        return manifest

    def commit(self, manifest: Manifest) -> None:
        """Manifest durable, then its row.  A crash in between is healed at the next start."""
        catalog, store = self._context.catalog, self._context.store
        catalog.ensure_free(manifest)
        entry = store.put_manifest(manifest)
        try:
            catalog.insert(manifest, entry)
        except Exception:
            # A save that was answered with an error must not come to light later.
            store.delete_manifest(manifest.snapshot_id, manifest.tenant)
            raise

    def _parent(self, turn: Turn, tag: Tag, keys: set[str]) -> str | None:
        """The newest earlier snapshot that this one stands on, on its branch or where it began."""
        catalog = self._context.catalog
        branches = (tag.branch_name, turn.tag.branch_name, DEFAULT_BRANCH)
        for branch in dict.fromkeys(branches):
            earlier = catalog.earlier(tag.tenant, tag.conversation_id, branch, turn.number)
            for snapshot_id, key in earlier:
                if key in keys:
                    return snapshot_id
        return None
