"""An archive holds what its snapshots cover and nothing of what else lies in the same files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from engram.catalog.catalog import Catalog
from engram.cli.main import app
from engram.core.canonical import blake3_hex
from engram.core.tokens import tokens_to_bytes
from engram.errors import SegmentCorruptError
from engram.snapshot.archive import segments_of
from engram.snapshot.cutting import Cut
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import TOKENS, SegmentHeader, Shard
from engram.store import segment_files
from engram.store.disk import DiskStore
from engram.store.keys import Key, new_key
from engram.store.reading import open_for_reading
from engram.testing.samples import (
    SampleSegment,
    sample_manifest,
    sample_segment,
    sample_state,
    sample_turns,
)
from engram.testing.tamper import flip_byte, read_payload
from engram.upkeep.exporting import Export, plan_export, snapshots_of, write_archive
from engram.upkeep.importing import ArchiveFile, Names, import_archive
from unit.upkeep.stores import NAMESPACE

Chain = list[SampleSegment]
ROUNDS = 4
LAST_ROW = 5 * 12
"""Where the last of 6 rows begins in a buffer of the samples."""


@dataclass(frozen=True)
class Snapshot:
    """Where a snapshot is, and its chain of every rank."""

    conversation: str
    branch: str
    turn: int
    chains: list[Chain]

    @property
    def id(self) -> str:
        return f"{self.conversation}-{self.branch}-{self.turn}"

    @property
    def manifest(self) -> Manifest:
        return sample_manifest(
            self.chains,
            snapshot_id=self.id,
            conversation_id=self.conversation,
            branch_name=self.branch,
            turn_number=self.turn,
            created_at=1_700_000_000.0 + self.turn,
        )


def beginning(rows: SampleSegment, before: str | None, count: int) -> SampleSegment:
    """The first `count` tokens of rows, as another conversation's chain names them."""
    tokens = rows.tokens[:count]
    key = blake3_hex((bytes.fromhex(before) if before else b"") + tokens_to_bytes(tokens))
    header = rows.header.model_copy(update={"end": rows.header.start + count, "key": key})
    return SampleSegment(header, rows.payload, tokens, rows.segment_id)


def leaving(rng: Random, chain: Chain, position: int, lengths: list[int]) -> list[Chain]:
    """The chains of turns that leave `chain` at `position` and go on by themselves.

    The first one is the turn that ends there.
    """
    rows: Chain = []
    for segment in chain[:-1]:
        start, before = segment.header.start, rows[-1].header.key if rows else None
        if start < position:
            count = min(segment.header.end, position) - start
            rows.append(beginning(segment, before, count))
    turns = [[*rows, sample_state(rng, rows[-1])]]
    for length in lengths:
        rows.append(sample_segment(rng, shard=rows[0].header.shard, parent=rows[-1], length=length))
        turns.append([*rows, sample_state(rng, rows[-1])])
    return turns


def make_snapshots(rng: Random, ranks: int = 1) -> list[Snapshot]:
    """Conversation ``first``, and ``second``, whose two branches leave it anywhere."""
    lengths = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
    total = sum(lengths)
    leaves = [rng.randint(1, total), rng.randint(1, total)]
    goes_on = [[rng.randint(1, 5) for _ in range(rng.randint(0, 3))] for _ in leaves]
    seed = rng.randrange(2**32)
    found: dict[tuple[str, str, int], list[Chain]] = {}
    for rank in range(ranks):
        # The same tokens, and so the same keys, on every rank.
        own = Random(seed)
        turns = sample_turns(own, lengths, shard=Shard(NAMESPACE.id, rank, ranks))
        for turn, chain in enumerate(turns):
            found.setdefault(("first", "main", turn), []).append(chain)
        for name, position, after in zip(("one", "two"), leaves, goes_on, strict=True):
            for turn, chain in enumerate(leaving(own, turns[-1], position, after)):
                found.setdefault(("second", name, turn), []).append(chain)
    return [Snapshot(*place, chains) for place, chains in found.items()]


def fill(root: Path, snapshots: list[Snapshot], key: Key | None = None) -> None:
    with DiskStore.open(root, key=key) as store:
        store.put_namespace(NAMESPACE)
        for snapshot in snapshots:
            for segment in (one for chain in snapshot.chains for one in chain):
                if segment.header.end - segment.header.start != stored_tokens(segment):
                    continue  # the one that stored it is among the snapshots
                store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)
            store.put_manifest(snapshot.manifest)


