"""A large catalog is checked after it was opened: until then nothing is removed on its word."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engram.catalog import catalog as module
from engram.catalog import database
from engram.catalog.catalog import Catalog
from engram.errors import StoreError
from engram.snapshot.listing import manifest_name
from engram.snapshot.manifest import change_manifest
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.testing.samples import SHARD, sample_chain, sample_manifest, seeded_random


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any catalog counts as a large one."""
    monkeypatch.setattr(module, "CHECKED_AT_ONCE_BYTES", -1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    """Two turns; the segment of a third that was deleted is left."""
    chain = sample_chain(seeded_random(), (3, 2, 4))
    with DiskStore.open(tmp_path / "store") as store:
        with closing(Catalog.open(store.catalog_path, store)) as catalog:
            for turn in (1, 2, 3):
                manifest = sample_manifest(
                    [chain[:turn]], snapshot_id=f"s-{turn}", turn_number=turn, created_at=turn + 0.5
                )
                catalog.insert(manifest, store.put_manifest(manifest))
            store.delete_manifest("s-3")
            catalog.delete("s-3")
        yield store


def opened(store: DiskStore) -> closing[Catalog]:
    return closing(Catalog.open(store.catalog_path, store))


def run_sql(store: DiskStore, sql: str) -> None:
    with closing(sqlite3.connect(store.catalog_path)) as connection:
        connection.execute(sql)
        connection.commit()


def test_nothing_is_removed_on_its_word_before_it_is_checked(store: DiskStore) -> None:
    with opened(store) as catalog:
        assert not catalog.checked
        assert catalog.unreferenced_segments() == []
        assert catalog.is_referenced(SHARD, "00" * 32), "it may be"
        catalog.check()
        assert catalog.checked
        [orphan] = catalog.unreferenced_segments()
        assert not catalog.is_referenced(SHARD, orphan.segment_id)
        assert catalog.report.suspect is None


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE snapshots SET model_name = 'another' WHERE id = 2",
        "UPDATE segments SET bytes = bytes + 1 WHERE id = 2",
        "UPDATE snapshot_segments SET segment = 77 WHERE snapshot = 2 AND position = 1",
    ],
)
def test_damage_is_found_and_the_next_start_rebuilds(store: DiskStore, sql: str) -> None:
    run_sql(store, sql)
    with opened(store) as catalog:
        catalog.check()
        assert catalog.report.suspect
        assert not catalog.checked
        assert catalog.unreferenced_segments() == [], "the link that is damaged may be to it"
    with opened(store) as catalog:
        assert catalog.checked, "it was checked at once"
        assert catalog.report.rebuilt_because
        assert {row.snapshot_id for row in catalog.all_snapshots()} == {"s-1", "s-2"}
    with opened(store) as catalog:
        assert catalog.report.rebuilt_because is None


def test_damage_that_cannot_be_noted_is_told(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_sql(store, "UPDATE segments SET bytes = bytes + 1 WHERE id = 2")

    def full(self: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "touch", full)
    with opened(store) as catalog:
        with pytest.raises(StoreError, match=r"catalog\.sqlite-suspect"):
            catalog.check()
        assert catalog.report.suspect
        assert not catalog.checked
    assert "the catalog is damaged" in caplog.text


def test_a_damaged_row_is_never_shown(store: DiskStore) -> None:
    run_sql(store, "UPDATE snapshots SET tenant = 'other' WHERE id = 2")
    with opened(store) as catalog:
        with pytest.raises(StoreError, match="checksum"):
            catalog.list_snapshots("other")
        assert catalog.get("s-1").snapshot_id == "s-1"


def test_what_cannot_even_be_read_is_rebuilt_at_once(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Catalog.manifest_entries

    def unreadable(self: Catalog) -> object:
        if not self.checked:
            raise StoreError("database disk image is malformed")
        return really(self)

    monkeypatch.setattr(Catalog, "manifest_entries", unreadable)
    with opened(store) as catalog:
        assert catalog.checked


def test_manifests_come_and_go_at_the_start(store: DiskStore) -> None:
    layout = Layout(store.root)
    layout.manifest(manifest_name("s-2", "")).unlink()
    [chain] = [sample_chain(seeded_random(), (2,))]
    store.put_manifest(sample_manifest([chain], snapshot_id="new", conversation_id="new"))
    with opened(store) as catalog:
        assert (catalog.report.added, catalog.report.removed) == (1, 1)
        assert {row.snapshot_id for row in catalog.all_snapshots()} == {"s-1", "new"}


def test_a_manifest_written_again_is_read_again_by_the_check(store: DiskStore) -> None:
    changed = change_manifest(store.get_manifest("s-1"), pinned=True)
    store.put_manifest(changed, replace=True)
    with opened(store) as catalog:
        assert not catalog.get("s-1").pinned
        catalog.check()
        assert catalog.get("s-1").pinned
        assert catalog.report.refreshed == 1


def test_the_check_leaves_a_save_and_a_deletion_under_way_alone(store: DiskStore) -> None:
    """Between a file and its row: both are somebody else's to finish."""
    with opened(store) as catalog:
        chain = sample_chain(seeded_random(), (2,))
        saving = sample_manifest([chain], snapshot_id="saving", conversation_id="saving")
        entry = store.put_manifest(saving)
        store.delete_manifest("s-2")
        catalog.check()
        catalog.insert(saving, entry)
        assert catalog.delete("s-2")


def test_a_catalog_that_is_closed_meanwhile_ends_the_check(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PROGRESS_STEPS", 1)
    catalog = Catalog.open(store.catalog_path, store)
    reached, closed = threading.Event(), threading.Event()
    really = database._problem

    def slow(connection: sqlite3.Connection) -> str | None:
        reached.set()
        assert closed.wait(30)
        return really(connection)

    monkeypatch.setattr(database, "_problem", slow)
    failures: list[StoreError] = []

    def check() -> None:
        try:
            catalog.check()
        except StoreError as error:
            failures.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    assert reached.wait(30)
    catalog.close()
    closed.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not catalog.checked
    assert ["interrupted" in failure.message for failure in failures] == [True]


def test_a_small_one_is_checked_at_once(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with opened(store) as catalog:
        assert catalog.checked
