"""Encrypted segments: decrypted by hand, changed everywhere, moved, and opened with other keys."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from engram.errors import EncryptionKeyError, SegmentCorruptError, StoreFormatError
from engram.snapshot.segment import Shard
from engram.store import encryption
from engram.store.disk import DiskStore
from engram.store.encryption import (
    CHUNK_BYTES,
    HEADER_BYTES,
    TAG_BYTES,
    DecryptingReader,
    encrypt,
    encrypted_length,
)
from engram.store.keyring import Keyring
from engram.store.keys import new_key, parse_key
from engram.store.layout import Layout
from engram.testing.contracts import put, read
from engram.testing.samples import SHARD, SampleSegment, sample_segment, seeded_random

DATA = Path(__file__).parents[2] / "data" / "encryption-v1"
GOLDEN_SHARD = Shard("0c2614534fbdc1f56ad5a8c0dc2c8532da620144be37cd2ec12ae0ee221cff17", 0, 1)
GOLDEN = {
    "segment-1": "c132a5e6c573dfc1c9a9451bfd8d664692c7a5b4911a802cb30cbc394394aec4",
    "segment-2": "41517ed8d89b286a5ed336d4109c8444f20839f99d57a64c4df116242bd0c349",
    "segment-3": "6e965297e1cd42e82907f86586291cf39e1998ef975c314b49bb26efe0cc5e77",
}
KEY = new_key()


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def decrypt_by_hand(
    key_text: str, keyring: bytes, file: bytes, shard: Shard, segment_id: str
) -> bytes:
    """What docs/format/encryption.md says, with nothing of Engram's."""
    secret = bytes.fromhex(key_text.strip().removeprefix("engram-key-1:"))
    body = json.loads(keyring)["body"]
    assert body["wrapped_by"] == hkdf(secret, b"", b"engram key fingerprint 1", 16).hex()
    wrapping = hkdf(secret, bytes.fromhex(body["keyring_id"]), b"engram keyring 1")
    rest = {name: value for name, value in body.items() if name != "sealed"}
    keys = json.loads(
        AESGCM(wrapping).decrypt(
            bytes.fromhex(body["nonce"]), bytes.fromhex(body["sealed"]), canonical(rest)
        )
    )

    assert file[:8] == b"ENGRENC\0"
    version, zero, key_id, salt, length = struct.unpack("<II16s32sQ", file[8:72])
    assert (version, zero) == (1, 0)
    assert blake3(file[:72]).digest() == file[72:104]
    cipher = AESGCM(hkdf(bytes.fromhex(keys["keys"][key_id.hex()]), salt, b"engram segment 1"))
    identity = bytes.fromhex(shard.namespace) + bytes.fromhex(segment_id)
    identity += struct.pack("<QQ", shard.rank, shard.world_size)
    plain, place, index = b"", 104, 0
    while place < len(file):
        chunk = file[place : place + (1 << 20) + 16]
        associated = file[:72] + identity + struct.pack("<Q", index)
        plain += cipher.decrypt(struct.pack("<QI", index, 0), chunk, associated)
        place, index = place + len(chunk), index + 1
    assert len(plain) == length
    return plain


@pytest.fixture
def rng() -> random.Random:
    return seeded_random()


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore.open(tmp_path / "store", key=KEY)


def file_of(store: DiskStore, segment: SampleSegment) -> Path:
    return Layout(store.root).segment(segment.header.shard, segment.segment_id)


