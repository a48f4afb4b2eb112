"""Snapshots to one portable file and back, while the server runs."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.errors import SnapshotCorruptError
from engram.service.context import ServiceContext
from engram.store.disk import DiskStore
from engram.store.durable import store_error
from engram.upkeep.exporting import plan_export, write_archive
from engram.upkeep.importing import ArchiveFile, ImportReport, Names, import_archive


@dataclass(frozen=True, slots=True)
class ArchiveAtHand:
    """An archive in a folder of its own, which whoever has it removes when it is done with."""

    path: Path
    bytes: int

    def remove(self) -> None:
        """Remove the file, once."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


class Transfer:
    """Exports and imports.  Archives lie in the system's folder for temporary files, readable to
    nobody else, as long as they travel: what is damaged is told before the first byte is sent, and
    a slow client holds up no deletion."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def export(self, row: SnapshotRow) -> ArchiveAtHand:
        """Write a snapshot, with all it stands on, to a file, verified.

        `SnapshotCorruptError`, `StoreFullError` for no room for the file.
        """
        try:
            # A removal has the guard alone: no file goes while it is copied.
            async with self._context.guard.shared():
                return await self._context.in_store(self._write, row)
        except SnapshotCorruptError:
            self._context.stats.corrupt += 1
            raise

    def _write(self, row: SnapshotRow) -> ArchiveAtHand:
        store = self._context.store
        folder = _new_folder("engram-export-")
        try:
            archive = plan_export(store, [store.get_manifest(row.snapshot_id, row.tenant)])
            path = folder / f"{row.snapshot_id}.engram"
            write_archive(path, store, archive)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return ArchiveAtHand(path, archive.file_length)

    async def receive(self, parts: AsyncIterator[bytes]) -> ArchiveAtHand:
        """Keep what a client sends until it is imported.

        `StoreFullError` if there is no room for it, `StoreError` for what else the system refuses.
        """
        folder = await self._context.in_store(_new_folder, "engram-import-")
        path, size = folder / "archive", 0
        try:
            with path.open("wb") as file:
                async for part in parts:
                    size += len(part)
                    await self._context.in_store(file.write, part)
        except OSError as error:
            refusal = store_error("write", path, error, needed=size)
            shutil.rmtree(folder, ignore_errors=True)
            raise refusal from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return ArchiveAtHand(path, size)

    async def take(self, received: ArchiveAtHand, names: Names) -> ImportReport:
        """Store the snapshots of an archive: verified to its last byte, then all of them or none.

        Raises as `ArchiveFile` and `import_archive` do, and `StoreFullError` for the quota.
        """
        # A client that goes away must not tear it in the middle.
        return await asyncio.shield(self._context.start(self._take(received, names)))

    async def _take(self, received: ArchiveAtHand, names: Names) -> ImportReport:
        context = self._context
        try:
            file = await context.in_store(ArchiveFile, received.path)
            with file:
                await context.in_store(file.verify)
                async with context.quota.reserved(received.bytes), context.guard.shared():
                    report = await context.in_store(self._store, file, names)
        finally:
            await context.in_store(received.remove)
        for manifest in report.manifests:
            context.stored(manifest)
            turn = Tag(manifest.conversation_id, manifest.branch_name, manifest.tenant)
            context.tracker.reached(turn, manifest.turn_number)
        return report

    def _store(self, file: ArchiveFile, names: Names) -> ImportReport:
        # The one store that a server runs on; others are wrapped around it.
        store = cast(DiskStore, self._context.store)
        return import_archive(store, self._context.catalog, file, names)


def _new_folder(prefix: str) -> Path:
    """A folder for an archive on its way (blocks).  `StoreFullError` or `StoreError`."""
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise store_error("make a folder in", Path(tempfile.gettempdir()), error) from error
