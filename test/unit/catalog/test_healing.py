"""Opening a catalog: rebuilt when damaged, brought in line with the manifests always."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engram.catalog import schema
from engram.catalog.catalog import Catalog
from engram.catalog.database import CatalogDamagedError, Database
from engram.errors import StoreError
from engram.snapshot.listing import manifest_name
from engram.snapshot.manifest import Manifest, change_manifest
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.testing.samples import (
    SHARD,
    sample_chain,
    sample_manifest,
    sample_turns,
    seeded_random,
)
from engram.testing.tamper import DAMAGES


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def manifests(store: DiskStore) -> list[Manifest]:
    """Two conversations with shared segments, saved as a server saves them."""
    rng = seeded_random()
    made = []
    with closing(Catalog.open(store.catalog_path, store)) as catalog:
        for conversation in ("a", "b"):
            for turn, chain in enumerate(sample_turns(rng, (3, 2, 4)), 1):
                manifest = sample_manifest(
                    [chain],
                    snapshot_id=f"{conversation}-{turn}",
                    conversation_id=conversation,
                    turn_number=turn,
                    created_at=1000.5 + turn,
                    user_metadata={"turn": turn},
                )
                catalog.insert(manifest, store.put_manifest(manifest))
                made.append(manifest)
    return made


def contents(catalog: Catalog) -> object:
    """Everything its queries can tell."""
    keys = catalog.boundary_keys(SHARD.namespace)
    return (
        sorted(catalog.all_snapshots(), key=lambda row: row.snapshot_id),
        keys,
        [catalog.chain(SHARD.namespace, 0, key) for name in sorted(keys) for key in keys[name]],
        catalog.conversations(""),
        catalog.counts(),
        catalog.manifest_entries(),
    )


def opened(store: DiskStore) -> closing[Catalog]:
    return closing(Catalog.open(store.catalog_path, store))


def damage_manifest(store: DiskStore, manifest: Manifest) -> None:
    path = Layout(store.root).manifest(manifest_name(manifest.snapshot_id, manifest.tenant))
    path.write_bytes(path.read_bytes().replace(b'"turn', b'"Turn'))


def drop(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def run_sql(*statements: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    return damage


def overwrite(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def patch(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def truncate(part: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


@pytest.mark.usefixtures("manifests")
class TestRebuilding:
    def test_from_the_manifests_alone_it_is_what_it_was(self, store: DiskStore) -> None:
        with opened(store) as catalog:
            before = contents(catalog)
            assert catalog.report.rebuilt_because is None
            assert (catalog.report.added, catalog.report.removed) == (0, 0)
        drop(store.catalog_path)
        with opened(store) as catalog:
            assert contents(catalog) == before
            assert catalog.report.rebuilt_because == "there was none"
            assert catalog.report.added == 6

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (overwrite(b"garbage " * 1000), "not a database"),
            (overwrite(b"SQLite format 3\0" + b"\xff" * 4080), ""),
            (truncate(0.5), ""),
            (truncate(0.99), ""),
            (patch(0, b"X"), "not a database"),
            (patch(18, b"\x09\x09"), ""),
            (patch(100, b"\xff" * 200), ""),
            (patch(4096, b"\xff" * 4096), ""),
            (run_sql("DROP TABLE snapshots"), ""),
            (run_sql("DROP INDEX segments_by_key"), "not the ones of its schema version"),
            (run_sql("ALTER TABLE segments ADD COLUMN more"), "not the ones of its schema"),
            (run_sql("CREATE TABLE more (a)"), "not the ones of its schema version"),
            (run_sql("INSERT INTO migrations VALUES (99, 'of the future')"), "has version 99"),
            (run_sql("DELETE FROM migrations"), ""),
            (run_sql("UPDATE snapshots SET model_name = 'another' WHERE id = 2"), "checksum"),
            (run_sql("UPDATE snapshots SET expires_at = 9e999 WHERE id = 2"), "checksum"),
            (run_sql("UPDATE segments SET bytes = bytes + 1 WHERE id = 2"), "checksum"),
            (run_sql("UPDATE segments SET has_state = x'00' WHERE id = 2"), "checksum"),
            (run_sql("PRAGMA foreign_keys = OFF", "DELETE FROM segments"), "refers to one"),
        ],
    )
    def test_a_damaged_catalog_is_moved_aside_and_rebuilt(
        self, store: DiskStore, damage: Callable[[Path], None], reason: str
    ) -> None:
        with opened(store) as catalog:
            catalog.record_use({("", "a"): 1.0})  # so that no page of the file is empty
            before = contents(catalog)
        damage(store.catalog_path)
        with opened(store) as catalog:
            assert contents(catalog) == before
            assert catalog.report.rebuilt_because
            assert reason in catalog.report.rebuilt_because
            assert catalog.report.added == 6
        assert store.stats().quarantined >= 1
        with opened(store) as catalog:
            assert catalog.report.rebuilt_because is None
            assert contents(catalog) == before

    def test_a_write_ahead_log_goes_with_the_damaged_file(
        self, store: DiskStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Left behind, it would be played into the new one."""
        path = store.catalog_path
        files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]
        with opened(store) as catalog:
            before = contents(catalog)
            catalog.delete("a-3")
            crashed = [file.read_bytes() for file in files]
        for file, data in zip(files, crashed, strict=True):
            file.write_bytes(data)
        really_open = Database.open

        def find_damage(path: Path, *, check: bool = True) -> Database:
            monkeypatch.setattr(Database, "open", really_open)
            raise CatalogDamagedError("damage that shows before the log is touched")

        monkeypatch.setattr(Database, "open", find_damage)
        with opened(store) as catalog:
            assert contents(catalog) == before
            assert catalog.report.added == 6
        quarantined = {
            p.name.partition("catalog")[2] for p in (store.root / "quarantine").iterdir()
        }
        assert {".sqlite", ".sqlite-wal", ".sqlite-shm"} <= quarantined

    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
    def test_any_damage_to_any_file_of_the_catalog(
        self, store: DiskStore, suffix: str, damage: str
    ) -> None:
        """As a crash leaves them: what was committed last is in the log alone."""
        path = store.catalog_path
        files = [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]
        with opened(store) as catalog:
            for row in catalog.all_snapshots():
                manifest = change_manifest(store.get_manifest(row.snapshot_id), pinned=True)
                catalog.replace(manifest, store.put_manifest(manifest, replace=True))
            before = contents(catalog)
            crashed = [file.read_bytes() for file in files]
        for file, data in zip(files, crashed, strict=True):
            file.write_bytes(data)
        DAMAGES[damage](path.with_name(path.name + suffix))
        for _ in range(2):
            with opened(store) as catalog:
                assert contents(catalog) == before
                assert catalog.report.damaged == []
        assert catalog.report.rebuilt_because is None, "healed for good"

    def test_a_link_moved_to_another_segment_is_found(self, store: DiskStore) -> None:
        """Damage that would let the collector take a segment in use: it breaks only an index."""
        with opened(store) as catalog:
            before = contents(catalog)
        run_sql(
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master"
            " WHERE name = 'segments_by_key') WHERE name = 'snapshot_segments_by_segment'",
        )(store.catalog_path)
        with opened(store) as catalog:
            assert contents(catalog) == before
            assert catalog.report.rebuilt_because is not None

    def test_no_random_damage_breaks_the_start_or_changes_an_answer(self, store: DiskStore) -> None:
        rng = seeded_random()
        with opened(store) as catalog:
            before = contents(catalog)
        healthy = store.catalog_path.read_bytes()
        for _ in range(40):
            drop(store.catalog_path)
            damaged = bytearray(healthy)
            for _ in range(rng.choice([1, 3, 50])):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            store.catalog_path.write_bytes(damaged)
            with opened(store) as catalog:
                assert contents(catalog) == before
                assert catalog.unreferenced_segments() == []

    def test_a_catalog_that_cannot_be_opened_is_an_error_not_damage(self, store: DiskStore) -> None:
        drop(store.catalog_path)
        store.catalog_path.mkdir()
        with pytest.raises(StoreError, match="catalog"):
            Catalog.open(store.catalog_path, store)
        assert store.catalog_path.is_dir()

    def test_a_damaged_catalog_that_cannot_be_moved_is_an_error(
        self, store: DiskStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overwrite(b"garbage " * 1000)(store.catalog_path)
        monkeypatch.setattr(store, "quarantine_file", lambda path, reason: None)
        with pytest.raises(StoreError, match="cannot be moved aside") as caught:
            Catalog.open(store.catalog_path, store)
        assert caught.value.hint

    def test_the_catalog_is_private(self, store: DiskStore) -> None:
        assert store.catalog_path.stat().st_mode & 0o777 == 0o600


class TestReconciling:
    def test_a_manifest_without_a_row_is_added(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        """kill -9 between the manifest's file and the catalog's commit."""
        new = change_manifest(manifests[0], snapshot_id="new", conversation_id="new")
        store.put_manifest(new)
        with opened(store) as catalog:
            assert catalog.get("new").conversation_id == "new"
            assert (catalog.report.added, catalog.report.removed) == (1, 0)

    def test_a_row_without_a_manifest_is_removed(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        """kill -9 between a manifest's removal and the catalog's commit."""
        store.delete_manifest("b-3")
        with opened(store) as catalog:
            assert {row.snapshot_id for row in catalog.all_snapshots()} == {
                manifest.snapshot_id for manifest in manifests
            } - {"b-3"}
            assert (catalog.report.added, catalog.report.removed) == (0, 1)
            orphans = {orphan.segment_id for orphan in catalog.unreferenced_segments()}
            assert orphans == {ref.segment_id for ref in manifests[-1].segments[0][-2:]}

    def test_a_manifest_written_again_is_read_again(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        """kill -9 between a replacement of a manifest and the catalog's commit."""
        store.put_manifest(change_manifest(manifests[0], pinned=True), replace=True)
        with opened(store) as catalog:
            assert catalog.get(manifests[0].snapshot_id).pinned
            assert catalog.report.refreshed == 1
            assert (catalog.report.added, catalog.report.removed) == (0, 0)
        with opened(store) as catalog:
            assert catalog.report.refreshed == 0

    def test_a_damaged_manifest_is_reported_and_its_row_stays(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        """For as long as the file lies in quarantine; its segments wait for a repair."""
        damage_manifest(store, manifests[2])
        with opened(store) as catalog:
            before = catalog.counts()
            (damaged,) = catalog.report.damaged
            assert damaged.name == manifest_name(manifests[2].snapshot_id, "")
            assert damaged.quarantined_to is not None
            assert catalog.report.removed == 0
            assert catalog.get(manifests[2].snapshot_id).turn_number == 3
            assert catalog.unreferenced_segments() == []
        with opened(store) as catalog:
            assert catalog.report.damaged == []
            assert catalog.counts() == before
        Path(damaged.quarantined_to).unlink()
        with opened(store) as catalog:
            assert catalog.report.removed == 1
            assert manifests[2].snapshot_id not in {r.snapshot_id for r in catalog.all_snapshots()}

    def test_a_repaired_manifest_is_taken_up_again(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        damage_manifest(store, manifests[2])
        with opened(store):
            pass
        store.put_manifest(manifests[2])
        with opened(store) as catalog:
            assert (catalog.report.refreshed, catalog.report.damaged) == (1, [])
            assert catalog.counts().snapshots == len(manifests)

    def test_an_intact_manifest_takes_the_turn_of_a_damaged_one(
        self, store: DiskStore, manifests: list[Manifest]
    ) -> None:
        damage_manifest(store, manifests[2])
        with opened(store):
            pass
        store.put_manifest(change_manifest(manifests[2], snapshot_id="later", created_at=1e9))
        with opened(store) as catalog:
            found = catalog.find("", manifests[2].conversation_id, "main", 3)
            assert found.snapshot_id == "later"
            assert catalog.report.damaged == []
        assert len(store.list_manifests()) == len(manifests)

    @pytest.mark.parametrize("newer_is_indexed", [True, False])
    def test_of_two_manifests_for_one_turn_the_older_stays(
        self, store: DiskStore, newer_is_indexed: bool
    ) -> None:
        rng = seeded_random()
        old, new = (
            sample_manifest([sample_chain(rng, (2,))], snapshot_id=name, created_at=created_at)
            for name, created_at in (("old", 5.0), ("new", 6.0))
        )
        with opened(store) as catalog:
            indexed = new if newer_is_indexed else old
            catalog.insert(indexed, store.put_manifest(indexed))
        store.put_manifest(old if newer_is_indexed else new)
        with opened(store) as catalog:
            assert [row.snapshot_id for row in catalog.all_snapshots()] == ["old"]
            (damaged,) = catalog.report.damaged
            assert "same conversation, branch and turn" in damaged.reason
            assert damaged.quarantined_to is not None
        assert len(store.list_manifests()) == 1

    def test_a_failure_while_reconciling_leaves_the_catalog_as_it_was(
        self, store: DiskStore, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(store) as catalog:
            before = contents(catalog)
        store.delete_manifest("a-1")
        extra = change_manifest(manifests[0], snapshot_id="new", conversation_id="new")
        store.put_manifest(extra)

        def unreadable(entry: object) -> None:
            raise StoreError("the disk is gone")

        with monkeypatch.context() as patched:
            patched.setattr(store, "load_manifest", unreadable)
            with pytest.raises(StoreError, match="the disk is gone"):
                Catalog.open(store.catalog_path, store)
        with closing(sqlite3.connect(store.catalog_path)) as connection:
            assert connection.execute("SELECT count(*) FROM snapshots").fetchone() == (6,)
        assert before
        with opened(store) as catalog:
            assert (catalog.report.added, catalog.report.removed) == (1, 1)


class TestMigrations:
    def test_a_migration_and_its_record_commit_together(
        self, store: DiskStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(store):
            pass
        broken = (*schema.MIGRATIONS, ("second", ("CREATE TABLE second (a)", "NOT SQL")))
        monkeypatch.setattr(schema, "MIGRATIONS", broken)
        with closing(sqlite3.connect(store.catalog_path, isolation_level=None)) as connection:
            with pytest.raises(sqlite3.OperationalError):
                schema.migrate(connection)
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            assert "second" not in names
            newest = connection.execute("SELECT max(version) FROM migrations").fetchone()
            assert newest == (len(schema.MIGRATIONS) - 1,)

    def test_an_older_catalog_is_migrated_in_place(
        self, store: DiskStore, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        more = (*schema.MIGRATIONS, ("second", ("ALTER TABLE segments ADD COLUMN a TEXT",)))
        monkeypatch.setattr(schema, "MIGRATIONS", more)
        with opened(store) as catalog:
            assert catalog.report.rebuilt_because is None
            assert (catalog.report.added, catalog.report.removed) == (0, 0)
            assert len(catalog.all_snapshots()) == len(manifests)
        with closing(sqlite3.connect(store.catalog_path)) as connection:
            assert connection.execute("SELECT version, name FROM migrations").fetchall() == [
                *((n, name) for n, (name, _) in enumerate(more, start=1)),
            ]