def long_segment(rng: random.Random) -> SampleSegment:
    """Its file is two whole chunks and a part of a third."""
    return sample_segment(rng, length=(2 * CHUNK_BYTES + CHUNK_BYTES // 3) // 28)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_files_are_what_the_document_says(name: str) -> None:
    file, keyring = (DATA / f"{name}.seg").read_bytes(), (DATA / "keyring.json").read_bytes()
    key = (DATA / "key").read_text()
    plain = decrypt_by_hand(key, keyring, file, GOLDEN_SHARD, GOLDEN[name])
    assert plain[-32:].hex() == GOLDEN[name] == blake3(plain[:-32]).hexdigest()

    def read_file(buffer: memoryview, offset: int) -> None:
        buffer[:] = file[offset : offset + len(buffer)]

    opened = Keyring.unseal(keyring, parse_key(key, "golden"), "golden")
    reader = DecryptingReader(read_file, len(file), opened, GOLDEN_SHARD, GOLDEN[name])
    out = bytearray(reader.length)
    reader(memoryview(out), 0)
    assert out == plain


def test_a_store_serves_the_golden_files(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.keyring.write_bytes((DATA / "keyring.json").read_bytes())
    key = parse_key((DATA / "key").read_text(), "golden")
    with DiskStore.open(tmp_path, key=key) as store:
        for name, segment_id in GOLDEN.items():
            path = layout.segment(GOLDEN_SHARD, segment_id)
            path.parent.mkdir(parents=True)
            path.write_bytes((DATA / f"{name}.seg").read_bytes())
            header = store.verify_segment(GOLDEN_SHARD, segment_id)
            assert header.has_state == (name == "segment-3")


@pytest.mark.parametrize("make", [sample_segment, long_segment])
def test_what_is_written_is_what_the_document_says(
    store: DiskStore, rng: random.Random, make: Callable[[random.Random], SampleSegment]
) -> None:
    segment = make(rng)
    put(store, segment)
    file = file_of(store, segment).read_bytes()
    keyring = Layout(store.root).keyring.read_bytes()
    assert decrypt_by_hand(KEY.text(), keyring, file, SHARD, segment.segment_id) == segment.file
    assert len(file) == encrypted_length(len(segment.file))
    assert read(store, segment) == (segment.header, segment.payload)
    header, tokens = store.read_tokens(SHARD, segment.segment_id)
    assert (header, tuple(tokens.tolist())) == (segment.header, segment.tokens)
    assert store.verify_segment(SHARD, segment.segment_id) == segment.header


def test_nothing_of_a_segment_is_in_the_clear(store: DiskStore, rng: random.Random) -> None:
    segment = long_segment(rng)
    put(store, segment)
    stored = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    for place in range(0, len(segment.file), 4099):
        piece = segment.file[place : place + 16]
        if any(piece):  # not the padding
            assert piece not in stored


def test_a_file_never_has_the_key_of_another(store: DiskStore, rng: random.Random) -> None:
    """Written again it is another file: a key and a nonce are used once."""
    segment = sample_segment(rng)
    put(store, segment)
    before = file_of(store, segment).read_bytes()
    store.delete_segment(SHARD, segment.segment_id)
    put(store, segment)
    after = file_of(store, segment).read_bytes()
    assert before[24:56] != after[24:56]
    assert before[HEADER_BYTES:] != after[HEADER_BYTES:]


def test_any_length_in_any_pieces(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "CHUNK_BYTES", 64)
    keyring, name = Keyring.new(), "ab" * 32
    for length in [*range(1, 10), *range(62, 67), *range(126, 131), 1000]:
        plain = rng.randbytes(length)
        cuts = sorted(rng.choices(range(length + 1), k=rng.randrange(6)))
        parts = [plain[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        file = b"".join(bytes(part) for part in encrypt(parts, length, keyring, SHARD, name))
        assert len(file) == encrypted_length(length)

        def read_file(buffer: memoryview, offset: int, file: bytes = file) -> None:
            assert offset + len(buffer) <= len(file)
            buffer[:] = file[offset : offset + len(buffer)]

        reader = DecryptingReader(read_file, len(file), keyring, SHARD, name)
        for _ in range(40):
            start = rng.randrange(length)
            out = bytearray(rng.randrange(length - start + 1))
            reader(memoryview(out), start)
            assert out == plain[start : start + len(out)]
        with pytest.raises(SegmentCorruptError, match="cut short"):
            reader(memoryview(bytearray(2)), length - 1)


def test_a_change_anywhere_is_refused(store: DiskStore, rng: random.Random) -> None:
    """Every byte of the header, and bytes of every chunk and tag."""
    segment = long_segment(rng)
    put(store, segment)
    path = file_of(store, segment)
    whole = path.read_bytes()
    step = CHUNK_BYTES + TAG_BYTES
    ends = [min(HEADER_BYTES + step * (index + 1), len(whole)) for index in range(3)]
    places = [*range(HEADER_BYTES), *(end - back for end in ends for back in range(1, 20))]
    places += [rng.randrange(len(whole)) for _ in range(30)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(SegmentCorruptError, match=segment.segment_id):
            read(store, segment)
        assert not path.exists()
    assert store.stats().quarantined > 0
    put(store, segment)
    assert read(store, segment)[1] == segment.payload


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: -TAG_BYTES - 5],
        lambda data: data[: HEADER_BYTES + CHUNK_BYTES + TAG_BYTES],
        lambda data: data[:HEADER_BYTES],
        lambda data: data[: HEADER_BYTES - 1],
        lambda data: data[:8],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data + bytes(CHUNK_BYTES),
        lambda data: data[:HEADER_BYTES] + data[HEADER_BYTES + CHUNK_BYTES + TAG_BYTES :],
    ],
)
def test_another_length_is_refused(
    store: DiskStore, rng: random.Random, change: Callable[[bytes], bytes]
) -> None:
    segment = long_segment(rng)
    put(store, segment)
    path = file_of(store, segment)
    path.write_bytes(change(path.read_bytes()))
    assert not store.has_segment(SHARD, segment.segment_id, segment.header.file_length)
    with pytest.raises(SegmentCorruptError, match=segment.segment_id):
        store.verify_segment(SHARD, segment.segment_id)
    assert not path.exists()


def test_swapped_chunks_are_refused(store: DiskStore, rng: random.Random) -> None:
    segment = long_segment(rng)
    put(store, segment)
    path, step = file_of(store, segment), CHUNK_BYTES + TAG_BYTES
    data = path.read_bytes()
    head, first = data[:HEADER_BYTES], data[HEADER_BYTES : HEADER_BYTES + step]
    second, rest = (
        data[HEADER_BYTES + step : HEADER_BYTES + 2 * step],
        data[HEADER_BYTES + 2 * step :],
    )
    path.write_bytes(head + second + first + rest)
    with pytest.raises(SegmentCorruptError, match="chunk 0"):
        read(store, segment)


def test_swapped_files_are_refused(store: DiskStore, rng: random.Random) -> None:
    """Within a shard, and to the same name of another shard."""
    one, other = (sample_segment(rng) for _ in range(2))
    put(store, one)
    put(store, other)
    first, second = file_of(store, one), file_of(store, other)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    for segment in (one, other):
        with pytest.raises(SegmentCorruptError, match="chunk 0"):
            read(store, segment)
    put(store, one)
    for shard in (
        Shard(SHARD.namespace, 0, 2),
        Shard("ab" * 32, 0, 1),
        Shard(SHARD.namespace, 1, 2),
    ):
        elsewhere = Layout(store.root).segment(shard, one.segment_id)
        elsewhere.parent.mkdir(parents=True)
        elsewhere.write_bytes(first.read_bytes())
        with pytest.raises(SegmentCorruptError, match="chunk 0"):
            store.verify_segment(shard, one.segment_id)


def test_a_newer_version_is_left_alone(store: DiskStore, rng: random.Random) -> None:
    segment = sample_segment(rng)
    put(store, segment)
    path = file_of(store, segment)
    data = bytearray(path.read_bytes())
    data[8] = 2
    data[72:104] = blake3(data[:72]).digest()
    path.write_bytes(data)
    with pytest.raises(StoreFormatError, match="an encrypted segment has format version 2"):
        read(store, segment)
    with pytest.raises(StoreFormatError):
        put(store, segment)
    assert path.read_bytes() == data


def test_a_header_with_a_right_digest_and_wrong_fields(
    store: DiskStore, rng: random.Random
) -> None:
    segment = sample_segment(rng)
    put(store, segment)
    path = file_of(store, segment)
    whole = path.read_bytes()
    for place in range(12, 72):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        data[72:104] = blake3(data[:72]).digest()
        path.write_bytes(data)
        wanted = EncryptionKeyError if 16 <= place < 32 else SegmentCorruptError
        with pytest.raises(wanted):
            read(store, segment)


def test_an_unknown_data_key_is_named_and_the_file_stays(
    tmp_path: Path, store: DiskStore, rng: random.Random
) -> None:
    segment = sample_segment(rng)
    with DiskStore.open(tmp_path / "foreign", key=KEY) as foreign:
        put(foreign, segment)
        data = file_of(foreign, segment).read_bytes()
    path = file_of(store, segment)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(EncryptionKeyError, match="which the keyring does not have") as caught:
        read(store, segment)
    assert caught.value.hint
    assert path.read_bytes() == data
    # Stored again it is readable: the same segment, under this store's key.
    put(store, segment)
    assert read(store, segment)[1] == segment.payload


def test_presence_with_a_length_is_that_of_the_segment(
    store: DiskStore, rng: random.Random
) -> None:
    segment = long_segment(rng)
    put(store, segment)
    assert store.has_segment(SHARD, segment.segment_id, segment.ref.bytes)
    assert not store.has_segment(SHARD, segment.segment_id, segment.ref.bytes + 1)
    assert file_of(store, segment).stat().st_size > segment.ref.bytes


def test_what_lay_there_in_the_clear_stays_readable(tmp_path: Path, rng: random.Random) -> None:
    root = tmp_path / "store"
    before, after = sample_segment(rng), sample_segment(rng)
    with DiskStore.open(root) as store:
        put(store, before)
    with DiskStore.open(root, key=KEY) as store:
        put(store, before)
        put(store, after)
        assert file_of(store, before).read_bytes() == before.file
        assert file_of(store, after).read_bytes()[:8] == encryption.MAGIC
        for segment in (before, after):
            assert store.has_segment(SHARD, segment.segment_id, segment.ref.bytes)
            assert read(store, segment)[1] == segment.payload


def test_a_payload_is_not_copied_as_a_whole(store: DiskStore, rng: random.Random) -> None:
    """Whole chunks are decrypted right into the caller's memory."""
    segment = long_segment(rng)
    put(store, segment)
    opened: list[int] = []
    real = DecryptingReader._open_chunk

    def spy(self: DecryptingReader, index: int, size: int, into: memoryview) -> None:
        opened.append(index)
        real(self, index, size, into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecryptingReader, "_open_chunk", spy)
        read(store, segment)
    # Once each: the first for the header and what follows it, the last also for the digest.
    assert opened == [0, 1, 2]
