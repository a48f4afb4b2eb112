"""Snapshots to a file and back: what others can read of it, and what is refused."""

import errno
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

from engram.catalog.catalog import Catalog
from engram.cli import transfer
from engram.cli.main import app
from engram.core.namespace import Namespace
from engram.errors import (
    AlreadyExistsError,
    EngramError,
    InvalidRequestError,
    NotFoundError,
    SegmentCorruptError,
    SnapshotCorruptError,
    StoreError,
    StoreFormatError,
    StoreFullError,
)
from engram.snapshot.archive import plan_archive, segments_of
from engram.snapshot.manifest import Manifest, change_manifest
from engram.snapshot.segment import Shard
from engram.store import disk
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.reading import open_for_reading
from engram.testing.faults import WRITE_OPERATIONS, FaultyFileSystem
from engram.testing.tamper import DAMAGES, read_payload
from engram.upkeep.exporting import Export, plan_export, snapshots_of, write_archive
from engram.upkeep.importing import ArchiveFile, ImportReport, Names, import_archive
from fences import blocks
from unit.upkeep.stores import (
    NAMESPACE,
    add_conversation,
    contents,
    make_large_store,
    make_store,
)


def exported(root: Path, file: Path, *ids: str) -> Export:
    """Write some snapshots to a file; without ids the whole conversation."""
    store = open_for_reading(root)
    manifests = [store.get_manifest(i) for i in ids] if ids else snapshots_of(store, "", "talk")
    archive = plan_export(store, manifests)
    write_archive(file, store, archive)
    return archive


def imported(root: Path, file: Path, names: Names | None = None) -> ImportReport:
    with DiskStore.open(root) as store, ArchiveFile(file) as opened:
        opened.verify()
        catalog = Catalog.open(store.catalog_path, store)
        try:
            return import_archive(store, catalog, opened, names or Names())
        finally:
            catalog.close()


def listed(root: Path) -> dict[str, str]:
    """Snapshot ids of a store, by its catalog, each with its conversation."""
    with DiskStore.open(root) as store:
        catalog = Catalog.open(store.catalog_path, store)
        rows = catalog.all_snapshots()
        catalog.close()
    return {row.snapshot_id: row.conversation_id for row in rows}


def stored(root: Path) -> dict[tuple[Shard, str], bytes]:
    """The bytes of every segment file."""
    layout = Layout(root)
    with DiskStore.open(root, lock=False) as store:
        return {
            (s.shard, s.segment_id): layout.segment(s.shard, s.segment_id).read_bytes()
            for s in store.iter_segments()
        }


@pytest.fixture
def root(tmp_path: Path, rng: Random) -> Path:
    make_store(tmp_path / "store", rng, ranks=2)
    return tmp_path / "store"


@pytest.fixture
def file(root: Path, tmp_path: Path) -> Path:
    exported(root, tmp_path / "talk.engram")
    return tmp_path / "talk.engram"


