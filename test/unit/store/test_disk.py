"""The disk store beyond the contracts: opening, healing, quarantine, faults, paths."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from blake3 import blake3

from engram.core.namespace import Namespace
from engram.errors import (
    EngramError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    SegmentCorruptError,
    StoreBusyError,
    StoreError,
    StoreFormatError,
    StoreFullError,
)
from engram.snapshot.envelope import seal_record
from engram.snapshot.listing import DamagedManifest
from engram.snapshot.manifest import Manifest, change_manifest, encode_manifest
from engram.snapshot.segment import Shard
from engram.store import quarantine
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.inspection import lock_holder
from engram.store.layout import Layout
from engram.testing.contracts import put, read
from engram.testing.faults import WRITE_OPERATIONS, FaultyFileSystem
from engram.testing.samples import (
    SHARD,
    SampleSegment,
    sample_chain,
    sample_manifest,
    sample_segment,
    seeded_random,
)

NAMESPACE = Namespace({"model": "m", "page_size": 1})


def files(root: Path, below: str = "") -> dict[str, bytes]:
    """Every file below a folder of the store, by its path, but for the lock and the reserve."""
    own = {"lock", "reserve"}
    found = (p for p in (root / below).rglob("*") if p.is_file() and p.name not in own)
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def segment() -> SampleSegment:
    return sample_segment(seeded_random())


def test_the_layout_on_disk_is_the_documented_one(root: Path) -> None:
    chain = sample_chain(seeded_random(), (3,))
    manifest = sample_manifest([chain])
    with DiskStore.open(root) as store:
        store.put_namespace(NAMESPACE)
        put(store, chain[0])
        store.put_manifest(manifest)
    segment_id = chain[0].segment_id
    written = files(root)
    (manifest_path,) = [path for path in written if path.startswith("manifests/")]
    name = Path(manifest_path).name
    assert set(written) == {
        "engram-store.json",
        f"namespaces/{NAMESPACE.id}.json",
        f"segments/{SHARD.namespace}/rank-0-of-1/{segment_id[:2]}/{segment_id}.seg",
        f"manifests/{name[:2]}/{name}",
    }
    assert written[f"namespaces/{NAMESPACE.id}.json"] == NAMESPACE.canonical
    assert written[manifest_path] == encode_manifest(manifest)
    seg = f"segments/{SHARD.namespace}/rank-0-of-1/{segment_id[:2]}/{segment_id}.seg"
    assert written[seg] == chain[0].file
    assert json.loads(written["engram-store.json"])["body"]["format"] == 1
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_store_is_found_again(root: Path, segment: SampleSegment) -> None:
    with DiskStore.open(root) as store:
        put(store, segment)
        assert not store.marker_rebuilt
    with DiskStore.open(root) as store:
        assert read(store, segment) == (segment.header, segment.payload)
        assert (store.marker_rebuilt, store.removed_temps) == (False, 0)


class TestLock:
    def test_a_second_server_is_refused_and_told_who_holds_it(self, root: Path) -> None:
        with DiskStore.open(root):
            with pytest.raises(StoreBusyError, match=f"process {os.getpid()}") as caught:
                DiskStore.open(root)
            assert caught.value.hint
        DiskStore.open(root).close()

    def test_a_rank_needs_no_lock_and_writes_no_manifest(
        self, root: Path, segment: SampleSegment
    ) -> None:
        manifest = sample_manifest([[segment]])
        with DiskStore.open(root) as server:
            rank = DiskStore.open(root, lock=False)
            put(rank, segment)
            assert read(server, segment)[1] == segment.payload
            with pytest.raises(InternalError, match="lock"):
                rank.put_manifest(manifest)
            with pytest.raises(InternalError, match="lock"):
                rank.delete_manifest(manifest.snapshot_id)
            server.put_manifest(manifest)
        with pytest.raises(InternalError, match="lock"):
            server.delete_manifest(manifest.snapshot_id)
        server.close()

    def test_the_lock_ends_with_a_killed_process(self, root: Path) -> None:
        program = (
            "import sys, time; from engram.store.disk import DiskStore;"
            "store = DiskStore.open(sys.argv[1]); print('held', flush=True); time.sleep(60)"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreBusyError, match=f"process {holder.pid} "):
                DiskStore.open(root)
        finally:
            holder.kill()
            holder.wait(30)
            holder.stdout.close()
        DiskStore.open(root).close()

    def test_a_removed_lock_file_lets_nobody_in(self, root: Path) -> None:
        """Whoever takes it for a stale one would make two servers write one store."""
        with DiskStore.open(root):
            (root / "lock").unlink()
            with pytest.raises(StoreBusyError):
                DiskStore.open(root)
            assert lock_holder(root) == "unknown"
            (root / "lock").write_bytes(b"\xff" * 300)
            with pytest.raises(StoreBusyError):
                DiskStore.open(root)
        with DiskStore.open(root):
            assert f"process {os.getpid()}" in (root / "lock").read_text()
        assert lock_holder(root) is None

    def test_a_full_disk_leaves_the_holder_unnamed_and_the_store_usable(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            store = DiskStore.open(root)
        with store, pytest.raises(StoreBusyError, match="unknown"):
            DiskStore.open(root)
        DiskStore.open(root).close()

    def test_a_failed_open_gives_the_lock_back(self, root: Path) -> None:
        with pytest.raises(StoreError):
            DiskStore.open(root, fs=FaultyFileSystem().fail("rename"))
        DiskStore.open(root).close()


class TestMarker:
    @pytest.mark.parametrize(
        "damaged",
        [
            b"",
            b"{}",
            b"garbage",
            b'{"format":1}',
            seal_record({"format": 1, "created_at": 1.5}).replace(b"1.5", b"1.6"),
            seal_record({"format": 1, "created_at": 1.5}).replace(b'"format":1', b'"format":9'),
            seal_record({"format": "1"}),
            seal_record({"format": True}),
            seal_record({}),
        ],
    )
    def test_a_damaged_marker_is_rebuilt_and_told(
        self, root: Path, segment: SampleSegment, damaged: bytes
    ) -> None:
        with DiskStore.open(root) as store:
            put(store, segment)
        (root / "engram-store.json").write_bytes(damaged)
        with DiskStore.open(root) as store:
            assert store.marker_rebuilt
            assert read(store, segment)[1] == segment.payload
            assert store.stats().quarantined == 1
        with DiskStore.open(root) as store:
            assert not store.marker_rebuilt

    def test_a_missing_marker_of_a_used_store_is_rebuilt_and_told(
        self, root: Path, segment: SampleSegment
    ) -> None:
        with DiskStore.open(root) as store:
            put(store, segment)
        (root / "engram-store.json").unlink()
        with DiskStore.open(root) as store:
            assert store.marker_rebuilt

    @pytest.mark.parametrize("lock", [True, False])
    def test_a_newer_store_is_refused_by_name_and_left_alone(self, root: Path, lock: bool) -> None:
        DiskStore.open(root).close()
        (root / "engram-store.json").write_bytes(seal_record({"format": 2, "more": "things"}))
        before = files(root)
        with pytest.raises(StoreFormatError, match="has format version 2") as caught:
            DiskStore.open(root, lock=lock)
        assert str(root) in caught.value.message
        assert files(root) == before

    def test_a_rank_does_not_write_the_marker(self, root: Path) -> None:
        DiskStore.open(root, lock=False)
        assert not (root / "engram-store.json").exists()


class TestOpening:
    def test_what_a_crash_left_half_written_is_removed(
        self, root: Path, segment: SampleSegment
    ) -> None:
        with DiskStore.open(root) as store:
            put(store, segment)
        shelf = Layout(root).segment(SHARD, segment.segment_id).parent
        for path in (shelf / ".x.seg.0123.tmp", root / ".engram-store.json.45.tmp"):
            path.write_bytes(b"half")
        DiskStore.open(root, lock=False)
        assert len(list(root.rglob("*.tmp"))) == 2
        with DiskStore.open(root) as store:
            assert store.removed_temps == 2
            assert read(store, segment)[1] == segment.payload
        assert list(root.rglob("*.tmp")) == []

    def test_the_directory_is_made_durably_with_its_parents(self, tmp_path: Path) -> None:
        fs = FaultyFileSystem()
        DiskStore.open(tmp_path / "a" / "store", fs=fs).close()
        assert fs.calls[:4] == [
            ("mkdir", "a"),
            ("fsync_dir", tmp_path.name),
            ("mkdir", "store"),
            ("fsync_dir", "a"),
        ]

    @pytest.mark.parametrize("below", ["", "deeper"])
    def test_a_file_in_the_place_of_the_directory(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match="is not a directory"):
            DiskStore.open(tmp_path / "file" / below)

    def test_a_relative_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with DiskStore.open("snapshots") as store:
            assert store.root == tmp_path / "snapshots"


class TestQuarantine:
    def test_a_damaged_file_is_kept_with_the_reason(
        self, root: Path, segment: SampleSegment
    ) -> None:
        with DiskStore.open(root) as store:
            put(store, segment)
            path = Layout(root).segment(SHARD, segment.segment_id)
            damaged = bytearray(segment.file)
            damaged[-40] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(SegmentCorruptError) as caught:
                read(store, segment)
            details = caught.value.details
            assert details["file"] == str(path)
            assert details["segment_id"] == segment.segment_id
            moved_to = Path(str(details["quarantined_to"]))
            assert moved_to.parent == root / "quarantine"
            assert moved_to.read_bytes() == damaged
            note = json.loads(moved_to.with_name(moved_to.name + ".reason.json").read_bytes())
            assert note["file"] == str(path)
            assert "digest" in note["reason"]
            assert str(moved_to) in caught.value.message
            assert store.stats().quarantined == 1
            assert not path.exists()

    @pytest.mark.parametrize("fail_op", ["mkdir", "rename"])
    def test_damage_is_reported_even_if_it_cannot_be_moved(
        self, root: Path, segment: SampleSegment, fail_op: str
    ) -> None:
        DiskStore.open(root).close()
        put(DiskStore.open(root, lock=False), segment)
        path = Layout(root).segment(SHARD, segment.segment_id)
        path.write_bytes(segment.file[:-1])
        store = DiskStore.open(root, lock=False, fs=FaultyFileSystem().fail(fail_op))
        with pytest.raises(SegmentCorruptError, match="is damaged") as caught:
            read(store, segment)
        assert caught.value.details["quarantined_to"] is None

    def test_the_oldest_files_give_way_beyond_the_bounds(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quarantine, "MAX_FILES", 3)
        monkeypatch.setattr(quarantine, "MAX_BYTES", 100)
        with DiskStore.open(root) as store:

            def take(name: str, size: int) -> None:
                (root / name).write_bytes(b"x" * size)
                assert store.quarantine_file(root / name, "for the test") is not None

            for number in range(5):
                take(f"file-{number}", 10)
            assert store.quarantined_names() == {"file-2", "file-3", "file-4"}
            assert store.health().quarantined_bytes == 30
            take("larger", 85)
            assert store.quarantined_names() == {"file-4", "larger"}
            take("larger than all", 1000)
            assert store.quarantined_names() == {"larger than all"}, "the newest is kept"
            held = [path.name for path in (root / "quarantine").iterdir()]
            assert len(held) == 2, "notes go with their files"

    @pytest.mark.parametrize("late", [False, True])
    def test_a_file_put_back_meanwhile_is_not_moved_away(
        self, root: Path, segment: SampleSegment, late: bool
    ) -> None:
        layout = Layout(root)

        def replace(path: Path) -> None:
            replacement = path.with_name("replacement")
            replacement.write_bytes(segment.file)
            replacement.replace(path)

        class Healing(FileSystem):
            """Another process replaces the damaged file while it is open here, or as it is moved
            away."""

            def open_read(self, path: Path) -> int:
                fd = super().open_read(path)
                if path.suffix == ".seg" and not late:
                    replace(path)
                return fd

            def rename(self, source: Path, target: Path) -> None:
                if source.suffix == ".seg" and target.parent == layout.quarantine and late:
                    replace(source)
                super().rename(source, target)

        with DiskStore.open(root) as store:
            put(store, segment)
        path = layout.segment(SHARD, segment.segment_id)
        path.write_bytes(segment.file[:-1])
        with pytest.raises(SegmentCorruptError):
            read(DiskStore.open(root, lock=False, fs=Healing()), segment)
        assert read(DiskStore.open(root, lock=False), segment)[1] == segment.payload
        assert not layout.quarantine.exists() or not list(layout.quarantine.iterdir())

    @pytest.mark.parametrize("listed", [False, True])
    def test_a_manifest_written_again_meanwhile_is_not_moved_away(
        self, root: Path, segment: SampleSegment, listed: bool
    ) -> None:
        """Whoever is told that a snapshot is damaged may delete it and save the turn again."""
        manifest = sample_manifest([[segment]])
        again: list[Manifest] = []

        class Saving(FileSystem):
            def open_read(self, path: Path) -> int:
                fd = super().open_read(path)
                if again:
                    store.delete_manifest(manifest.snapshot_id)
                    store.put_manifest(again.pop())
                return fd

        with DiskStore.open(root, fs=Saving()) as store:
            entry = store.put_manifest(manifest)
            path = Layout(root).manifest(entry.name)
            path.write_bytes(path.read_bytes()[:-1])
            again.append(manifest)
            if listed:
                assert store.load_manifest(entry) == manifest
            else:
                assert store.get_manifest(manifest.snapshot_id) == manifest
            assert path.exists()

    def test_a_segment_in_the_directory_of_another_shard(
        self, root: Path, segment: SampleSegment
    ) -> None:
        elsewhere = Shard(SHARD.namespace, 1, 2)
        path = Layout(root).segment(elsewhere, segment.segment_id)
        with DiskStore.open(root) as store:
            path.parent.mkdir(parents=True)
            path.write_bytes(segment.file)
            with pytest.raises(SegmentCorruptError, match="directory of another shard"):
                store.verify_segment(elsewhere, segment.segment_id)
            assert not path.exists()

    def test_a_segment_sealed_with_bytes_in_its_padding(
        self, root: Path, segment: SampleSegment
    ) -> None:
        """No writer of ours makes it. Its digest is right, but the format is closed."""
        body = bytearray(segment.file[:-32])
        (start, _), *_ = segment.header.gaps()
        body[len(segment.header.prefix) + start] = 1
        segment_id = blake3(body).hexdigest()
        path = Layout(root).segment(SHARD, segment_id)
        with DiskStore.open(root) as store:
            for attempt in (
                lambda: store.verify_segment(SHARD, segment_id),
                lambda: store.read_segment(
                    SHARD, segment_id, lambda h: memoryview(bytearray(h.payload_length))
                ),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body + bytes.fromhex(segment_id))
                with pytest.raises(SegmentCorruptError, match="between its buffers"):
                    attempt()
                assert not path.exists()

    def test_a_damaged_namespace_is_rewritten(self, root: Path) -> None:
        with DiskStore.open(root) as store:
            store.put_namespace(NAMESPACE)
            path = Layout(root).namespace(NAMESPACE.id)
            for damaged in (b"", b"{}", NAMESPACE.canonical + b" ", b"\xff"):
                path.write_bytes(damaged)
                with pytest.raises(NotFoundError, match="damaged"):
                    store.get_namespace(NAMESPACE.id)
                assert not path.exists()
                path.write_bytes(damaged)
                store.put_namespace(NAMESPACE)
                assert store.get_namespace(NAMESPACE.id) == NAMESPACE


class TestNewerVersions:
    def newer(self, segment: SampleSegment) -> bytes:
        body = bytearray(segment.file[:-32])
        body[8] = 2
        return bytes(body)

    def test_an_intact_segment_of_a_newer_version_is_refused_and_stays(
        self, root: Path, segment: SampleSegment
    ) -> None:
        body = self.newer(segment)
        segment_id = blake3(body).hexdigest()
        path = Layout(root).segment(SHARD, segment_id)
        with DiskStore.open(root) as store:
            path.parent.mkdir(parents=True)
            path.write_bytes(body + bytes.fromhex(segment_id))
            with pytest.raises(StoreFormatError, match="a segment has format version 2"):
                store.verify_segment(SHARD, segment_id)
            assert path.exists()

    def test_a_damaged_version_number_is_damage(self, root: Path, segment: SampleSegment) -> None:
        with DiskStore.open(root) as store:
            put(store, segment)
            path = Layout(root).segment(SHARD, segment.segment_id)
            path.write_bytes(self.newer(segment) + segment.file[-32:])
            with pytest.raises(SegmentCorruptError, match="version is damaged"):
                read(store, segment)
            assert not path.exists()

    def test_an_intact_manifest_of_a_newer_version_is_reported_and_stays(
        self, root: Path, segment: SampleSegment
    ) -> None:
        with DiskStore.open(root) as store:
            entry = store.put_manifest(sample_manifest([[segment]]))
            path = Layout(root).manifest(entry.name)
            path.write_bytes(seal_record({"version": 2}))
            (found,) = store.iter_manifests()
            assert isinstance(found, DamagedManifest)
            assert found.quarantined_to is None
            assert "version 2" in found.reason
            assert path.exists()
            with pytest.raises(StoreFormatError):
                store.get_manifest("snap-1")


class TestFaults:
    """After any failed operation the store is as before, and the next attempt succeeds."""

    @pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
    @pytest.mark.parametrize("fail_op", WRITE_OPERATIONS)
    def test_put_segment(
        self, root: Path, segment: SampleSegment, fail_op: str, error: int
    ) -> None:
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            before = files(root)
            # Four directories are made and synced; the fifth sync is the one after the rename.
            fs.fail(fail_op, after=4 if fail_op == "fsync_dir" else 0, error=error)
            with pytest.raises(StoreError) as caught:
                put(store, segment)
            assert fs.fired
            assert isinstance(caught.value, StoreFullError) == (error == errno.ENOSPC)
            if fail_op == "fsync_dir":
                # Whole, valid and named by nobody: an orphan the collector may remove.
                assert list(files(root, "segments").values()) == [segment.file]
            else:
                assert files(root) == before
            put(store, segment)
            assert read(store, segment)[1] == segment.payload

    @pytest.mark.parametrize("directory", range(4))
    def test_put_segment_with_a_directory_that_cannot_be_synced(
        self, root: Path, segment: SampleSegment, directory: int
    ) -> None:
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            before = files(root)
            fs.fail("fsync_dir", after=directory)
            with pytest.raises(StoreError, match="fsync directory"):
                put(store, segment)
            assert files(root) == before
            fs.calls.clear()
            put(store, segment)
            # Those not known to be durable are synced again, then the file's own directory.
            assert [name for name, _ in fs.calls].count("fsync_dir") == 4 - directory + 1

    def test_a_segment_whose_name_may_not_be_durable_is_synced_by_the_next_put(
        self, root: Path, segment: SampleSegment
    ) -> None:
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            put(store, segment)
            fs.calls.clear()
            put(store, segment)
            assert [call for call in fs.calls if call[0] in WRITE_OPERATIONS] == [
                ("fsync_dir", segment.segment_id[:2])
            ]
            fs.fail("fsync_dir")
            with pytest.raises(StoreError):
                put(store, segment)

    @pytest.mark.parametrize("fail_op", WRITE_OPERATIONS)
    def test_put_manifest(self, root: Path, segment: SampleSegment, fail_op: str) -> None:
        manifest = sample_manifest([[segment]])
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            before = files(root)
            fs.fail(fail_op, after=2 if fail_op == "fsync_dir" else 0, error=errno.ENOSPC)
            with pytest.raises(StoreFullError):
                store.put_manifest(manifest)
            assert fs.fired
            # A save reported as failed never turns up later.
            assert files(root) == before
            assert store.list_manifests() == []
            store.put_manifest(manifest)
            assert store.get_manifest(manifest.snapshot_id) == manifest

    @pytest.mark.parametrize("fail_op", WRITE_OPERATIONS[1:])
    def test_replace_manifest(self, root: Path, segment: SampleSegment, fail_op: str) -> None:
        manifest = sample_manifest([[segment]])
        changed = change_manifest(manifest, pinned=True)
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            store.put_manifest(manifest)
            fs.fail(fail_op)
            with pytest.raises(StoreError):
                store.put_manifest(changed, replace=True)
            assert fs.fired
            assert [path for path in files(root) if path.endswith(".tmp")] == []
            found = store.get_manifest(manifest.snapshot_id)
            assert found == (changed if fail_op == "fsync_dir" else manifest)

    @pytest.mark.parametrize("fail_op", ["unlink", "fsync_dir"])
    def test_deletions(self, root: Path, segment: SampleSegment, fail_op: str) -> None:
        manifest = sample_manifest([[segment]])
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            put(store, segment)
            store.put_manifest(manifest)
            for delete in (
                lambda: store.delete_manifest(manifest.snapshot_id),
                lambda: store.delete_segment(SHARD, segment.segment_id),
            ):
                fs.fail(fail_op)
                with pytest.raises(StoreError):
                    delete()
                delete()
            assert list(files(root)) == ["engram-store.json"]

    @pytest.mark.parametrize("fail_op", ["open_read", "read_into"])
    @pytest.mark.parametrize("after", [0, 1, 2, 3])
    def test_an_unreadable_segment_is_an_error_and_no_damage(
        self, root: Path, segment: SampleSegment, fail_op: str, after: int
    ) -> None:
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            put(store, segment)
            fs.fail(fail_op, after=0 if fail_op == "open_read" else after)
            with pytest.raises(StoreError) as caught:
                read(store, segment)
            assert fs.fired
            assert caught.value.details["errno"] == errno.EIO
            assert read(store, segment)[1] == segment.payload
            assert store.stats().quarantined == 0

    @pytest.mark.parametrize("fail_op", ["open_read", "read_into"])
    def test_an_unreadable_manifest_is_an_error_and_no_damage(
        self, root: Path, segment: SampleSegment, fail_op: str
    ) -> None:
        fs = FaultyFileSystem()
        with DiskStore.open(root, fs=fs) as store:
            manifest = sample_manifest([[segment]])
            store.put_manifest(manifest)
            fs.fail(fail_op)
            with pytest.raises(StoreError):
                store.get_manifest(manifest.snapshot_id)
            assert store.get_manifest(manifest.snapshot_id) == manifest


class TestNamesAreNeverPaths:
    @pytest.mark.parametrize("bad", ["../../etc", "", "AB" * 32, "ab" * 31, "ab" * 32 + "/x"])
    def test_a_digest_that_is_none(self, root: Path, bad: str, segment: SampleSegment) -> None:
        with DiskStore.open(root) as store:
            for attempt in (
                lambda: store.has_segment(SHARD, bad),
                lambda: store.has_segment(Shard(bad, 0, 1), segment.segment_id),
                lambda: store.read_tokens(SHARD, bad),
                lambda: store.delete_segment(SHARD, bad),
                lambda: store.get_namespace(bad),
                lambda: store.put_segment(segment.header, memoryview(segment.payload), bad),
            ):
                with pytest.raises(InvalidRequestError, match="64 lower-case hex digits"):
                    attempt()

    def test_a_snapshot_id_is_hashed(self, root: Path) -> None:
        with DiskStore.open(root) as store:
            for snapshot_id in ("../../x", "/", "a" * 10_000, "\0"):
                with pytest.raises(NotFoundError):
                    store.get_manifest(snapshot_id)
                store.delete_manifest(snapshot_id)
        assert set(files(root)) == {"engram-store.json"}


def test_foreign_files_are_passed_over(root: Path, segment: SampleSegment) -> None:
    with DiskStore.open(root) as store:
        put(store, segment)
        store.put_manifest(sample_manifest([[segment]]))
        shelf = Layout(root).segment(SHARD, segment.segment_id).parent
        for path in (
            shelf / "note.txt",
            shelf / "short.seg",
            root / "segments" / "note",
            root / "segments" / SHARD.namespace / "rank-x-of-1" / "a.seg",
            root / "segments" / "lost+found" / "rank-0-of-1" / "a.seg",
            root / "manifests" / "note.txt",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"foreign")
        assert [s.segment_id for s in store.iter_segments()] == [segment.segment_id]
        assert len(store.list_manifests()) == 1
        stats = store.stats()
        assert stats.segments == {SHARD: 1}
        assert stats.segment_bytes == segment.header.file_length
        assert (stats.manifests, stats.quarantined) == (1, 0)
        assert stats.free_bytes is not None
        assert stats.free_bytes > 0


def test_two_saves_of_one_id_at_once_store_one(root: Path, segment: SampleSegment) -> None:
    manifests = [sample_manifest([[segment]], turn_number=turn) for turn in range(1, 9)]
    outcomes: list[str] = []
    barrier = threading.Barrier(len(manifests))
    with DiskStore.open(root) as store:

        def save(index: int) -> None:
            barrier.wait(30)
            try:
                store.put_manifest(manifests[index])
                outcomes.append("saved")
            except EngramError as error:
                outcomes.append(error.code)

        threads = [threading.Thread(target=save, args=(i,)) for i in range(len(manifests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(outcomes) == ["already_exists"] * 7 + ["saved"]
        assert store.get_manifest("snap-1") in manifests
