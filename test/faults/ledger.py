"""What a server has promised, written down by who was promised it; and whether it was kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram.store.disk import DiskStore
from faults.engine import Keeper


class BrokenPromiseError(AssertionError):
    """A snapshot that was acknowledged is gone or altered, or one is listed that must not be."""


@dataclass
class Promise:
    """A snapshot as its clients know it: `tokens` are all that it records."""

    tokens: list[int]
    saved: bool = False
    refused: bool = False
    deleting: bool = False
    deleted: bool = False

    @property
    def must_be_there(self) -> bool:
        """Acknowledged, and nobody has asked for its end."""
        return self.saved and not self.deleting


@dataclass
class Ledger:
    """Promises by snapshot id. An event is recorded before an act and again when it is answered."""

    promises: dict[str, Promise] = field(default_factory=dict)

    def record(self, event: Mapping[str, Any]) -> None:
        """One of saving (with tokens), saved, refused, deleting and deleted, with the snapshot's
        id."""
        name, snapshot_id = event["event"], event["id"]
        if name == "saving":
            self.promises[snapshot_id] = Promise(list(event["tokens"]))
        else:
            setattr(self.promises[snapshot_id], name, True)

    def settle(self, listed: Iterable[str]) -> None:
        """What nobody knew is known now: an unanswered act has taken place, or it has not."""
        there = set(listed)
        for snapshot_id, promise in list(self.promises.items()):
            if snapshot_id in there:
                promise.saved, promise.deleting = True, False
            else:
                del self.promises[snapshot_id]

    def check_listed(self, listed: Iterable[str]) -> None:
        """Nothing is listed that was never asked for or is deleted; nothing promised is missing."""
        there = set(listed)
        for snapshot_id in there - self.promises.keys():
            raise BrokenPromiseError(f"{snapshot_id} is listed, and nobody has saved it")
        for snapshot_id, promise in self.promises.items():
            if snapshot_id not in there and promise.must_be_there:
                raise BrokenPromiseError(f"{snapshot_id} was acknowledged, and is lost")
            if snapshot_id in there and promise.deleted:
                raise BrokenPromiseError(f"{snapshot_id} was deleted, and is back")
            if snapshot_id in there and promise.refused:
                raise BrokenPromiseError(f"{snapshot_id} was refused, and has come to light")


async def check_keeper(keeper: Keeper, ledger: Ledger) -> int:
    """Every promise is kept, and every snapshot listed restores exactly; how many are listed."""
    rows = keeper.catalog.all_snapshots()
    ledger.check_listed(row.snapshot_id for row in rows)
    for row in rows:
        await keeper.restore(row, ledger.promises[row.snapshot_id].tokens)
    return len(rows)


def check_files(keeper: Keeper, *, aside: bool = False) -> None:
    """Every file is whole, none is half-written or was found damaged; references resolve.

    With `aside` a catalog may have been: it can always be built anew.
    """
    store = keeper.store
    catalog = {store.catalog_path.name + suffix for suffix in ("", "-wal", "-shm")}
    assert store.quarantined_names() <= (catalog if aside else frozenset())
    assert list(store.root.rglob("*.tmp")) == []
    stored = set()
    for found in store.iter_segments():
        store.verify_segment(found.shard, found.segment_id)
        stored.add(found.segment_id)
    named = {
        ref.segment_id
        for row in keeper.catalog.all_snapshots()
        for chain in store.get_manifest(row.snapshot_id, row.tenant).segments
        for ref in chain
    }
    assert named <= stored, "a manifest names a segment that is not there"
    listed = {entry.name for entry in store.list_manifests()}
    assert listed == set(keeper.catalog.manifest_entries()), "catalog and manifests differ"


def check_after_restart(root: Path, ledger: Ledger, *, rebuilt: bool = False) -> int:
    """Start on what a crash left, check everything, settle the ledger; how many are listed.

    With `rebuilt` the catalog may have had to be.
    """

    async def check() -> int:
        keeper = Keeper.start(root)
        try:
            report = keeper.catalog.report
            assert report.damaged == []
            assert rebuilt or report.rebuilt_because is None, report.rebuilt_because
            count = await check_keeper(keeper, ledger)
            check_files(keeper)
            ledger.settle(row.snapshot_id for row in keeper.catalog.all_snapshots())
            return count
        finally:
            keeper.stop()

    return asyncio.run(check())


def sweep(root: Path) -> int:
    """Remove the segments nobody names, as a collection does; how many there were."""
    with DiskStore.open(root) as store:
        named = {
            ref.segment_id
            for entry in store.list_manifests()
            for chain in store.load_manifest(entry).segments  # type: ignore[union-attr]
            for ref in chain
        }
        orphans = [s for s in store.iter_segments() if s.segment_id not in named]
        for orphan in orphans:
            store.delete_segment(orphan.shard, orphan.segment_id)
        return len(orphans)