class TestThereAndBack:
    def test_a_conversation_arrives_byte_for_byte(
        self, root: Path, file: Path, tmp_path: Path
    ) -> None:
        report = imported(tmp_path / "new", file)
        assert stored(tmp_path / "new") == stored(root)
        assert report.new_segments == report.segments == len(stored(root))
        assert report.new_bytes == report.bytes == sum(map(len, stored(root).values()))
        with (
            DiskStore.open(root, lock=False) as old,
            DiskStore.open(tmp_path / "new", lock=False) as new,
        ):
            for manifest in old.iter_manifests():
                assert isinstance(manifest, Manifest)
                arrived = new.get_manifest(manifest.snapshot_id)
                # What was stored first by whom is this store's own matter.
                assert change_manifest(arrived, unique_bytes=manifest.unique_bytes) == manifest
            assert new.get_namespace(NAMESPACE.id) == NAMESPACE
        assert len(listed(tmp_path / "new")) == 4

    def test_what_is_exported_again_is_the_same_file(
        self, file: Path, tmp_path: Path, root: Path
    ) -> None:
        imported(tmp_path / "new", file)
        archive = exported(tmp_path / "new", tmp_path / "again")
        imported(tmp_path / "third", tmp_path / "again")
        exported(tmp_path / "third", tmp_path / "thrice")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "thrice").read_bytes()
        assert archive.file_length == (tmp_path / "again").stat().st_size

    def test_each_segment_is_there_once(self, root: Path, file: Path) -> None:
        with ArchiveFile(file) as opened:
            held = [(s.header.shard, s.segment_id) for s in opened.archive.segments]
        named = [
            key for m in snapshots_of(open_for_reading(root), "", "talk") for key in segments_of(m)
        ]
        assert sorted(held, key=str) == sorted(set(named), key=str)
        assert len(held) < len(named)

    def test_one_snapshot_brings_only_what_it_stands_on(self, root: Path, tmp_path: Path) -> None:
        archive = exported(root, tmp_path / "one", "talk-main-1")
        assert len(archive.segments) == 4  # rows and a state on each rank
        imported(tmp_path / "new", tmp_path / "one")
        assert listed(tmp_path / "new") == {"talk-main-1": "talk"}

    def test_a_branch_alone(self, root: Path) -> None:
        store = open_for_reading(root)
        assert [m.snapshot_id for m in snapshots_of(store, "", "talk", "other")] == ["talk-other-3"]
        with pytest.raises(NotFoundError, match="branch 'none'"):
            snapshots_of(store, "", "talk", "none")
        with pytest.raises(NotFoundError, match="tenant"):
            snapshots_of(store, "somebody", "talk")

    def test_what_is_there_already_is_not_written_again(
        self, root: Path, tmp_path: Path, rng: Random
    ) -> None:
        exported(root, tmp_path / "one", "talk-main-1")
        exported(root, tmp_path / "three", "talk-main-3")
        imported(tmp_path / "new", tmp_path / "one")
        second = imported(tmp_path / "new", tmp_path / "three")
        (manifest,) = second.manifests
        shared = [chain[0] for chain in manifest.segments]  # the first turn's rows
        assert (second.segments, second.new_segments) == (8, 6)
        new_bytes = manifest.bytes - sum(ref.bytes for ref in shared)
        assert manifest.unique_bytes == second.new_bytes == new_bytes

    def test_exporting_changes_nothing_and_works_beside_a_server(
        self, root: Path, tmp_path: Path
    ) -> None:
        with DiskStore.open(root):
            before = contents(root)
            exported(root, tmp_path / "file")
            assert contents(root) == before

    def test_no_segment_is_ever_whole_in_memory(self, tmp_path: Path) -> None:
        size = make_large_store(tmp_path / "store")
        tracemalloc.start()
        exported(tmp_path / "store", tmp_path / "file", "large")
        imported(tmp_path / "new", tmp_path / "file")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert stored(tmp_path / "new") == stored(tmp_path / "store")
        assert peak < size // 3


class TestOthersCanReadIt:
    """With the safetensors package alone, which knows nothing of Engram."""

    def test_every_buffer_is_a_tensor_of_the_stored_segment(self, root: Path, file: Path) -> None:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())
            metadata = opened.metadata()
            lines = metadata["segments"].splitlines()
            expected = set()
            with DiskStore.open(root, lock=False) as store:
                for number, line in enumerate(lines):
                    segment_id, _, text = line.partition(" ")
                    described = json.loads(text)
                    shard = Shard(
                        described["namespace"], described["rank"], described["world_size"]
                    )
                    header, payload = read_payload(store, shard, segment_id)
                    for buffer in header.buffers:
                        name = f"{number}/{buffer.name}"
                        expected.add(name)
                        assert opened.get_slice(name).get_dtype() == buffer.dtype
                        found = opened.get_tensor(name)
                        assert tuple(found.shape) == buffer.shape
                        assert bytes(found.view(torch.uint8).numpy()) == header.view(
                            memoryview(payload), buffer.name
                        )
            padding = names - expected
            assert expected <= names
            assert all("/+" in name for name in padding)
            assert all(not opened.get_tensor(name).any() for name in padding)

    def test_the_metadata_is_readable(self, file: Path) -> None:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata()
        assert metadata["engram_archive"] == "1"
        records = [json.loads(line) for line in metadata["manifests"].splitlines()]
        assert [record["body"]["snapshot_id"] for record in records] == [
            "talk-main-1",
            "talk-main-2",
            "talk-main-3",
            "talk-other-3",
        ]
        assert json.loads(metadata["namespaces"]) == dict(NAMESPACE.fields)


