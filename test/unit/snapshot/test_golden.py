"""Files written by the first Engram with format version 1 decode to what was put in, for ever."""

import struct
from pathlib import Path

import pytest
from blake3 import blake3

from engram.core.tokens import tokens_digest
from engram.snapshot.digest import verify
from engram.snapshot.manifest import decode_manifest, encode_manifest
from engram.snapshot.segment import PREAMBLE, SegmentHeader, payload_offset
from engram.store.disk import DiskStore
from engram.store.layout import Layout

DATA = Path(__file__).parents[2] / "data" / "format-v1"
NAMESPACE = "0c2614534fbdc1f56ad5a8c0dc2c8532da620144be37cd2ec12ae0ee221cff17"
SEGMENTS = {
    "segment-1": "c132a5e6c573dfc1c9a9451bfd8d664692c7a5b4911a802cb30cbc394394aec4",
    "segment-2": "41517ed8d89b286a5ed336d4109c8444f20839f99d57a64c4df116242bd0c349",
    "segment-3": "6e965297e1cd42e82907f86586291cf39e1998ef975c314b49bb26efe0cc5e77",
}
KEYS = {
    "segment-1": "76a6b6e33a525e3b0c3b31d0c3e1a5f03d1d365faddefb8f4dc50006a2acd7c5",
    "segment-2": "5972ace753c3e7b364b73649ff2dac35b45a544f23851c47b33886d0bd33a484",
}


def load(name: str) -> tuple[SegmentHeader, memoryview, bytes]:
    data = (DATA / f"{name}.seg").read_bytes()
    start = payload_offset(data[: PREAMBLE.size])
    return SegmentHeader.decode(data[:start]), memoryview(data)[start:-32], data[-32:]


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_digest(name: str) -> None:
    data = (DATA / f"{name}.seg").read_bytes()
    assert blake3(data[:-32]).digest() == data[-32:]
    assert data[-32:].hex() == SEGMENTS[name]
    header, payload, digest = load(name)
    verify(header, payload, digest)


def test_the_first_segment() -> None:
    header, payload, _ = load("segment-1")
    assert (header.namespace, header.rank, header.world_size) == (NAMESPACE, 0, 1)
    assert (header.start, header.end, header.parent) == (0, 3, None)
    assert (header.key, header.has_state) == (KEYS["segment-1"], False)
    assert [(b.name, b.dtype, b.shape, b.offset, b.length) for b in header.buffers] == [
        ("tokens", "U32", (3,), 0, 12),
        ("kv.0", "BF16", (3, 2, 3), 64, 36),
    ]
    assert struct.unpack("<3I", header.view(payload, "tokens")) == (1, 70000, 2**32 - 1)
    assert bytes(header.view(payload, "kv.0")) == bytes(range(1, 37))


def test_the_second_segment() -> None:
    header, payload, _ = load("segment-2")
    assert (header.start, header.end, header.parent) == (3, 5, SEGMENTS["segment-1"])
    assert (header.key, header.has_state) == (KEYS["segment-2"], False)
    assert [(b.name, b.dtype, b.shape, b.offset, b.length) for b in header.buffers] == [
        ("tokens", "U32", (2,), 0, 8),
        ("kv.0", "BF16", (2, 2, 3), 64, 24),
    ]
    assert struct.unpack("<2I", header.view(payload, "tokens")) == (5, 6)
    assert bytes(header.view(payload, "kv.0")) == bytes(range(40, 64))


def test_the_state() -> None:
    header, payload, _ = load("segment-3")
    assert (header.start, header.end, header.parent) == (5, 5, SEGMENTS["segment-2"])
    assert (header.key, header.has_state) == (KEYS["segment-2"], True)
    assert [(b.name, b.dtype, b.shape, b.offset, b.length) for b in header.buffers] == [
        ("conv.1", "BF16", (3, 3), 0, 18),
        ("ssm.1", "F32", (3, 5), 64, 60),
    ]
    assert bytes(header.view(payload, "conv.1")) == bytes(range(100, 118))
    values = struct.unpack("<15f", header.view(payload, "ssm.1"))
    assert values == tuple(i / 4 for i in range(15))


def test_the_manifest() -> None:
    data = (DATA / "manifest.json").read_bytes()
    manifest = decode_manifest(data)
    assert encode_manifest(manifest) == data
    assert manifest.model_dump(exclude={"segments"}) == {
        "version": 1,
        "snapshot_id": "snap-golden",
        "tenant": "team",
        "conversation_id": "conversation:1",
        "branch_name": "main",
        "turn_number": 2,
        "parent_snapshot": "snap-before",
        "created_at": 1_700_000_000.25,
        "namespace": NAMESPACE,
        "model_name": "tiny",
        "layer_config": {"num_layers": 2, "model_type": "granitemoehybrid"},
        "token_count": 5,
        "pending_tokens": (7, 8),
        "tokens_digest": tokens_digest([1, 70000, 2**32 - 1, 5, 6, 7, 8]),
        "durability": "sync",
        "bytes": 12696,
        "unique_bytes": 8468,
        "health": None,
        "user_metadata": {"title": "é", "n": [1, 2.5, None, True]},
        "pinned": True,
        "expires_at": 1_800_000_000.0,
        "rid": "request-1",
        "prompt_count": None,  # absent in the file
    }
    ((first, second, third),) = manifest.segments
    assert (first.segment_id, first.key, first.start, first.end, first.has_state, first.bytes) == (
        SEGMENTS["segment-1"], KEYS["segment-1"], 0, 3, False, 4228,
    )  # fmt: skip
    assert (second.segment_id, second.key, second.start, second.end) == (
        SEGMENTS["segment-2"], KEYS["segment-2"], 3, 5,
    )  # fmt: skip
    assert (second.has_state, second.bytes) == (False, 4216)
    assert (third.segment_id, third.key, third.start, third.end) == (
        SEGMENTS["segment-3"], KEYS["segment-2"], 5, 5,
    )  # fmt: skip
    assert (third.has_state, third.bytes) == (True, 4252)


def test_a_store_serves_them(tmp_path: Path) -> None:
    manifest = decode_manifest((DATA / "manifest.json").read_bytes())
    with DiskStore.open(tmp_path / "store") as store:
        for name, segment_id in SEGMENTS.items():
            header, payload, _ = load(name)
            path = Layout(store.root).segment(header.shard, segment_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((DATA / f"{name}.seg").read_bytes())
            buffer = memoryview(bytearray(header.payload_length))
            assert store.read_segment(header.shard, segment_id, lambda _, b=buffer: b) == header
            assert buffer == payload
        entry = store.put_manifest(manifest)
        assert entry.name == blake3(b"team/snap-golden").hexdigest() + ".json"
