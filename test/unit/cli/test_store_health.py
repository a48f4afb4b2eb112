"""The health of a store is told without a change to it, whether or not a server uses it."""

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from engram.catalog.catalog import Catalog
from engram.cli.store_health import StoreHealth, store_health
from engram.snapshot.manifest import Manifest
from engram.store.disk import DiskStore
from engram.store.inspection import lock_holder
from engram.store.layout import Layout
from engram.testing.samples import sample_chain, sample_manifest, seeded_random

SEGMENTS = 4  # of a sample chain


def filled(root: Path) -> Manifest:
    """A store of one snapshot of `SEGMENTS` segments, and its catalog."""
    chain = sample_chain(seeded_random())
    manifest = sample_manifest([chain])
    with DiskStore.open(root) as store:
        for segment in chain:
            store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)
        store.put_manifest(manifest)
        Catalog.open(store.catalog_path, store).close()
    return manifest


def contents(root: Path) -> dict[str, str]:
    """Every file of a folder with the digest of its bytes, every folder too."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in root.rglob("*")
    }


def unchanged(root: Path) -> StoreHealth:
    """The health of a store that is afterwards what it was before."""
    before = contents(root)
    health = store_health(root)
    assert contents(root) == before
    return health


def test_a_whole_store_is_healthy(tmp_path: Path) -> None:
    filled(tmp_path)
    health = unchanged(tmp_path)
    assert health.problems == ()
    assert (health.marker, health.in_use_by) == ("intact", None)
    assert (health.snapshots, health.conversations, health.manifests) == (1, 1, 1)
    assert health.segments == SEGMENTS
    assert health.segment_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.seg"))
    assert health.quarantined == 0


def test_a_store_in_use_is_told_and_stays_in_use(tmp_path: Path) -> None:
    filled(tmp_path)
    with DiskStore.open(tmp_path) as store:
        catalog = Catalog.open(store.catalog_path, store)
        health = store_health(tmp_path)
        again = lock_holder(tmp_path)
        assert catalog.counts().snapshots == 1
        catalog.close()
    assert health.problems == ()
    assert (health.snapshots, health.conversations) == (1, 1)
    assert health.in_use_by is not None
    assert health.in_use_by.startswith("process ")
    assert again == health.in_use_by
    assert lock_holder(tmp_path) is None


def test_what_a_crash_left_beside_the_catalog_is_read_and_left_there(tmp_path: Path) -> None:
    manifest = filled(tmp_path)
    catalog = Layout(tmp_path).catalog
    with DiskStore.open(tmp_path) as store:
        open_catalog = Catalog.open(catalog, store)
        open_catalog.delete(manifest.snapshot_id, manifest.tenant)
        files = {p.name: p.read_bytes() for p in tmp_path.glob("catalog.sqlite*")}
        open_catalog.close()
    for name in ("catalog.sqlite", "catalog.sqlite-wal"):
        (tmp_path / name).write_bytes(files[name])
    health = unchanged(tmp_path)
    assert health.snapshots == 0  # as the write-ahead log says
    assert health.manifests == 1


def remove_marker(root: Path) -> None:
    Layout(root).marker.unlink()


def damage_marker(root: Path) -> None:
    Layout(root).marker.write_bytes(b"{}")


def remove_segment(root: Path) -> None:
    next(root.rglob("*.seg")).unlink()


def damage_manifest(root: Path) -> None:
    path = next((root / "manifests").rglob("*.json"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_catalog(root: Path) -> None:
    Layout(root).catalog.write_bytes(b"not a database" * 400)


def quarantine_a_file(root: Path) -> None:
    with DiskStore.open(root) as store:
        (root / "stray").write_bytes(b"x")
        store.quarantine_file(root / "stray", "for the test")


def foreign_catalog(root: Path) -> None:
    Layout(root).catalog.unlink()
    connection = sqlite3.connect(Layout(root).catalog)
    connection.execute("CREATE TABLE other (x)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (remove_marker, "the store's marker is missing"),
        (damage_marker, "the store's marker is damaged"),
        (remove_segment, "names a segment that is not there"),
        (damage_manifest, "is damaged; the next start quarantines it"),
        (damage_catalog, "the catalog is damaged"),
        (foreign_catalog, "the catalog is damaged"),
        (quarantine_a_file, "1 damaged files in"),
    ],
)
def test_harm_is_seen_and_left_as_it_is(
    tmp_path: Path, harm: Callable[[Path], None], problem: str
) -> None:
    filled(tmp_path)
    harm(tmp_path)
    health = unchanged(tmp_path)
    assert len(health.problems) == 1
    assert problem in health.problems[0]


@pytest.mark.parametrize("name", [".", "absent"])
def test_a_folder_that_is_no_store_is_told_and_not_made_one(tmp_path: Path, name: str) -> None:
    health = store_health(tmp_path / name)
    assert health.problems == (f"{(tmp_path / name).absolute()} is no snapshot store",)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_store_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    monkeypatch.setattr("engram.store.marker.FORMAT", 0)
    health = unchanged(tmp_path)
    assert health.marker == "newer format"
    assert "written by a newer Engram" in health.problems[0]