class TestNames:
    def test_what_is_there_is_refused_and_nothing_changes(self, root: Path, file: Path) -> None:
        before = contents(root)
        with pytest.raises(AlreadyExistsError, match="exists already"):
            imported(root, file)
        assert contents(root) == before

    def test_a_turn_that_is_taken_is_refused(self, root: Path, tmp_path: Path, rng: Random) -> None:
        exported(root, tmp_path / "one", "talk-main-2")
        with pytest.raises(AlreadyExistsError, match="turn 2 of branch 'main'"):
            imported(root, tmp_path / "one", Names(snapshot_id="free"))

    def test_as_another_conversation_beside_itself(self, root: Path, file: Path) -> None:
        report = imported(root, file, Names(conversation_id="copy"))
        assert report.new_segments == 0
        copies = {m.turn_number: m for m in report.manifests if m.branch_name == "main"}
        assert copies[2].parent_snapshot == copies[1].snapshot_id
        assert copies[3].parent_snapshot == copies[2].snapshot_id
        assert all(m.rid is None and m.unique_bytes == 0 for m in report.manifests)
        conversations = sorted(listed(root).values())
        assert conversations == ["copy"] * 4 + ["talk"] * 4

    def test_under_another_id(self, root: Path, tmp_path: Path) -> None:
        exported(root, tmp_path / "one", "talk-main-3")
        imported(tmp_path / "new", tmp_path / "one", Names(snapshot_id="mine"))
        assert listed(tmp_path / "new") == {"mine": "talk"}

    def test_one_id_cannot_name_four(self, file: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="holds 4 snapshots"):
            imported(tmp_path / "new", file, Names(snapshot_id="mine"))
        assert listed(tmp_path / "new") == {}

    def test_it_becomes_the_tenants_it_is_imported_for(self, tmp_path: Path, rng: Random) -> None:
        with DiskStore.open(tmp_path / "store") as store:
            add_conversation(store, rng, tenant="theirs")
        store = open_for_reading(tmp_path / "store")
        archive = plan_export(store, snapshots_of(store, "theirs", "talk"))
        write_archive(tmp_path / "file", store, archive)
        report = imported(tmp_path / "new", tmp_path / "file", Names(tenant="ours"))
        assert {m.tenant for m in report.manifests} == {"ours"}
        assert {m.tenant for m in imported(tmp_path / "third", tmp_path / "file").manifests} == {""}


def rewritten(header: bytes, old: bytes, new: bytes) -> bytes:
    """An archive's header with something replaced; its length as it was."""
    assert old in header
    text = header[8:].replace(old, new, 1)
    return header[:8] + text[: len(header) - 8].ljust(len(header) - 8)


Attack = Callable[[bytes, int], bytes]
"""Changes an archive, of which so many bytes are the header."""

