"""Whatever is wrong with a store is found, and told with who suffers; nothing is changed."""

import errno
import json
import os
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engram.catalog.catalog import Catalog
from engram.cli.main import app
from engram.core.canonical import blake3_hex
from engram.core.namespace import Namespace
from engram.snapshot.archive import segments_of
from engram.snapshot.manifest import Manifest, change_manifest, encode_manifest
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.store.reading import open_for_reading
from engram.testing.contracts import put
from engram.testing.faults import FaultyFileSystem
from engram.testing.samples import sample_chain
from engram.testing.tamper import DAMAGES, read_payload, remove_catalog
from engram.upkeep import check as check_module
from engram.upkeep.check import StoreChecker
from unit.upkeep.stores import NAMESPACE, contents, make_large_store, make_store
from unit.upkeep.test_collect import age

ALL = ["talk-main-1", "talk-main-2", "talk-main-3", "talk-other-3"]


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fsck", "--dir", str(root), *arguments])


def checked(root: Path, *arguments: str, healthy: bool) -> dict[str, Any]:
    """The report of `engram fsck --json`; without --repair the store is as it was."""
    before = contents(root)
    result = run(root, "--json", *arguments)
    assert result.exit_code == (0 if healthy else 1), result.output
    if "--repair" not in arguments:
        assert contents(root) == before
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["healthy"] is healthy
    assert bool(report["problems"]) is not healthy
    return report


@pytest.fixture
def manifests(tmp_path: Path, rng: Random) -> list[Manifest]:
    return make_store(tmp_path / "store", rng, ranks=2)


@pytest.fixture
def root(tmp_path: Path, manifests: list[Manifest]) -> Path:
    return tmp_path / "store"


def path_of(root: Path, snapshot_id: str) -> Path:
    (found,) = [
        path
        for path in (root / "manifests").rglob("*.json")
        if path.name == blake3_hex(f"/{snapshot_id}".encode()) + ".json"
    ]
    return found


def segment_path(root: Path, manifest: Manifest, number: int) -> Path:
    return Layout(root).segment(*segments_of(manifest)[number])


@pytest.mark.parametrize("folder", ["manifests", "segments"])
@pytest.mark.parametrize("command", ["fsck", "gc"])
def test_a_directory_that_cannot_be_read_does_not_pass_for_an_empty_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, folder: str, command: str
) -> None:
    lost = next((root / folder).rglob("*.*")).parent

    def failing(listing: Any) -> Any:
        def listed(path: Any = ".") -> Any:
            if Path(path) == lost:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return listing(path)

        return listed

    before = contents(root)
    with monkeypatch.context() as patched:
        for name in ("listdir", "scandir"):
            patched.setattr(os, name, failing(getattr(os, name)))
        done = CliRunner().invoke(app, [command, "--dir", str(root)])
    assert done.exit_code == 2, done.output
    assert f"cannot list {lost}" in done.output
    assert {path: data for path, data in contents(root).items() if path in before} == before


def test_a_whole_store_is_healthy(root: Path, manifests: list[Manifest]) -> None:
    named = {key for manifest in manifests for key in segments_of(manifest)}
    report = checked(root, healthy=True)
    assert (report["manifests"], report["namespaces"], report["segments"]) == (4, 1, len(named))
    assert report["bytes"] == sum(path.stat().st_size for path in root.rglob("*.seg"))
    assert (report["marker"], report["catalog_state"]) == ("intact", "intact")
    assert report["in_use_by"] is None
    for name in ("orphans", "temporary_files", "quarantine", "catalog_differences"):
        assert report[name] == []
    output = run(root).output
    assert "nothing is damaged" in output
    assert f"4 manifests, 1 namespaces, {len(named)} segments" in output


