"""What may change of a snapshot after it was saved: its pin, its expiry, its user's metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from engram.catalog.rows import SnapshotRow
from engram.errors import ManifestCorruptError, NotFoundError
from engram.service.context import ServiceContext
from engram.snapshot.manifest import change_manifest

CHANGEABLE: Final = frozenset({"pinned", "expires_at", "user_metadata"})


class SnapshotChanger:
    """Writes manifests again, one after another, and never while one of them is removed."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._lock = asyncio.Lock()

    async def change(self, tenant: str, snapshot_id: str, fields: Mapping[str, Any]) -> SnapshotRow:
        """Give a snapshot new values of some of the fields `CHANGEABLE`; durable on return.

        Raises `NotFoundError`, `ManifestCorruptError`, or `InvalidRequestError` naming the field.
        """
        assert fields.keys() <= CHANGEABLE, fields
        # A client that goes away must not leave a row that is not its manifest's.
        return await asyncio.shield(self._context.start(self._change(tenant, snapshot_id, fields)))

    async def _change(
        self, tenant: str, snapshot_id: str, fields: Mapping[str, Any]
    ) -> SnapshotRow:
        context = self._context
        # A removal has the guard alone: a manifest must not come back after it.
        async with self._lock, context.guard.shared():
            row = await context.in_catalog(context.catalog.get, snapshot_id, tenant)
            if fields:
                await context.in_store(self._write, row, fields)
                context.changed()
            return await context.in_catalog(context.catalog.get, snapshot_id, tenant)

    def _write(self, row: SnapshotRow, fields: Mapping[str, Any]) -> None:
        store, catalog = self._context.store, self._context.catalog
        try:
            manifest = store.get_manifest(row.snapshot_id, row.tenant)
        except NotFoundError as lost:
            raise ManifestCorruptError(
                f"the manifest of snapshot {row.snapshot_id!r} is missing",
                hint="put the file back from a backup, or delete the snapshot",
                details=lost.details,
            ) from None
        changed = change_manifest(manifest, **fields)
        catalog.replace(changed, store.put_manifest(changed, replace=True))
