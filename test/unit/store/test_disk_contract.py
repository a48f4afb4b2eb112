"""The disk store keeps every promise of the contracts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engram.snapshot.listing import manifest_name
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store import encryption, segment_files
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.keys import Key, new_key
from engram.store.layout import Layout
from engram.testing.contracts import (
    Change,
    DamageManifest,
    DamageSegment,
    ManifestStoreContract,
    NamespaceStoreContract,
    SegmentStoreContract,
)
from engram.testing.faults import FaultyFileSystem


def rewrite(path: Path, change: Change) -> None:
    data = change(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)


class _OnDisk:
    fs = FileSystem()
    key: Key | None = None

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[DiskStore]:
        with DiskStore.open(tmp_path / "store", fs=self.fs, key=self.key) as store:
            yield store

    @pytest.fixture
    def damage(self, store: DiskStore) -> DamageSegment:
        def damage(shard: Shard, segment_id: str, change: Change) -> None:
            rewrite(Layout(store.root).segment(shard, segment_id), change)

        return damage

    @pytest.fixture
    def damage_manifest(self, store: DiskStore) -> DamageManifest:
        def damage(snapshot_id: str, tenant: str, change: Change) -> None:
            rewrite(Layout(store.root).manifest(manifest_name(snapshot_id, tenant)), change)

        return damage


class TestDiskSegments(_OnDisk, SegmentStoreContract):
    pass


class TestDiskNamespaces(_OnDisk, NamespaceStoreContract):
    pass


class TestDiskManifests(_OnDisk, ManifestStoreContract):
    pass


class TestDiskSegmentsInSmallPieces(_OnDisk, SegmentStoreContract):
    """Short reads and writes, and payloads longer than a piece, change nothing."""

    fs = FaultyFileSystem(short=333)

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engram.snapshot.digest.PIECE_BYTES", 100)
        monkeypatch.setattr(segment_files, "PIECE_BYTES", 100)


class TestEncryptedSegments(_OnDisk, SegmentStoreContract):
    key = new_key()

    def stored_length(self, header: SegmentHeader) -> int:
        return encryption.encrypted_length(header.file_length)


class TestEncryptedSegmentsInSmallPieces(TestEncryptedSegments):
    """Chunks, pieces, reads and writes all of another length, none a multiple of another."""

    fs = FaultyFileSystem(short=333)

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engram.snapshot.digest.PIECE_BYTES", 100)
        monkeypatch.setattr(segment_files, "PIECE_BYTES", 100)
        monkeypatch.setattr(encryption, "CHUNK_BYTES", 97)