def test_beside_a_running_server(root: Path) -> None:
    with DiskStore.open(root) as store:
        catalog = Catalog.open(store.catalog_path, store)
        report = checked(root, healthy=True)
        assert report["in_use_by"].startswith("process ")
        refused = run(root, "--repair")
        assert refused.exit_code == 2
        assert "another server uses" in refused.output
        catalog.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_segment_is_found_with_the_snapshots_it_hurts(
    root: Path, manifests: list[Manifest], damage: str
) -> None:
    path = segment_path(root, manifests[1], 1)
    DAMAGES[damage](path)
    report = checked(root, healthy=False)
    (problem,) = report["problems"]
    assert (problem["kind"], problem["file"]) == ("segment", str(path))
    # All but the first turn stand on it.
    assert sorted(problem["snapshots"]) == ALL[1:]
    assert problem["quarantined_to"] is None
    assert "talk-main-2" in run(root).output

    repaired = checked(root, "--repair", healthy=False)
    (problem,) = repaired["problems"]
    assert sorted(problem["snapshots"]) == ALL[1:]
    if damage != "deleted":
        assert Path(problem["quarantined_to"]).exists()
        assert not path.exists()
        (held,) = repaired["quarantine"]
        assert held["path"] == problem["quarantined_to"]
        assert sorted(held["snapshots"]) == ALL[1:]
        assert held["reason"]
    after = checked(root, healthy=False)
    assert [sorted(p["snapshots"]) for p in after["problems"]] == [ALL[1:]]
    # The same segment stored again heals them, whatever lies in quarantine.
    seed_store(root, manifests)
    healed = checked(root, healthy=True)
    assert all(held["snapshots"] == [] for held in healed["quarantine"])


def seed_store(root: Path, manifests: list[Manifest]) -> None:
    """Put the segments of `make_store` there again, from a store made alike elsewhere."""
    source = root.parent / "source"
    with DiskStore.open(root, lock=False) as store, DiskStore.open(source, lock=False) as other:
        for manifest in manifests:
            for shard, segment_id in segments_of(manifest):
                if not store.has_segment(shard, segment_id):
                    header, payload = read_payload(other, shard, segment_id)
                    store.put_segment(header, memoryview(payload), segment_id)


@pytest.fixture(autouse=True)
def copy_of_the_store(root: Path) -> None:
    shutil.copytree(root, root.parent / "source")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest(root: Path, damage: str) -> None:
    path = path_of(root, "talk-main-2")
    DAMAGES[damage](path)
    if damage == "deleted":
        # That is how a snapshot is removed; only its row is left.
        report = checked(root, healthy=True)
        assert report["catalog_differences"] == [
            {"tenant": "", "snapshot_id": "talk-main-2", "what": "is listed, and has no manifest"}
        ]
        return
    report = checked(root, healthy=False)
    (problem,) = report["problems"]
    assert (problem["kind"], problem["file"]) == ("manifest", str(path))
    assert problem["snapshots"] == ["talk-main-2"]
    for arguments in (["--repair"], []):
        report = checked(root, *arguments, healthy=False)
        (problem,) = report["problems"]
        assert problem["snapshots"] == ["talk-main-2"]
        assert Path(problem["quarantined_to"]).exists()
        assert report["quarantine"][0]["snapshots"] == ["talk-main-2"]
    # Its segments wait for a repair, so that none is an orphan.
    for segment in root.rglob("*.seg"):
        age(segment, 10_000)
    assert checked(root, healthy=False)["orphans"] == []


@pytest.mark.parametrize("damage", ["flipped", "emptied", "deleted"])
def test_a_damaged_namespace(root: Path, damage: str) -> None:
    DAMAGES[damage](Layout(root).namespace(NAMESPACE.id))
    report = checked(root, healthy=False)
    (problem,) = report["problems"]
    assert problem["kind"] == "namespace"
    checked(root, "--repair", healthy=False)
    with DiskStore.open(root) as store:
        store.put_namespace(NAMESPACE)
    checked(root, healthy=True)


@pytest.mark.parametrize("damage", ["flipped", "emptied", "deleted"])
def test_a_damaged_marker(root: Path, damage: str) -> None:
    DAMAGES[damage](Layout(root).marker)
    report = checked(root, healthy=False)
    (problem,) = report["problems"]
    assert problem["kind"] == "marker"
    assert report["marker"] == ("missing" if damage == "deleted" else "damaged")
    # Found damaged, it is told once more; then it is whole.
    checked(root, "--repair", healthy=False)
    checked(root, healthy=True)


