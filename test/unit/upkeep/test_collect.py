"""What nothing names is removed after its grace period, and nothing else ever is."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from engram.catalog.catalog import Catalog
from engram.catalog.rows import UnreferencedSegment
from engram.cli.main import app
from engram.errors import StoreError
from engram.snapshot.archive import segments_of
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import Shard
from engram.store.base import StoredSegment
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.testing.contracts import put
from engram.testing.faults import FaultyFileSystem
from engram.testing.samples import SHARD, SampleSegment, sample_chain
from engram.testing.tamper import DAMAGES, remove_catalog
from engram.upkeep.collect import NamedSegments, Sweep, collect_store, plan_collection
from unit.upkeep.stores import NAMESPACE, contents, make_store

NOW = 2_000_000_000.0
"""Long after every file of a test was written."""


def keys(root: Path) -> set[tuple[Shard, str]]:
    with DiskStore.open(root, lock=False) as store:
        return {(s.shard, s.segment_id) for s in store.iter_segments()}


def named_by(manifests: list[Manifest]) -> set[tuple[Shard, str]]:
    return {key for manifest in manifests for key in segments_of(manifest)}


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gc", *arguments])


@pytest.fixture
def orphans(rng: Random) -> list[SampleSegment]:
    return sample_chain(rng, (2, 3), shard=Shard("ee" * 32, 0, 1)) + sample_chain(
        rng, (4,), shard=Shard(NAMESPACE.id, 0, 1)
    )


@pytest.fixture
def manifests(tmp_path: Path, rng: Random) -> list[Manifest]:
    return make_store(tmp_path / "store", rng)


@pytest.fixture
def root(tmp_path: Path, manifests: list[Manifest], orphans: list[SampleSegment]) -> Path:
    """A conversation, and segments of saves that came to nothing two hours ago."""
    root = tmp_path / "store"
    with DiskStore.open(root) as store:
        for segment in orphans:
            put(store, segment)
    for path in root.rglob("*.seg"):
        age(path, 7200)
    return root


segments = st.builds(
    StoredSegment,
    shard=st.just(SHARD),
    segment_id=st.sampled_from([f"{n:064x}" for n in range(12)]),
    bytes=st.integers(1, 10**12),
    written_at=st.floats(NOW - 10_000, NOW + 10_000),
)


class TestPlan:
    @given(
        st.lists(segments, max_size=12),
        st.sets(st.sampled_from([(SHARD, f"{n:064x}") for n in range(12)])),
        st.floats(0, 9_000),
    )
    def test_only_what_is_old_and_unnamed_goes(
        self,
        found: list[StoredSegment],
        named: set[tuple[Shard, str]],
        grace: float,
    ) -> None:
        plan = plan_collection(found, named, NOW, grace)
        for segment in found:
            old = segment.written_at <= NOW - grace
            unnamed = (segment.shard, segment.segment_id) not in named
            # Within what a float can tell of such times.
            if abs(segment.written_at - (NOW - grace)) > 1e-3:
                assert (segment in plan.remove) == (old and unnamed)
        assert len(plan.remove) + plan.named + plan.young == len(found)
        assert not {(s.shard, s.segment_id) for s in plan.remove} & named

    def test_a_segment_of_another_shard_is_another(self) -> None:
        found = StoredSegment(SHARD, "ab" * 32, 1, 0.0)
        elsewhere = Shard(SHARD.namespace, 1, 2)
        assert plan_collection([found], {(elsewhere, "ab" * 32)}, NOW, 0).remove == (found,)

    def test_a_file_from_the_future_stays(self) -> None:
        found = StoredSegment(SHARD, "ab" * 32, 1, NOW + 5)
        assert plan_collection([found], set(), NOW, 0).remove == ()


class TestSweep:
    @pytest.mark.parametrize("count", [1, 2, 3, 100])
    def test_every_segment_comes_once_a_round(self, root: Path, count: int) -> None:
        sweep = Sweep()
        with DiskStore.open(root, lock=False) as store:
            for _ in range(2):
                found: list[str] = []
                last = False
                while not last:
                    part, last = sweep.next(store, count)
                    assert len(part) <= count
                    found += [segment.segment_id for segment in part]
                assert sorted(found) == sorted(s.segment_id for s in store.iter_segments())


class TestCommand:
    def test_orphans_go_and_the_rest_stays(
        self, root: Path, manifests: list[Manifest], orphans: list[SampleSegment]
    ) -> None:
        result = run("--dir", str(root), "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["segments"] == len(orphans)
        assert report["bytes"] == sum(segment.header.file_length for segment in orphans)
        assert keys(root) == named_by(manifests)
        assert report["named"] == len(named_by(manifests))
        assert report["directories"] >= 3  # the other namespace, its rank, its fan-out
        assert not (root / "segments" / ("ee" * 32)).exists()
        again = json.loads(run("--dir", str(root), "--json", "--grace", "0").stdout)
        assert (again["segments"], again["directories"]) == (0, 0)

    def test_a_dry_run_says_the_same_and_changes_nothing(self, root: Path) -> None:
        before = contents(root)
        result = run("--dir", str(root), "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        assert contents(root) == before
        with DiskStore.open(root) as store:
            # As a server has it.
            catalog = Catalog.open(store.catalog_path, store)
            before = contents(root)
            beside = run("--dir", str(root), "--dry-run", "--json")
            assert contents(root) == before
            catalog.close()
        assert beside.stdout == result.stdout
        dry, wet = (json.loads(result.stdout), json.loads(run("--dir", str(root), "--json").stdout))
        for name in ("segments", "bytes", "young", "named"):
            assert dry[name] == wet[name]

    def test_what_is_young_stays(self, root: Path, orphans: list[SampleSegment]) -> None:
        report = json.loads(run("--dir", str(root), "--json", "--grace", "1000000").stdout)
        assert (report["segments"], report["named"]) == (0, 0)
        young = Layout(root).segment(orphans[0].header.shard, orphans[0].segment_id)
        age(young, 10)
        report = json.loads(run("--dir", str(root), "--json").stdout)
        assert (report["segments"], report["young"]) == (len(orphans) - 1, 1)
        assert young.exists()

    def test_a_store_in_use_is_refused_and_left(self, root: Path) -> None:
        with DiskStore.open(root):
            before = contents(root)
            result = run("--dir", str(root))
            assert result.exit_code == 2
            assert "another server uses" in result.output
            assert contents(root) == before

    def test_no_store_is_told_and_not_made(self, tmp_path: Path) -> None:
        for extra in ([], ["--dry-run"]):
            result = run("--dir", str(tmp_path / "none"), *extra)
            assert result.exit_code == 2
            assert "is no snapshot store" in result.output
        assert not (tmp_path / "none").exists()

    def test_temporary_files_go(self, root: Path) -> None:
        left = root / "manifests" / ".x.0123.tmp"
        left.write_bytes(b"half")
        report = json.loads(run("--dir", str(root), "--json").stdout)
        assert report["temporary_files"] == 1
        assert not left.exists()

    def test_people_are_told_too(self, root: Path, orphans: list[SampleSegment]) -> None:
        output = run("--dir", str(root)).output
        assert f"{len(orphans)} segments removed" in output
        assert "empty directories removed" in output


class TestDamage:
    """A manifest that cannot be read may be repaired: what it stands on waits for that."""

    @pytest.mark.parametrize("damage", ["flipped", "rotted", "truncated", "emptied"])
    def test_segments_of_a_damaged_manifest_stay(
        self, root: Path, manifests: list[Manifest], damage: str
    ) -> None:
        for path in (root / "manifests").rglob("*.json"):
            DAMAGES[damage](path)
        for _ in range(2):
            assert run("--dir", str(root), "--grace", "0").exit_code == 0
            assert named_by(manifests) <= keys(root)

    def test_even_when_the_catalog_is_lost_with_it(
        self, root: Path, manifests: list[Manifest]
    ) -> None:
        for path in (root / "manifests").rglob("*.json"):
            data = bytearray(path.read_bytes())
            data[3] ^= 1  # no digest of a segment
            path.write_bytes(data)
        remove_catalog(root)
        for _ in range(2):
            assert run("--dir", str(root), "--grace", "0").exit_code == 0
            assert named_by(manifests) <= keys(root)
        # Given up, it holds nothing any more.
        for path in (root / "quarantine").iterdir():
            path.unlink()
        assert run("--dir", str(root), "--grace", "0").exit_code == 0
        assert keys(root) == set()

    def test_segments_of_a_newer_manifest_stay(
        self, root: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remove_catalog(root)
        monkeypatch.setattr("engram.snapshot.manifest.VERSION", 0)
        assert run("--dir", str(root), "--grace", "0").exit_code == 0
        assert keys(root) == named_by(manifests)

    def test_a_manifest_that_the_catalog_does_not_know_counts(
        self, root: Path, manifests: list[Manifest]
    ) -> None:
        with DiskStore.open(root) as store:
            catalog = Catalog.open(store.catalog_path, store)
            for manifest in manifests:
                catalog.delete(manifest.snapshot_id)
            named = NamedSegments(store, catalog)
            assert all(key in named for key in named_by(manifests))
            catalog.close()


def test_rows_go_when_their_files_have_gone(root: Path, manifests: list[Manifest]) -> None:
    with DiskStore.open(root) as store:
        catalog = Catalog.open(store.catalog_path, store)
        for manifest in manifests:
            store.delete_manifest(manifest.snapshot_id)
            catalog.delete(manifest.snapshot_id)
        rows = catalog.unreferenced_segments()
        assert {(row.shard, row.segment_id) for row in rows} == named_by(manifests)
        assert isinstance(rows[0], UnreferencedSegment)
        early = collect_store(store, catalog, time.time(), 10_000)
        assert (early.segments, early.rows) == (0, 0)
        done = collect_store(store, catalog, time.time(), 3600)
        # A segment that is used in part has a row for each part.
        ends = {(ref.segment_id, ref.end) for m in manifests for ref in m.segments[0]}
        assert done.rows == len(ends) > len(rows)
        assert catalog.unreferenced_segments() == []
        assert list(store.iter_segments()) == []
        catalog.close()


@pytest.mark.parametrize("operation", ["unlink", "fsync_dir", "rmdir"])
def test_a_fault_stops_it_and_no_snapshot_is_hurt(
    root: Path, manifests: list[Manifest], operation: str
) -> None:
    for after in range(3):
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            catalog = Catalog.open(store.catalog_path, store)
            fs.fail(operation, after=after, error=errno.EIO)
            with contextlib.suppress(StoreError):
                # From the second time on there may be too little left to do to meet the fault.
                collect_store(store, catalog, time.time(), 3600)
                assert not fs.fired
            assert fs.fired or after
            for shard, segment_id in named_by(manifests):
                store.verify_segment(shard, segment_id)
            catalog.close()
    assert run("--dir", str(root)).exit_code == 0
    assert keys(root) == named_by(manifests)