def stored_tokens(segment: SampleSegment) -> int:
    """How many tokens the stored segment has, of which a chain may use the first ones."""
    first = segment.header.buffers[0]
    return first.shape[0] if first.name == TOKENS else 0


def exported(root: Path, file: Path, conversation: str, key: Key | None = None) -> Export:
    store = open_for_reading(root, key=key)
    archive = plan_export(store, snapshots_of(store, "", conversation))
    write_archive(file, store, archive)
    return archive


def imported(root: Path, file: Path) -> list[Manifest]:
    with DiskStore.open(root) as store, ArchiveFile(file) as opened:
        opened.verify()
        catalog = Catalog.open(store.catalog_path, store)
        report = import_archive(store, catalog, opened, Names())
        catalog.close()
        return list(report.manifests)


def contents(root: Path, manifest: Manifest, key: Key | None = None) -> dict[str, bytes]:
    """All bytes that a snapshot covers, by rank and buffer; rows one after another."""
    store = open_for_reading(root, key=key)
    found: dict[str, bytes] = {}
    for rank, chain in enumerate(manifest.segments):
        shard = Shard(manifest.namespace, rank, manifest.world_size)
        for ref in chain:
            header, payload = read_payload(store, shard, ref.segment_id)
            for name, data in rows_of(header, memoryview(payload), ref.end - ref.start):
                found[f"{rank}/{name}"] = found.get(f"{rank}/{name}", b"") + data
    return found