def forge(root: Path, snapshot_id: str, **changes: Any) -> None:
    """Another manifest in a snapshot's place, rightly sealed."""
    with DiskStore.open(root, lock=False) as store:
        manifest = store.get_manifest(snapshot_id)
    path_of(root, snapshot_id).write_bytes(encode_manifest(change_manifest(manifest, **changes)))


def other_ref(manifest: Manifest, number: int, **changes: Any) -> tuple[Any, ...]:
    chain = [ref.model_dump() for ref in manifest.segments[0]]
    chain[number] |= changes
    return (tuple(chain), *manifest.segments[1:])


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        (lambda m: {"tokens_digest": "00" * 32}, "the tokens of its segments are not those"),
        (lambda m: {"pending_tokens": (5,)}, "the tokens of its segments are not those"),
        (lambda m: {"segments": other_ref(m, 0, key="00" * 32)}, "key is"),
        (
            lambda m: {
                "segments": other_ref(m, 0, bytes=m.segments[0][0].bytes + 1),
                "bytes": m.bytes + 1,
            },
            "bytes is",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_its_segments(
    root: Path,
    manifests: list[Manifest],
    forgery: Callable[[Manifest], dict[str, Any]],
    said: str,
) -> None:
    """All digests are right: only what stands in the files does not agree."""
    forge(root, "talk-main-2", **forgery(manifests[1]))
    report = checked(root, healthy=False)
    problems = [p for p in report["problems"] if p["kind"] == "snapshot"]
    (problem,) = problems
    assert problem["snapshots"] == ["talk-main-2"]
    assert said in problem["what"]


def test_a_chain_on_another_parent(root: Path, manifests: list[Manifest], rng: Random) -> None:
    """A segment of the same place, but of another conversation."""
    strange = sample_chain(rng, (5, 3), shard=Shard(NAMESPACE.id, 0, 2))
    with DiskStore.open(root, lock=False) as store:
        for segment in strange:
            put(store, segment)
    chains = [list(chain) for chain in manifests[1].segments]
    chains[0][0] = strange[0].ref
    forge(root, "talk-main-2", segments=chains, bytes=sum(r.bytes for c in chains for r in c))
    (problem,) = checked(root, healthy=False)["problems"]
    assert "parent is" in problem["what"]


def test_a_segment_in_the_place_of_another(root: Path, manifests: list[Manifest]) -> None:
    first, second = (segment_path(root, manifests[1], n) for n in (0, 1))
    second.write_bytes(first.read_bytes())
    (problem,) = checked(root, healthy=False)["problems"]
    assert problem["file"] == str(second)
    assert "named after" in problem["what"]


def test_two_manifests_of_one_turn(root: Path, manifests: list[Manifest]) -> None:
    double = change_manifest(manifests[0], snapshot_id="double")
    with DiskStore.open(root) as store:
        store.put_manifest(double)
    (problem,) = checked(root, healthy=False)["problems"]
    assert "same conversation, branch and turn" in problem["what"]


class TestCatalog:
    def test_a_missing_one_is_no_damage_and_is_made(self, root: Path) -> None:
        remove_catalog(root)
        assert checked(root, healthy=True)["catalog_state"] == "missing"
        report = checked(root, "--repair", healthy=True)
        assert report["catalog_opened"]["added"] == 4
        assert checked(root, healthy=True)["catalog_state"] == "intact"

    def test_a_damaged_one_is_built_anew(self, root: Path) -> None:
        Layout(root).catalog.write_bytes(b"no database" * 1000)
        (problem,) = checked(root, healthy=False)["problems"]
        assert problem["kind"] == "catalog"
        report = checked(root, "--repair", healthy=False)
        assert report["catalog_opened"]["rebuilt_because"]
        assert checked(root, healthy=True)["catalog_state"] == "intact"

    def test_a_row_more_and_a_row_less_are_told_and_mended(
        self, root: Path, manifests: list[Manifest]
    ) -> None:
        with DiskStore.open(root) as store:
            catalog = Catalog.open(store.catalog_path, store)
            catalog.delete("talk-main-1")
            catalog.close()
            store.delete_manifest("talk-main-3")
        report = checked(root, healthy=True)
        assert report["catalog_state"] == "differs"
        assert [(d["snapshot_id"], d["what"]) for d in report["catalog_differences"]] == [
            ("talk-main-1", "is not listed"),
            ("talk-main-3", "is listed, and has no manifest"),
        ]
        assert "is not listed" in run(root).output
        report = checked(root, "--repair", healthy=True)
        assert (report["catalog_opened"]["added"], report["catalog_opened"]["removed"]) == (1, 1)
        assert checked(root, healthy=True)["catalog_state"] == "intact"

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE snapshot_segments SET segment = (SELECT max(id) FROM segments)"
            " WHERE rank = 0 AND position = 0",
            "DELETE FROM snapshot_segments WHERE position = 1",
        ],
    )
    def test_wrong_values_that_no_start_would_see(self, root: Path, change: str) -> None:
        connection = sqlite3.connect(Layout(root).catalog)
        connection.execute(change)
        connection.commit()
        connection.close()
        report = checked(root, healthy=True)
        assert report["catalog_state"] == "differs"
        assert "other values" in report["catalog_differences"][0]["what"]
        report = checked(root, "--repair", healthy=True)
        assert "are not what the manifests say" in report["catalog_opened"]["rebuilt_because"]
        assert checked(root, healthy=True)["catalog_state"] == "intact"


