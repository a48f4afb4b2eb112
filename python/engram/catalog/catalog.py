"""The catalog: which snapshots there are, and which segments they share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Final

from engram.catalog.database import CatalogDamagedError, Database
from engram.catalog.inventory import InventoryTable
from engram.catalog.owners import OwnerTable
from engram.catalog.removal import RemovalTable
from engram.catalog.rows import OpenReport
from engram.catalog.segments import SegmentTable
from engram.catalog.sharing import SharingTable
from engram.catalog.snapshots import SnapshotTable
from engram.catalog.source import ManifestSource
from engram.catalog.usage import UsageTable
from engram.errors import AlreadyExistsError, StoreError
from engram.snapshot.listing import DamagedManifest, ManifestEntry, manifest_name
from engram.snapshot.manifest import Manifest

logger = logging.getLogger(__name__)

CHECKED_AT_ONCE_BYTES: Final = 16 << 20
"""Above this a catalog is checked while the server serves: some thousand snapshots."""
_COMPANIONS: Final = ("", "-wal", "-shm")


class Catalog(
    SnapshotTable,
    SegmentTable,
    InventoryTable,
    UsageTable,
    RemovalTable,
    OwnerTable,
    SharingTable,
):
    """An index over the manifests of one store. Manifests are the truth, this is for finding them.

    Made by `open`; ``report`` tells what that had to heal. All methods are thread-safe and
    committed (durable) when they return, or when the `atomic` block around them ends.
    Errors: `StoreError` or `StoreFullError` if SQLite cannot work.
    """

    def __init__(
        self, database: Database, report: OpenReport, source: ManifestSource | None = None
    ) -> None:
        super().__init__(database)
        self.report = report
        self._source = source

    @classmethod
    def open(cls, path: Path, source: ManifestSource) -> Catalog:
        """Open the catalog and bring it in line with the manifests there are.

        A file that is missing, damaged or of another schema is moved aside and built anew. A crash
        between a manifest's file and its row leaves a difference, which is healed here.

        What would take seconds for a large one is left to `check`: that every value is intact, and
        that no manifest was written again. A small one is checked at once.
        """
        suspect = _suspect(path)
        at_once = suspect.exists() or _bytes_of(path) <= CHECKED_AT_ONCE_BYTES
        try:
            catalog = cls._open(path, source, at_once=at_once)
        except StoreError:
            if at_once:
                raise
            catalog = cls._open(path, source, at_once=True)
        suspect.unlink(missing_ok=True)
        return catalog

    @classmethod
    def _open(cls, path: Path, source: ManifestSource, *, at_once: bool) -> Catalog:
        report = OpenReport()
        if not path.exists():
            report.rebuilt_because = "there was none"
        try:
            database = Database.open(path, check=at_once)
        except CatalogDamagedError as damage:
            report.rebuilt_because = str(damage)
            move_aside(path, source, str(damage))
            database = Database.open(path)
        catalog = cls(database, report, source)
        try:
            with catalog.atomic():
                catalog._reconcile(source)
                if at_once:
                    catalog._refresh(source)
        except BaseException:
            catalog.close()
            raise
        return catalog

    @property
    def checked(self) -> bool:
        """Whether everything in it is known to be intact. Until then no segment is removed on its
        word: `unreferenced_segments` has none, and `is_referenced` says yes."""
        return self._db.checked

    def check(self) -> None:
        """Do what opening left out, while others go on; takes seconds, and nothing if it is done.

        Damage is told in ``report.suspect``, and the next `open` rebuilds the catalog. Raises
        `StoreError` where it could not be found out, as when the catalog is closed meanwhile.
        """
        if self.checked or self._source is None:
            return
        try:
            self._db.check()
        except CatalogDamagedError as damage:
            self.report.suspect = str(damage)
            logger.error(
                "Engram: the catalog is damaged (%s): no segment is removed, and the next start "
                "rebuilds it",
                damage,
            )
            mark = _suspect(self._db.path)
            try:
                mark.touch()
            except OSError as error:
                raise StoreError(
                    f"cannot write {mark}: {error.strerror}",
                    hint="make the file, or the next start finds the damage only while it serves",
                    details={"file": str(mark)},
                ) from error
            return
        with self.atomic():
            self._refresh(self._source)

    def close(self) -> None:
        """Close the database. May be called again."""
        self._db.close()

    def _reconcile(self, source: ManifestSource) -> None:
        """Rows without their file go; files without a row are read.

        The row of a damaged manifest stays for as long as the file lies in quarantine: whoever
        restores it is told so, its turn is not counted again, and its segments wait for a repair.
        """
        indexed = self.manifest_entries()
        stored = source.manifest_names()
        quarantined = source.quarantined_names()
        for name in sorted(indexed.keys() - stored - quarantined):
            _, snapshot_id, tenant = indexed[name]
            self.delete(snapshot_id, tenant)
            self.report.removed += 1
        for name in sorted(stored - indexed.keys()):
            entry = source.manifest_entry(name)
            if entry is None:
                continue
            manifest = source.load_manifest(entry)
            if isinstance(manifest, DamagedManifest):
                self.report.damaged.append(manifest)
                continue
            self.report.added += 1
            self._add(manifest, entry, source, stored)

    def _refresh(self, source: ManifestSource) -> None:
        """Files written again since their row was made are read again; within `atomic`.

        Others may be saving and deleting: what has only a file, or only a row, is theirs.
        """
        indexed = self.manifest_entries()
        for entry in source.list_manifests():
            if entry.name not in indexed:
                continue
            known, snapshot_id, tenant = indexed[entry.name]
            if known == entry:
                continue
            manifest = source.load_manifest(entry)
            if isinstance(manifest, DamagedManifest):
                self.report.damaged.append(manifest)
                continue
            self.delete(snapshot_id, tenant)
            self.report.refreshed += 1
            self._add(manifest, entry, source, indexed.keys())

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


def _suspect(path: Path) -> Path:
    """The file that says that the catalog was found damaged while it was in use."""
    return path.with_name(path.name + "-suspect")


def _bytes_of(path: Path) -> int:
    parts = (path.with_name(path.name + suffix) for suffix in _COMPANIONS)
    return sum(part.stat().st_size for part in parts if part.exists())


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