def rows_of(header: SegmentHeader, payload: memoryview, count: int) -> Iterator[tuple[str, bytes]]:
    for buffer in header.buffers:
        data = bytes(header.view(payload, buffer.name))
        rows = buffer.shape[0]
        yield buffer.name, data if header.has_state else data[: len(data) // rows * count]


def uncovered(snapshots: list[Snapshot], conversation: str) -> list[bytes]:
    """Every row of every buffer, and every state, that no snapshot of the conversation covers."""
    covered: dict[str, int] = {}
    whole: dict[str, SampleSegment] = {}
    for snapshot in snapshots:
        for segment in (one for chain in snapshot.chains for one in chain):
            whole[segment.segment_id] = segment
            if snapshot.conversation == conversation:
                length = segment.header.end - segment.header.start + segment.header.has_state
                covered[segment.segment_id] = max(covered.get(segment.segment_id, 0), length)
    left = []
    for segment_id, segment in whole.items():
        for buffer in segment.header.buffers:
            data = bytes(segment.header.view(memoryview(segment.payload), buffer.name))
            if segment.header.has_state:
                left += [] if segment_id in covered else [data]
                continue
            size = len(data) // buffer.shape[0]
            first = covered.get(segment_id, 0) * size
            left += [data[at : at + size] for at in range(first, len(data), size)]
    return left


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_archive_holds_what_its_snapshots_cover_and_nothing_else(
    encrypted: bool, rng: Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key() if encrypted else None
    cut = number = 0
    # Now and then no conversation of the first rounds leaves another within a file.
    while number < ROUNDS or not cut:
        number += 1
        monkeypatch.setattr(segment_files, "PIECE_BYTES", rng.randint(37, 400))
        snapshots = make_snapshots(rng, ranks=1 + number % 2)
        root, file, new = (tmp_path / f"{what}-{number}" for what in ("store", "file", "new"))
        fill(root, snapshots, key)
        secrets = uncovered(snapshots, "second")
        archive = exported(root, file, "second", key)
        data = file.read_bytes()
        cut += len(archive.cut)
        assert not [secret for secret in secrets if secret in data]
        arrived = {manifest.snapshot_id: manifest for manifest in imported(new, file)}
        expected = [one.manifest for one in snapshots if one.conversation == "second"]
        assert sorted(arrived) == sorted(manifest.snapshot_id for manifest in expected)
        for manifest in expected:
            there = arrived[manifest.snapshot_id]
            assert there.tokens_digest == manifest.tokens_digest
            assert there.boundary_keys == manifest.boundary_keys
            assert contents(new, there) == contents(root, manifest, key)
        checked = CliRunner().invoke(app, ["fsck", "--dir", str(new)])
        assert checked.exit_code == 0, checked.output
        # What has arrived is used whole, or by one of its branches: nothing is left to cut.
        again = exported(new, tmp_path / f"again-{number}", "second")
        assert not again.cut
        assert {s.segment_id for s in again.segments} == {s.segment_id for s in archive.segments}


def test_a_conversation_that_uses_its_files_whole_is_archived_as_it_is_stored(
    rng: Random, tmp_path: Path
) -> None:
    fill(tmp_path / "store", make_snapshots(rng))
    archive = exported(tmp_path / "store", tmp_path / "file", "first")
    assert not archive.cut
    manifests = snapshots_of(open_for_reading(tmp_path / "store"), "", "first")
    assert {(s.header.shard, s.segment_id) for s in archive.segments} == {
        key for manifest in manifests for key in segments_of(manifest)
    }
    assert list(archive.manifests) == manifests


def two_talks(rng: Random) -> tuple[Snapshot, list[Snapshot]]:
    """One turn of 6 tokens, and two of a conversation that has 4 of those tokens."""
    (turn,) = sample_turns(rng, [6], shard=Shard(NAMESPACE.id, 0, 1))
    first = Snapshot("first", "main", 1, [turn])
    others = [
        Snapshot("second", "main", number, [chain])
        for number, chain in enumerate(leaving(rng, turn, 4, [2]))
    ]
    return first, others


def test_what_comes_back_is_named_beside_what_it_was_cut_from(rng: Random, tmp_path: Path) -> None:
    """The store then holds the beginning twice, and an archive of both once."""
    first, (ended, later) = two_talks(rng)
    root = tmp_path / "store"
    fill(root, [first, ended, later])
    store = open_for_reading(root)
    write_archive(tmp_path / "ended", store, plan_export(store, [store.get_manifest(ended.id)]))
    with DiskStore.open(root) as opened:
        opened.delete_manifest(ended.id)
    imported(root, tmp_path / "ended")
    archive = exported(root, tmp_path / "both", "second")
    # Rows, the state at their end, the other turn's rows and its state.
    assert len(archive.segments) == 4
    assert len(archive.cut) == 2
    assert len(imported(tmp_path / "new", tmp_path / "both")) == 2
    secret = uncovered([first, ended, later], "second")
    data = (tmp_path / "both").read_bytes()
    assert not [one for one in secret if one in data]


def test_damage_beyond_the_cut_ends_the_export(rng: Random, tmp_path: Path) -> None:
    """The digest is of the whole file: where it is wrong, no byte of it is taken for right."""
    first, others = two_talks(rng)
    fill(tmp_path / "store", [first, *others])
    damaged = flip_byte(tmp_path / "store", first.manifest, "kv.1", segment=0, offset=LAST_ROW)
    with pytest.raises(SegmentCorruptError, match=damaged.stem):
        exported(tmp_path / "store", tmp_path / "file", "second")
    assert not (tmp_path / "file").exists()


def test_damage_after_the_plan_ends_the_export(rng: Random, tmp_path: Path) -> None:
    first, others = two_talks(rng)
    fill(tmp_path / "store", [first, *others])
    store = open_for_reading(tmp_path / "store")
    archive = plan_export(store, snapshots_of(store, "", "second"))
    damaged = flip_byte(tmp_path / "store", first.manifest, "kv.1", segment=0, offset=LAST_ROW)
    with pytest.raises(SegmentCorruptError, match=damaged.stem):
        write_archive(tmp_path / "file", store, archive)
    assert not (tmp_path / "file").exists()


def test_rows_without_a_row_a_token_are_not_cut() -> None:
    header = SegmentHeader.plan(
        shard=Shard(NAMESPACE.id, 0, 1),
        key="ab" * 32,
        start=0,
        end=4,
        parent=None,
        has_state=False,
        buffers=[("kv.0", "U8", (2, 8))],
    )
    with pytest.raises(SegmentCorruptError, match="cannot be cut"):
        Cut.at("cd" * 32, header, end=3, key="ef" * 32, parent=None)


def test_the_command_says_how_many_were_cut(rng: Random, tmp_path: Path) -> None:
    first, others = two_talks(rng)
    fill(tmp_path / "store", [first, *others])
    for conversation, cut in (("first", 0), ("second", 4)):
        file = tmp_path / conversation
        arguments = ["--dir", tmp_path / "store", "--conversation", conversation, "-o", file]
        result = CliRunner().invoke(app, ["export", *map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["cut_segments"] == cut
        with ArchiveFile(file) as opened:
            sizes = {m.snapshot_id: m.bytes for m in opened.archive.manifests}
        assert {s["snapshot_id"]: s["bytes"] for s in report["snapshots"]} == sizes