class TestLeftovers:
    def test_orphans_and_temporary_files_are_no_damage(self, root: Path, rng: Random) -> None:
        (orphan,) = sample_chain(rng, (4,), shard=Shard(NAMESPACE.id, 0, 1))[:1]
        with DiskStore.open(root, lock=False) as store:
            put(store, orphan)
        assert checked(root, healthy=True)["orphans"] == []  # a save may be about to name it
        path = Layout(root).segment(orphan.header.shard, orphan.segment_id)
        age(path, 10_000)
        left = root / "segments" / ".x.tmp"
        left.write_bytes(b"half")
        report = checked(root, healthy=True)
        assert report["orphans"] == [{"file": str(path), "bytes": orphan.header.file_length}]
        assert report["temporary_files"] == [str(left)]
        output = run(root).output
        assert "1 segments are named by nothing" in output
        assert "1 temporary files" in output
        report = checked(root, "--repair", healthy=True)
        assert (report["removed_temps"], report["temporary_files"]) == (1, [])
        assert path.exists()  # gc's work

    def test_a_damaged_orphan_hurts_nobody_and_is_damage(self, root: Path, rng: Random) -> None:
        (orphan,) = sample_chain(rng, (4,), shard=Shard(NAMESPACE.id, 0, 1))[:1]
        with DiskStore.open(root, lock=False) as store:
            put(store, orphan)
        DAMAGES["flipped"](Layout(root).segment(orphan.header.shard, orphan.segment_id))
        (problem,) = checked(root, healthy=False)["problems"]
        assert problem["snapshots"] == []

    def test_a_note_that_is_lost(self, root: Path) -> None:
        with DiskStore.open(root) as store:
            (root / "stray").write_bytes(b"x")
            moved = store.quarantine_file(root / "stray", "for the test")
        assert moved is not None
        (held,) = checked(root, healthy=True)["quarantine"]
        assert (held["file"], held["reason"]) == (str(root / "stray"), "for the test")
        assert held["quarantined_at"] > 0
        for damage in (b"{", b"[]", b"\xff", b'{"reason": 5}'):
            moved.with_name(moved.name + ".reason.json").write_bytes(damage)
            (held,) = checked(root, healthy=True)["quarantine"]
            assert (held["reason"], held["bytes"]) == ("", 1)
        assert "its note is lost" in run(root).output