ATTACKS: dict[str, tuple[Attack, type[EngramError]]] = {
    "empty": (lambda data, n: b"", InvalidRequestError),
    "seven bytes": (lambda data, n: data[:7], InvalidRequestError),
    "not an archive": (lambda data, n: b"PK\3\4" * 100, InvalidRequestError),
    "an absurd header length": (
        lambda data, n: (1 << 62).to_bytes(8, "little") + data[8:],
        InvalidRequestError,
    ),
    "a header longer than the file": (
        lambda data, n: (60 << 20).to_bytes(8, "little") + data[8:],
        SnapshotCorruptError,
    ),
    "cut in the header": (lambda data, n: data[: n // 2], SnapshotCorruptError),
    "cut in the data": (lambda data, n: data[:-1], SnapshotCorruptError),
    "all data gone": (lambda data, n: data[:n], SnapshotCorruptError),
    "bytes behind the end": (lambda data, n: data + b"\0", SnapshotCorruptError),
    "a flipped bit in the data": (
        lambda data, n: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        SegmentCorruptError,
    ),
    "a newer version": (
        lambda data, n: (
            rewritten(data[:n], b'"engram_archive":"1"', b'"engram_archive":"2"') + data[n:]
        ),
        StoreFormatError,
    ),
    "an older version": (
        lambda data, n: (
            rewritten(data[:n], b'"engram_archive":"1"', b'"engram_archive":"0"') + data[n:]
        ),
        StoreFormatError,
    ),
    "a version that is none": (
        lambda data, n: (
            rewritten(data[:n], b'"engram_archive":"1"', b'"engram_archive":"x"') + data[n:]
        ),
        InvalidRequestError,
    ),
    "a safetensors file of somebody else": (
        lambda data, n: rewritten(data[:n], b'"engram_archive"', b'"other_archive"') + data[n:],
        InvalidRequestError,
    ),
    "an unknown key in the metadata": (
        lambda data, n: rewritten(data[:n], b'"manifests":', b'"a":"","manifests":') + data[n:],
        SnapshotCorruptError,
    ),
    "a tensor renamed to a path": (
        lambda data, n: rewritten(data[:n], b'"0/kv.0"', b'"../../x"') + data[n:],
        SnapshotCorruptError,
    ),
    "a tensor more": (
        lambda data, n: (
            rewritten(
                data[:n],
                b'"0/kv.0":',
                b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"0/kv.0":',
            )
            + data[n:]
        ),
        SnapshotCorruptError,
    ),
    "offsets that overlap": (
        lambda data, n: (
            rewritten(data[:n], b'"data_offsets":[64,', b'"data_offsets":[63,') + data[n:]
        ),
        SnapshotCorruptError,
    ),
    "a manifest changed": (
        lambda data, n: rewritten(data[:n], b"talk-main-1", b"talk-main-9") + data[n:],
        SnapshotCorruptError,
    ),
    "a segment header changed": (
        lambda data, n: rewritten(data[:n], rb"\"rank\":0", rb"\"rank\":1") + data[n:],
        SnapshotCorruptError,
    ),
    "a huge shape": (
        lambda data, n: (
            rewritten(data[:n], rb"\"shape\":[5]", rb"\"shape\":[9007199254740991]") + data[n:]
        ),
        SnapshotCorruptError,
    ),
    "a lone surrogate": (
        lambda data, n: rewritten(data[:n], b'"namespaces":"', b'"namespaces":"\\ud800') + data[n:],
        EngramError,
    ),
    "deep nesting": (
        lambda data, n: data[:8] + (b'{"x":' + b"[" * (n - 20)).ljust(n - 8) + data[n:],
        InvalidRequestError,
    ),
    "no text at all": (
        lambda data, n: data[:8] + b"\xff" * (n - 8) + data[n:],
        InvalidRequestError,
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_is_refused_and_nothing_is_listed(
    attack: str, file: Path, tmp_path: Path
) -> None:
    change, expected = ATTACKS[attack]
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    changed = change(data, header)
    assert changed != data
    file.write_bytes(changed)
    with pytest.raises(expected):
        imported(tmp_path / "new", file)
    assert listed(tmp_path / "new") == {}
    assert stored(tmp_path / "new") == {}


def test_any_flipped_bit_is_found(file: Path, tmp_path: Path, rng: Random) -> None:
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [rng.randrange(header) for _ in range(60)]
    places += [rng.randrange(header, len(data)) for _ in range(60)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(EngramError), ArchiveFile(file) as opened:
            opened.verify()


def test_a_chain_of_another_snapshot_is_refused(root: Path, tmp_path: Path) -> None:
    """Every digest is right, and every record is sealed: only together they are wrong."""
    store = open_for_reading(root)
    archive = plan_export(store, [store.get_manifest("talk-main-3")])
    (manifest,) = archive.manifests
    wrong = change_manifest(manifest, tokens_digest="00" * 32)
    forged = replace(archive, manifests=(wrong,))
    write_archive(tmp_path / "forged", store, forged)
    with pytest.raises(SnapshotCorruptError, match="tokens"):
        imported(tmp_path / "new", tmp_path / "forged")
    assert listed(tmp_path / "new") == {}


def test_segments_that_nothing_names_are_refused(root: Path) -> None:
    store = open_for_reading(root)
    archive = plan_export(store, [store.get_manifest("talk-main-3")])
    pairs = [(s.segment_id, s.header) for s in archive.segments]
    for held in (pairs[:-1], [*pairs, pairs[0]]):
        with pytest.raises(SnapshotCorruptError, match="segments"):
            plan_archive(archive.manifests, archive.namespaces, held)
    with pytest.raises(SnapshotCorruptError, match="namespaces"):
        plan_archive(archive.manifests, [], pairs)
    with pytest.raises(SnapshotCorruptError, match="two snapshots of one id"):
        plan_archive([*archive.manifests] * 2, archive.namespaces, pairs)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_segment_is_not_exported(damage: str, root: Path, tmp_path: Path) -> None:
    layout = Layout(root)
    shard, segment_id = segments_of(open_for_reading(root).get_manifest("talk-main-2"))[1]
    DAMAGES[damage](layout.segment(shard, segment_id))
    before = contents(root)
    with pytest.raises(SegmentCorruptError, match=segment_id):
        exported(root, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert contents(root) == before


def test_a_snapshot_removed_while_it_is_exported_is_not_called_damaged(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(store: DiskStore, manifests: list[Manifest]) -> Export:
        with DiskStore.open(root) as server:
            server.delete_manifest(manifests[0].snapshot_id)
            server.delete_segment(*segments_of(manifests[0])[-1])
        return plan_export(store, manifests)

    monkeypatch.setattr(transfer, "plan_export", late)
    arguments = ["--dir", root, "--conversation", "talk", "-o", tmp_path / "archive"]
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 2
    assert "was removed while it was exported" in result.output
    assert not (tmp_path / "archive").exists()


def test_a_file_that_is_there_is_not_overwritten(root: Path, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(AlreadyExistsError, match="--force"):
        exported(root, file, "talk-main-1")
    assert file.read_bytes() == before


class TestFaults:
    @pytest.mark.parametrize("operation", [o for o in WRITE_OPERATIONS if o != "mkdir"])
    @pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
    def test_an_export_is_there_whole_or_not_at_all(
        self, root: Path, tmp_path: Path, operation: str, error: int
    ) -> None:
        store = open_for_reading(root)
        archive = plan_export(store, snapshots_of(store, "", "talk"))
        fs = FaultyFileSystem().fail(operation, error=error)
        target = tmp_path / "file"
        with pytest.raises(StoreFullError if error == errno.ENOSPC else StoreError):
            write_archive(target, store, archive, fs=fs)
        assert fs.fired
        left = {path.name for path in tmp_path.iterdir()} - {"store"}
        # Only the directory's fsync comes after the file is whole.
        assert left == ({"file"} if operation == "fsync_dir" else set())

    def test_too_little_room_is_told_before_anything_is_written(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "free_bytes", lambda path: 100)
        with pytest.raises(StoreFullError) as caught:
            imported(tmp_path / "new", file)
        assert caught.value.details["free"] == 100
        assert stored(tmp_path / "new") == {}

    def test_whatever_fails_at_an_import_no_snapshot_is_torn(
        self, file: Path, tmp_path: Path
    ) -> None:
        calls = _calls_of_an_import(file, tmp_path / "count")
        for operation in WRITE_OPERATIONS:
            for after in range(0, calls[operation], 3):
                root = tmp_path / f"{operation}-{after}"
                fs = FaultyFileSystem()
                with (
                    DiskStore.open(root, fs=fs) as store,
                    ArchiveFile(file) as opened,
                ):
                    catalog = Catalog.open(store.catalog_path, store)
                    fs.fail(operation, after=after)
                    with pytest.raises(StoreError):
                        import_archive(store, catalog, opened, Names())
                    catalog.close()
                assert fs.fired
                # Not one was acknowledged, and none is listed now or after a restart.
                assert listed(root) == {}
                imported(root, file)
                assert len(listed(root)) == 4

    def test_a_file_that_changes_meanwhile(self, file: Path, tmp_path: Path) -> None:
        with DiskStore.open(tmp_path / "new") as store, ArchiveFile(file) as opened:
            opened.verify()
            with file.open("r+b") as writer:
                writer.seek(-5, os.SEEK_END)
                writer.write(b"other")
            catalog = Catalog.open(store.catalog_path, store)
            with pytest.raises(SnapshotCorruptError, match="while it was imported"):
                import_archive(store, catalog, opened, Names())
            assert catalog.all_snapshots() == []
            catalog.close()


def _calls_of_an_import(file: Path, root: Path) -> dict[str, int]:
    fs = FaultyFileSystem()
    with DiskStore.open(root, fs=fs) as store, ArchiveFile(file) as opened:
        catalog = Catalog.open(store.catalog_path, store)
        before = len(fs.calls)
        import_archive(store, catalog, opened, Names())
        catalog.close()
    names = [name for name, _ in fs.calls[before:]]
    return {operation: names.count(operation) for operation in WRITE_OPERATIONS}


def test_what_is_read_can_only_be_read(root: Path) -> None:
    """The file system under an export refuses every change, as one mounted read-only."""
    store = open_for_reading(root)
    changing = {n for n in vars(FileSystem) if not n.startswith("_")} - {
        *("close", "open_read", "read_into", "fsync", "fsync_dir")
    }
    for name in changing:
        assert name in vars(type(store._fs)), name
    with pytest.raises(StoreError, match="Read-only"):
        store.put_namespace(Namespace({"other": 1}))


def test_the_program_in_the_document_reads_an_archive(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [b for b in blocks() if b.document == "docs/format/archive.md"]
    monkeypatch.chdir(file.parent)
    names: dict[str, object] = {}
    exec(block.code, names)
    snapshots = names["snapshots"]
    assert isinstance(snapshots, list)
    assert [s["snapshot_id"] for s in snapshots][:2] == ["talk-main-1", "talk-main-2"]
    assert isinstance(names["tensor"], torch.Tensor)


class TestCommands:
    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_there_and_back(self, root: Path, tmp_path: Path) -> None:
        file = tmp_path / "file"
        out = self.run("export", "--dir", root, "--conversation", "talk", "-o", file, "--json")
        assert out.exit_code == 0, out.output
        report = json.loads(out.stdout)
        assert report["bytes"] == file.stat().st_size
        assert len(report["snapshots"]) == 4
        missing = self.run("import", file, "--dir", tmp_path / "new")
        assert missing.exit_code == 2
        assert "--create" in missing.output
        into = self.run("import", file, "--dir", tmp_path / "new", "--create", "--json")
        assert into.exit_code == 0, into.output
        assert json.loads(into.stdout)["new_segments"] == report["segments"]
        again = self.run("import", file, "--dir", tmp_path / "new")
        assert again.exit_code == 2
        assert "exists already" in again.output
        copy = self.run("import", file, "--dir", tmp_path / "new", "--as", "copy")
        assert copy.exit_code == 0
        assert "turn 3 of branch 'other' of conversation 'copy'" in copy.output
        assert f"0 of {report['segments']} segments were new" in copy.output
        one = self.run("export", "--dir", root, "talk-main-1", "-o", tmp_path / "one")
        assert "1 snapshots, 4 segments" in one.output
        named = self.run(
            "import", tmp_path / "one", "--dir", tmp_path / "n", "--create", "--as-snapshot", "x"
        )
        assert named.exit_code == 0
        assert listed(tmp_path / "n") == {"x": "talk"}

    def test_a_store_in_use_is_refused(self, root: Path, file: Path) -> None:
        with DiskStore.open(root):
            before = contents(root)
            result = self.run("import", file, "--dir", root, "--as", "copy")
            assert result.exit_code == 2
            assert "another server uses" in result.output
            assert contents(root) == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "either a snapshot or a --conversation"),
            (["talk-main-1", "--conversation", "talk"], "either a snapshot or a --conversation"),
            (["talk-main-1", "--branch", "main"], "--branch needs a --conversation"),
            (["no-such"], "no snapshot 'no-such'"),
            (["../x"], "SNAPSHOT is not a valid id"),
            (["--conversation", "talk", "--branch", ".x"], "--branch is not a valid id"),
            (["--conversation", "talk", "--tenant", "/"], "tenant is not a valid id"),
        ],
    )
    def test_what_cannot_be_exported(
        self, root: Path, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        result = self.run("export", "--dir", root, "-o", tmp_path / "file", *arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "file").exists()

    def test_what_is_no_store(self, tmp_path: Path) -> None:
        result = self.run("export", "--dir", tmp_path, "x", "-o", tmp_path / "file")
        assert result.exit_code == 2
        assert "is no snapshot store" in result.output
        assert list(tmp_path.iterdir()) == []


def _metadata(manifests: bytes = b"", namespaces: bytes = b"", segments: bytes = b"") -> bytes:
    return (
        b'{"__metadata__":{"engram_archive":"1","manifests":"%s","namespaces":"%s","segments":"%s"}'
        % (manifests, namespaces, segments)
    )


N = 8 << 20
LARGE = {
    "lists around it": _metadata() + b',"x":[' + b"[]," * (N // 3) + b"[]]}",
    "empty manifests": _metadata(manifests=b"\\n" * (N // 2)) + b"}",
    "empty segments": _metadata(segments=b"\\n" * (N // 2)) + b"}",
    "a large namespace": _metadata(
        namespaces=b'{\\"a\\":[' + b"0," * (N // 2) + b"0]}\\n",
    )
    + b"}",
    "a record of lists": _metadata(manifests=b"[]," * (N // 3) + b"\\n") + b"}",
    "many keys": b'{"__metadata__":{'
    + b",".join(b'"%d":""' % n for n in range(N // 12))
    + b',"engram_archive":"1"}}',
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_hostile_header_takes_a_few_times_its_size(kind: str, tmp_path: Path) -> None:
    text = LARGE[kind]
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    with pytest.raises(SnapshotCorruptError):
        ArchiveFile(tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text)
