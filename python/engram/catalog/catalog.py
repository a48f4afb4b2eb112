"""The catalog: which snapshots there are, and which segments they share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Final

from engram.catalog.database import CatalogDamagedError, Database
from engram.catalog.inventory import InventoryTable
from engram.catalog.owners import OwnerTable
from engram.catalog.removal import RemovalTable
from engram.catalog.rows import OpenReport
from engram.catalog.segments import SegmentTable
from engram.catalog.snapshots import SnapshotTable
from engram.catalog.source import ManifestSource
from engram.catalog.usage import UsageTable
from engram.errors import AlreadyExistsError, StoreError
from engram.snapshot.listing import DamagedManifest, ManifestEntry, manifest_name
from engram.snapshot.manifest import Manifest

_COMPANIONS: Final = ("", "-wal", "-shm")


class Catalog(SnapshotTable, SegmentTable, InventoryTable, UsageTable, RemovalTable, OwnerTable):
    """An index over the manifests of one store. Manifests are the truth, this is for finding them.

    Made by `open`; ``report`` tells what that had to heal. All methods are thread-safe and
    committed (durable) when they return, or when the `atomic` block around them ends.
    Errors: `StoreError` or `StoreFullError` if SQLite cannot work.
    """

    def __init__(self, database: Database, report: OpenReport) -> None:
        super().__init__(database)
        self.report = report

    @classmethod
    def open(cls, path: Path, source: ManifestSource) -> Catalog:
        """Open the catalog and bring it in line with the manifests there are.

        A file that is missing, damaged or of another schema is moved aside and built anew. A crash
        between a manifest's file and its row leaves a difference, which is healed here.
        """
        report = OpenReport()
        if not path.exists():
            report.rebuilt_because = "there was none"
        try:
            database = Database.open(path)
        except CatalogDamagedError as damage:
            report.rebuilt_because = str(damage)
            move_aside(path, source, str(damage))
            database = Database.open(path)
        catalog = cls(database, report)
        try:
            with catalog.atomic():
                catalog._reconcile(source)
        except BaseException:
            catalog.close()
            raise
        return catalog

    def close(self) -> None:
        """Close the database. May be called again."""
        self._db.close()

    def _reconcile(self, source: ManifestSource) -> None:
        """Rows without their file go; files without a row, or written again since, are read.

        The row of a damaged manifest stays for as long as the file lies in quarantine: whoever
        restores it is told so, its turn is not counted again, and its segments wait for a repair.
        """
        indexed = self.manifest_entries()
        stored = {entry.name: entry for entry in source.list_manifests()}
        quarantined = source.quarantined_names()
        for name, (_, snapshot_id, tenant) in indexed.items():
            if name not in stored and name not in quarantined:
                self.delete(snapshot_id, tenant)
                self.report.removed += 1
        for name, entry in stored.items():
            known, *names = indexed.get(name, (None,))
            if known == entry:
                continue
            manifest = source.load_manifest(entry)
            if isinstance(manifest, DamagedManifest):
                self.report.damaged.append(manifest)
                continue
            if known is None:
                self.report.added += 1
            else:
                self.delete(*names)
                self.report.refreshed += 1
            self._add(manifest, entry, source, stored.keys())

    def _add(
        self,
        manifest: Manifest,
        entry: ManifestEntry,
        source: ManifestSource,
        stored: Collection[str],
    ) -> None:
        """Insert a manifest found in the store. Of two for one turn, the older one stays.

        Only one of them can have been acknowledged, and that is the one that was there first. One
        that is damaged gives way.
        """
        with contextlib.suppress(AlreadyExistsError):
            self.insert(manifest, entry)
            return
        holder = self.find(
            manifest.tenant, manifest.conversation_id, manifest.branch_name, manifest.turn_number
        )
        name = manifest_name(holder.snapshot_id, holder.tenant)
        whole = name in stored
        loser = entry
        if not whole or manifest.created_at < holder.created_at:
            loser = self.manifest_entries()[name][0]
            self.delete(holder.snapshot_id, holder.tenant)
            self.insert(manifest, entry)
        if not whole:
            return
        reason = "another manifest has the same conversation, branch and turn"
        moved_to = source.quarantine_manifest(loser, reason)
        self.report.damaged.append(
            DamagedManifest(loser.name, reason, None if moved_to is None else str(moved_to))
        )


def move_aside(path: Path, source: ManifestSource, reason: str) -> None:
    """Quarantine the database with its companions, or they would be played into the new one."""
    for suffix in _COMPANIONS:
        part = path.with_name(path.name + suffix)
        if part.exists() and source.quarantine_file(part, reason) is None:
            raise StoreError(
                f"the catalog {path} is damaged ({reason}) and {part} cannot be moved aside",
                hint="check the permissions of the snapshot directory, or remove the file",
                details={"file": str(part)},
            )