class TestBesideOthers:
    """What disappears while the check runs was deleted, and is no damage."""

    @pytest.fixture
    def checker(self, root: Path) -> StoreChecker:
        return StoreChecker(open_for_reading(root), repair=False, marker="intact")

    def test_a_snapshot_that_is_deleted_meanwhile(
        self, root: Path, checker: StoreChecker, manifests: list[Manifest]
    ) -> None:
        last = manifests[2]
        own = set(segments_of(last)) - {k for m in manifests if m != last for k in segments_of(m)}
        with DiskStore.open(root) as store:
            store.delete_manifest(last.snapshot_id)
            for shard, segment_id in own:
                store.delete_segment(shard, segment_id)
        assert own
        check = checker.run()
        assert check.problems == []
        assert check.manifests == 3

    def test_a_snapshot_deleted_between_its_manifest_and_its_segments(
        self,
        root: Path,
        checker: StoreChecker,
        manifests: list[Manifest],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        last = manifests[2]
        store = DiskStore.open(root)
        real = StoreChecker._has

        def late(self: StoreChecker, key: tuple[Shard, str]) -> bool:
            # The checker has read the manifest; now it goes, and what only it named.
            store.delete_manifest(last.snapshot_id)
            store.delete_segment(*segments_of(last)[2])
            self._links.pop(segments_of(last)[2], None)
            return real(self, key)

        monkeypatch.setattr(StoreChecker, "_has", late)
        assert checker.run().problems == []
        store.close()

    def test_a_segment_that_was_written_after_the_listing(
        self, root: Path, manifests: list[Manifest]
    ) -> None:
        path = segment_path(root, manifests[0], 0)
        data = path.read_bytes()
        path.unlink()
        checker = StoreChecker(open_for_reading(root), repair=False, marker="intact")
        path.write_bytes(data)
        assert checker.run().problems == []

    def test_the_same_segment_missing_is_damage(
        self, root: Path, checker: StoreChecker, manifests: list[Manifest]
    ) -> None:
        segment_path(root, manifests[0], 0).unlink()
        (problem,) = checker.run().problems
        assert "is missing" in problem.what


def test_what_the_device_cannot_read_is_told_and_the_rest_is_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_for_reading(root)
    faulty = FaultyFileSystem().fail("read_into", after=1)
    monkeypatch.setattr(store, "_fs", faulty)
    check = StoreChecker(store, repair=False, marker="intact").run()
    assert faulty.fired
    assert [problem.kind.value for problem in check.problems] == ["segment"]
    assert "cannot read" in check.problems[0].what


def test_tokens_are_forgotten_when_there_are_many(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "MAX_TOKEN_BYTES", 24)
    checked(root, healthy=True)
    forge(root, "talk-main-3", tokens_digest="00" * 32)
    checked(root, healthy=False)


def test_no_store_and_a_newer_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in ([], ["--repair"]):
        result = run(tmp_path / "none", *extra)
        assert result.exit_code == 2
        assert "is no snapshot store" in result.output
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("engram.store.marker.FORMAT", 0)
    before = contents(root)
    for extra in ([], ["--repair"]):
        result = run(root, *extra)
        assert result.exit_code == 2
        assert "format version 1" in result.output
    assert contents(root) == before


def test_another_namespace_than_the_file_is_named_after(root: Path) -> None:
    Layout(root).namespace(NAMESPACE.id).write_bytes(Namespace({"other": 1}).canonical)
    (problem,) = checked(root, healthy=False)["problems"]
    assert problem["kind"] == "namespace"


def test_no_segment_is_ever_whole_in_memory_nor_left_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = make_large_store(tmp_path / "large")
    dropped: list[int] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append(length)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    tracemalloc.start()
    check = StoreChecker(open_for_reading(tmp_path / "large"), repair=False, marker="intact").run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (check.problems, check.segments) == ([], 1)
    assert peak < size // 3
    assert sum(dropped) >= size
