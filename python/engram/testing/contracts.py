"""Contract suites: what every store must do, as test classes to derive from.

A backend's tests are ``class TestMyStore(SegmentStoreContract)`` with two fixtures: ``store``, an
empty store, and ``damage``, which changes a stored segment behind the store's back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pytest

from engram.core.namespace import Namespace
from engram.errors import (
    AlreadyExistsError,
    InternalError,
    ManifestCorruptError,
    NotFoundError,
    RamTierFullError,
    SegmentCorruptError,
)
from engram.snapshot.listing import DamagedManifest
from engram.snapshot.manifest import Manifest, change_manifest, encode_manifest
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store.base import ManifestStore, NamespaceStore, SegmentStore
from engram.testing.samples import (
    SHARD,
    SampleSegment,
    sample_chain,
    sample_manifest,
    sample_segment,
    seeded_random,
)

Change: TypeAlias = Callable[[bytes], bytes | None]
"""Gives the new bytes of a stored file, or None to have it removed."""

DamageSegment: TypeAlias = Callable[[Shard, str, Change], None]
DamageManifest: TypeAlias = Callable[[str, str, Change], None]


def read(store: SegmentStore, segment: SampleSegment) -> tuple[SegmentHeader, bytes]:
    """Read a segment; its header and payload."""
    buffer = bytearray(b"\xee" * segment.header.payload_length)
    header = store.read_segment(
        segment.header.shard, segment.segment_id, lambda _: memoryview(buffer)
    )
    return header, bytes(buffer)


def put(store: SegmentStore, segment: SampleSegment) -> str:
    """Store a segment."""
    return store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)


def flip_bit(position: int) -> Change:
    """Flip the lowest bit of the byte at ``position``, from the end if it is negative."""

    def change(data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[position] ^= 1
        return bytes(damaged)

    return change


def cut(length: int) -> Change:
    """Keep ``length`` bytes."""
    return lambda data: data[:length]


class SegmentStoreContract:
    """What `engram.store.base.SegmentStore` promises."""

    @pytest.fixture
    def store(self) -> SegmentStore:
        raise NotImplementedError("a fixture 'store' gives an empty store")

    @pytest.fixture
    def damage(self) -> DamageSegment:
        raise NotImplementedError("a fixture 'damage' changes a stored segment's bytes")

    def stored_length(self, header: SegmentHeader) -> int:
        """Bytes of what is stored of a segment; more than its file where it is encrypted."""
        return header.file_length

    @pytest.fixture
    def rng(self) -> random.Random:
        return seeded_random()

    def test_what_is_put_is_read(self, store: SegmentStore, rng: random.Random) -> None:
        for segment in sample_chain(rng):
            assert put(store, segment) == segment.segment_id
            assert read(store, segment) == (segment.header, segment.payload)
            assert store.verify_segment(segment.header.shard, segment.segment_id) == segment.header

    def test_the_id_is_computed_if_none_is_given(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        assert store.put_segment(segment.header, memoryview(segment.payload)) == segment.segment_id
        assert read(store, segment)[1] == segment.payload

    def test_putting_again_changes_nothing(self, store: SegmentStore, rng: random.Random) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        listed = list(store.iter_segments())
        assert put(store, segment) == segment.segment_id
        assert list(store.iter_segments()) == listed
        assert read(store, segment)[1] == segment.payload

    def test_a_payload_changed_after_sealing_is_not_stored(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        changed = flip_bit(-1)(segment.payload)
        assert changed is not None
        with pytest.raises(InternalError, match="changed after it was sealed"):
            store.put_segment(segment.header, memoryview(changed), segment.segment_id)
        assert not store.has_segment(segment.header.shard, segment.segment_id)
        assert list(store.iter_segments()) == []

    def test_padding_that_is_not_zero_is_not_stored(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        (start, _), *_ = segment.header.gaps()
        changed = flip_bit(start)(segment.payload)
        assert changed is not None
        with pytest.raises(InternalError, match="between its buffers"):
            store.put_segment(segment.header, memoryview(changed))
        assert list(store.iter_segments()) == []

    @pytest.mark.parametrize("difference", [-1, 1])
    def test_a_buffer_of_another_size_is_refused(
        self, store: SegmentStore, rng: random.Random, difference: int
    ) -> None:
        segment = sample_segment(rng)
        buffer = memoryview(bytearray(segment.header.payload_length + difference))
        with pytest.raises(InternalError, match="contiguous bytes"):
            store.put_segment(segment.header, buffer)
        put(store, segment)
        with pytest.raises(InternalError, match="contiguous bytes"):
            store.read_segment(segment.header.shard, segment.segment_id, lambda _: buffer)
        assert read(store, segment)[1] == segment.payload

    def test_a_buffer_that_cannot_be_written_is_refused(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        buffer = memoryview(segment.payload)
        with pytest.raises(InternalError, match="read-only"):
            store.read_segment(segment.header.shard, segment.segment_id, lambda _: buffer)
        assert read(store, segment)[1] == segment.payload

    def test_a_payload_comes_in_pieces(self, store: SegmentStore, rng: random.Random) -> None:
        for segment in sample_chain(rng):
            put(store, segment)
            pieces = store.iter_payload(segment.header.shard, segment.segment_id)
            assert b"".join(bytes(piece) for piece in pieces) == segment.payload

    def test_a_header_is_looked_at_before_any_piece(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        seen: list[SegmentHeader] = []
        shard, segment_id = segment.header.shard, segment.segment_id
        pieces = store.iter_payload(shard, segment_id, seen.append)
        first = bytes(next(pieces))
        assert seen == [segment.header]
        assert segment.payload.startswith(first)

        def refuse(header: SegmentHeader) -> None:
            raise LookupError(header.key)

        with pytest.raises(LookupError):
            next(store.iter_payload(shard, segment_id, refuse))
        assert store.has_segment(shard, segment_id)

    @pytest.mark.parametrize("position", [-1, -33, -40])
    def test_pieces_of_a_damaged_segment_end_in_an_error(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random, position: int
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, flip_bit(position))
        with pytest.raises(SegmentCorruptError):
            list(store.iter_payload(segment.header.shard, segment.segment_id))

    def test_tokens_are_read_alone(self, store: SegmentStore, rng: random.Random) -> None:
        segment = sample_segment(rng, length=9)
        put(store, segment)
        header, tokens = store.read_tokens(segment.header.shard, segment.segment_id)
        assert header == segment.header
        assert tuple(tokens.tolist()) == segment.tokens

    def test_shards_are_apart(self, store: SegmentStore, rng: random.Random) -> None:
        shards = [Shard(SHARD.namespace, 0, 2), Shard(SHARD.namespace, 1, 2), SHARD]
        segments = [sample_segment(rng, shard=shard) for shard in shards]
        for segment in segments:
            put(store, segment)
        for segment in segments:
            assert read(store, segment) == (segment.header, segment.payload)
            for shard in shards:
                assert store.has_segment(shard, segment.segment_id) == (
                    shard == segment.header.shard
                )
        assert {(s.shard, s.segment_id, s.bytes) for s in store.iter_segments()} == {
            (s.header.shard, s.segment_id, self.stored_length(s.header)) for s in segments
        }

    def test_a_missing_segment_is_named(self, store: SegmentStore, rng: random.Random) -> None:
        segment = sample_segment(rng)
        assert not store.has_segment(segment.header.shard, segment.segment_id)
        for attempt in (
            lambda: read(store, segment),
            lambda: store.read_tokens(SHARD, segment.segment_id),
            lambda: store.verify_segment(SHARD, segment.segment_id),
            lambda: list(store.iter_payload(SHARD, segment.segment_id)),
        ):
            with pytest.raises(SegmentCorruptError, match=segment.segment_id) as caught:
                attempt()
            assert "missing" in caught.value.message
            assert caught.value.hint

    def test_a_deleted_segment_is_gone_and_can_come_back(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        store.delete_segment(segment.header.shard, segment.segment_id)
        assert not store.has_segment(segment.header.shard, segment.segment_id)
        assert list(store.iter_segments()) == []
        store.delete_segment(segment.header.shard, segment.segment_id)
        put(store, segment)
        assert read(store, segment)[1] == segment.payload

    @pytest.mark.parametrize("where", ["preamble", "header", "padding", "payload", "digest"])
    def test_a_flipped_bit_is_never_served(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random, where: str
    ) -> None:
        segment = sample_segment(rng)
        prefix = len(segment.header.prefix)
        position = {
            "preamble": rng.randrange(16),
            "header": rng.randrange(16, 200),
            "padding": rng.randrange(prefix - 8, prefix),
            "payload": rng.randrange(prefix, prefix + segment.header.payload_length),
            "digest": -1 - rng.randrange(32),
        }[where]
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, flip_bit(position))
        with pytest.raises(SegmentCorruptError, match=segment.segment_id):
            read(store, segment)
        # Quarantined: the second attempt finds nothing, and a new put heals it.
        assert not store.has_segment(segment.header.shard, segment.segment_id)
        put(store, segment)
        assert read(store, segment)[1] == segment.payload

    @pytest.mark.parametrize("keep", [0, 1, 15, 16, 300, 4096, 4097, -33, -32, -1])
    def test_a_truncated_segment_is_never_served(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random, keep: int
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, cut(keep))
        with pytest.raises(SegmentCorruptError, match=segment.segment_id):
            read(store, segment)
        assert not store.has_segment(segment.header.shard, segment.segment_id)

    def test_a_longer_segment_is_never_served(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, lambda data: data + b"\0")
        with pytest.raises(SegmentCorruptError, match=segment.segment_id):
            store.verify_segment(segment.header.shard, segment.segment_id)

    def test_another_segment_under_its_name_is_never_served(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random
    ) -> None:
        segment, other = sample_segment(rng), sample_segment(rng)
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, lambda _: other.file)
        with pytest.raises(SegmentCorruptError, match="named after"):
            read(store, segment)

    @pytest.mark.parametrize("change", [cut(-1), cut(0), flip_bit(-40), flip_bit(0)])
    def test_a_damaged_segment_is_written_again_by_a_put(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random, change: Change
    ) -> None:
        """Who is told that it is stored would else rely on bytes that are not there."""
        segment = sample_segment(rng)
        put(store, segment)
        damage(segment.header.shard, segment.segment_id, change)
        put(store, segment)
        assert read(store, segment)[1] == segment.payload

    def test_presence_can_be_asked_with_a_length(
        self, store: SegmentStore, damage: DamageSegment, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        shard, name, length = segment.header.shard, segment.segment_id, segment.header.file_length
        put(store, segment)
        assert store.has_segment(shard, name, length)
        assert not store.has_segment(shard, name, length - 1)
        damage(shard, name, cut(-1))
        assert store.has_segment(shard, name)
        assert not store.has_segment(shard, name, length)

    def test_an_error_of_the_buffer_passes_through(
        self, store: SegmentStore, rng: random.Random
    ) -> None:
        segment = sample_segment(rng)
        put(store, segment)

        def no_room(header: SegmentHeader) -> memoryview:
            raise RamTierFullError(f"no room for {header.payload_length} bytes")

        with pytest.raises(RamTierFullError):
            store.read_segment(segment.header.shard, segment.segment_id, no_room)
        assert read(store, segment)[1] == segment.payload

    def test_many_threads(self, store: SegmentStore, rng: random.Random) -> None:
        segments = [sample_segment(rng) for _ in range(6)]

        def work(segment: SampleSegment) -> bytes:
            put(store, segment)
            return read(store, segment)[1]

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, segments * 4))
        assert results == [segment.payload for segment in segments * 4]
        assert {s.segment_id for s in store.iter_segments()} == {s.segment_id for s in segments}


class NamespaceStoreContract:
    """What `engram.store.base.NamespaceStore` promises."""

    @pytest.fixture
    def store(self) -> NamespaceStore:
        raise NotImplementedError("a fixture 'store' gives an empty store")

    def test_a_namespace_comes_back(self, store: NamespaceStore) -> None:
        namespace = Namespace({"model": "m", "layers": [1, 2], "scale": 0.5, "lora": None})
        store.put_namespace(namespace)
        store.put_namespace(namespace)
        assert store.get_namespace(namespace.id) == namespace

    def test_an_unknown_namespace_is_not_found(self, store: NamespaceStore) -> None:
        namespace = Namespace({"model": "m"})
        with pytest.raises(NotFoundError, match=namespace.id):
            store.get_namespace(namespace.id)


class ManifestStoreContract:
    """What `engram.store.base.ManifestStore` promises."""

    @pytest.fixture
    def store(self) -> ManifestStore:
        raise NotImplementedError("a fixture 'store' gives an empty store")

    @pytest.fixture
    def damage_manifest(self) -> DamageManifest:
        raise NotImplementedError("a fixture 'damage_manifest' changes a stored manifest's bytes")

    @pytest.fixture
    def manifest(self) -> Manifest:
        return sample_manifest([sample_chain(seeded_random())])

    def test_what_is_put_comes_back(self, store: ManifestStore, manifest: Manifest) -> None:
        entry = store.put_manifest(manifest)
        assert store.get_manifest(manifest.snapshot_id) == manifest
        assert store.list_manifests() == [entry]
        assert store.manifest_names() == {entry.name}
        assert store.manifest_entry(entry.name) == entry
        assert store.load_manifest(entry) == manifest
        assert list(store.iter_manifests()) == [manifest]

    def test_an_id_is_given_once(self, store: ManifestStore, manifest: Manifest) -> None:
        store.put_manifest(manifest)
        with pytest.raises(AlreadyExistsError, match=manifest.snapshot_id):
            store.put_manifest(change_manifest(manifest, pinned=True))
        assert store.get_manifest(manifest.snapshot_id) == manifest

    def test_a_replacement_takes_over_and_changes_the_stamp(
        self, store: ManifestStore, manifest: Manifest
    ) -> None:
        before = store.put_manifest(manifest)
        changed = change_manifest(manifest, user_metadata={"note": "kept"}, pinned=True)
        after = store.put_manifest(changed, replace=True)
        assert store.get_manifest(manifest.snapshot_id) == changed
        assert (after.name, after.stamp != before.stamp) == (before.name, True)
        assert store.list_manifests() == [after]

    def test_tenants_have_names_of_their_own(
        self, store: ManifestStore, manifest: Manifest
    ) -> None:
        theirs = change_manifest(manifest, tenant="them", pinned=True)
        store.put_manifest(manifest)
        store.put_manifest(theirs)
        assert store.get_manifest(manifest.snapshot_id) == manifest
        assert store.get_manifest(manifest.snapshot_id, "them") == theirs
        store.delete_manifest(manifest.snapshot_id)
        assert store.get_manifest(manifest.snapshot_id, "them") == theirs
        with pytest.raises(NotFoundError):
            store.get_manifest(manifest.snapshot_id)

    def test_a_deleted_manifest_is_gone(self, store: ManifestStore, manifest: Manifest) -> None:
        entry = store.put_manifest(manifest)
        store.delete_manifest(manifest.snapshot_id)
        store.delete_manifest(manifest.snapshot_id)
        assert store.list_manifests() == []
        assert store.manifest_names() == set()
        with pytest.raises(NotFoundError, match=manifest.snapshot_id):
            store.get_manifest(manifest.snapshot_id)
        assert isinstance(store.load_manifest(entry), DamagedManifest)

    @pytest.mark.parametrize(
        "change",
        [flip_bit(12), flip_bit(90), flip_bit(-3), cut(0), cut(40), cut(-1), lambda d: d + b"\n"],
        ids=["digest", "body", "end", "empty", "short", "shorter", "longer"],
    )
    def test_a_damaged_manifest_is_quarantined_and_reported(
        self,
        store: ManifestStore,
        damage_manifest: DamageManifest,
        manifest: Manifest,
        change: Change,
    ) -> None:
        good = change_manifest(manifest, snapshot_id="snap-2", turn_number=2)
        store.put_manifest(manifest)
        store.put_manifest(good)
        damage_manifest(manifest.snapshot_id, "", change)
        found = list(store.iter_manifests())
        assert good in found
        (damaged,) = [item for item in found if isinstance(item, DamagedManifest)]
        assert damaged.quarantined_to is not None
        assert damaged.reason
        assert list(store.iter_manifests()) == [good]

    def test_reading_a_damaged_manifest_says_which_file(
        self, store: ManifestStore, damage_manifest: DamageManifest, manifest: Manifest
    ) -> None:
        store.put_manifest(manifest)
        damage_manifest(manifest.snapshot_id, "", flip_bit(200))
        with pytest.raises(ManifestCorruptError, match=manifest.snapshot_id) as caught:
            store.get_manifest(manifest.snapshot_id)
        assert caught.value.details["file"]
        moved_to = caught.value.details["quarantined_to"]
        assert moved_to
        with pytest.raises(ManifestCorruptError, match=manifest.snapshot_id) as caught:
            store.get_manifest(manifest.snapshot_id)
        assert caught.value.details["quarantined_to"] == moved_to, "still the same damage"
        store.put_manifest(manifest)
        assert store.get_manifest(manifest.snapshot_id) == manifest

    def test_a_manifest_under_another_name_is_damage(
        self, store: ManifestStore, damage_manifest: DamageManifest, manifest: Manifest
    ) -> None:
        other = change_manifest(manifest, snapshot_id="snap-2", turn_number=2)
        store.put_manifest(manifest)
        store.put_manifest(other)
        damage_manifest(manifest.snapshot_id, "", lambda _: encode_manifest(other))
        with pytest.raises(ManifestCorruptError, match="another snapshot"):
            store.get_manifest(manifest.snapshot_id)
        assert store.get_manifest("snap-2") == other
