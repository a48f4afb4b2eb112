"""The keyring: which key opens a store, what damage leads to, and rotation, killed anywhere."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from engram.errors import (
    EncryptionKeyError,
    KeyringCorruptError,
    StoreBusyError,
    StoreError,
    StoreFormatError,
)
from engram.snapshot.envelope import seal_record
from engram.store.disk import DiskStore
from engram.store.keyring import MAX_DATA_KEYS, Keyring, rotate
from engram.store.keys import new_key
from engram.store.layout import Layout
from engram.testing.contracts import put, read
from engram.testing.faults import FaultyFileSystem, SimulatedCrash
from engram.testing.samples import SampleSegment, sample_segment, seeded_random

OLD, NEW, OTHER = new_key(), new_key(), new_key()


@pytest.fixture
def segment() -> SampleSegment:
    return sample_segment(seeded_random())


@pytest.fixture
def root(tmp_path: Path, segment: SampleSegment) -> Path:
    """A store under the old key that holds one segment."""
    with DiskStore.open(tmp_path / "store", key=OLD) as store:
        put(store, segment)
    return tmp_path / "store"


def body_of(root: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(Layout(root).keyring.read_bytes())["body"]
    return body


def test_the_store_is_opened_with_its_key_by_server_and_rank(
    root: Path, segment: SampleSegment
) -> None:
    with DiskStore.open(root, key=OLD) as store, DiskStore.open(root, lock=False, key=OLD) as rank:
        assert read(store, segment)[1] == read(rank, segment)[1] == segment.payload


@pytest.mark.parametrize("lock", [True, False])
def test_another_key_is_refused_and_both_are_named(root: Path, lock: bool) -> None:
    before = Layout(root).keyring.read_bytes()
    with pytest.raises(EncryptionKeyError, match="does not open this store") as caught:
        DiskStore.open(root, lock=lock, key=OTHER)
    assert caught.value.details == {"sealed_by": OLD.fingerprint, "given": OTHER.fingerprint}
    assert caught.value.hint
    assert Layout(root).keyring.read_bytes() == before
    DiskStore.open(root, key=OLD).close()  # the lock was given back


@pytest.mark.parametrize("lock", [True, False])
def test_an_encrypted_store_is_not_opened_without_a_key(root: Path, lock: bool) -> None:
    with pytest.raises(EncryptionKeyError, match="is encrypted, and no key is given") as caught:
        DiskStore.open(root, lock=lock)
    assert OLD.fingerprint in caught.value.hint


def test_a_rank_makes_no_keyring(tmp_path: Path) -> None:
    with pytest.raises(KeyringCorruptError, match="has no keyring"):
        DiskStore.open(tmp_path / "store", lock=False, key=OLD)
    assert not Layout(tmp_path / "store").keyring.exists()


def test_a_lost_keyring_is_not_replaced(root: Path, segment: SampleSegment) -> None:
    """A fresh one would open a store whose segments nothing can read any more."""
    keyring = Layout(root).keyring
    kept = keyring.read_bytes()
    keyring.unlink()
    with pytest.raises(KeyringCorruptError, match="is missing") as caught:
        DiskStore.open(root, key=OLD)
    assert "backup" in caught.value.hint
    assert not keyring.exists()
    with DiskStore.open(root) as store, pytest.raises(EncryptionKeyError, match="without a key"):
        read(store, segment)
    keyring.write_bytes(kept)
    with DiskStore.open(root, key=OLD) as store:
        assert read(store, segment)[1] == segment.payload


@pytest.mark.parametrize("key", [OLD, None])
def test_a_damaged_keyring_is_told_and_left_as_it_is(root: Path, key: Any) -> None:
    rng = seeded_random()
    keyring = Layout(root).keyring
    whole = keyring.read_bytes()
    damages = [b"", whole[:-1], whole[: len(whole) // 2], whole + b"\n", b"\0" * len(whole)]
    damages += [b"[" * 100_000, b"9" * (2 << 20)]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        keyring.write_bytes(damage)
        with pytest.raises(KeyringCorruptError, match="is damaged") as caught:
            DiskStore.open(root, key=key)
        assert "backup" in caught.value.hint
        assert str(keyring) in caught.value.message
        assert keyring.read_bytes() == damage


def test_every_field_is_sealed(root: Path) -> None:
    """A record whose digest was made right again opens nothing."""
    body = body_of(root)
    for name in ("keyring_id", "nonce", "sealed"):
        for place in (0, -1):
            text = list(body[name])
            text[place] = "0" if text[place] != "0" else "1"
            changed = {**body, name: "".join(text)}
            Layout(root).keyring.write_bytes(seal_record(changed))
            with pytest.raises(KeyringCorruptError, match="what it seals was changed"):
                DiskStore.open(root, key=OLD)
    Layout(root).keyring.write_bytes(seal_record({**body, "created_at": 5.0}))
    with pytest.raises(KeyringCorruptError, match="what it seals was changed"):
        DiskStore.open(root, key=OLD)
    Layout(root).keyring.write_bytes(seal_record({**body, "wrapped_by": OTHER.fingerprint}))
    for key in (OLD, OTHER):
        with pytest.raises((EncryptionKeyError, KeyringCorruptError)):
            DiskStore.open(root, key=key)


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "00"},
        {"nonce": None},
        {"sealed": "0"},
        {"sealed": ""},
        {"keyring_id": "xy"},
        {"created_at": "now"},
        {"created_at": -1.0},
        {"format": "1"},
        {"format": True},
        {"more": 1},
    ],
)
def test_a_record_of_another_shape_is_refused(root: Path, change: dict[str, Any]) -> None:
    Layout(root).keyring.write_bytes(seal_record({**body_of(root), **change}))
    with pytest.raises(KeyringCorruptError):
        DiskStore.open(root, key=OLD)


def test_a_newer_format_is_left_alone(root: Path) -> None:
    data = seal_record({"format": 2, "something": "else"})
    Layout(root).keyring.write_bytes(data)
    for key in (OLD, None):
        with pytest.raises(StoreFormatError, match="has format version 2"):
            DiskStore.open(root, key=key)
    assert Layout(root).keyring.read_bytes() == data


def test_nothing_shows_a_data_key(root: Path) -> None:
    keyring = Keyring.unseal(Layout(root).keyring.read_bytes(), OLD, "here")
    secret = keyring.data_key(keyring.current)
    assert secret is not None
    assert secret.hex() not in repr(keyring) + repr(vars(keyring).get("id"))
    stored = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert secret not in stored
    assert secret.hex().encode() not in stored


def test_a_keyring_is_bounded() -> None:
    keyring = Keyring("ab" * 16, 1.0, "", {str(n): bytes(32) for n in range(MAX_DATA_KEYS)})
    with pytest.raises(EncryptionKeyError, match="takes no more"):
        keyring.with_new_data_key()


# ---- rotation ----


def opens(root: Path, segment: SampleSegment) -> list[str]:
    """Which keys open the store; whichever does reads the segment."""
    found = []
    for name, key in (("old", OLD), ("new", NEW)):
        try:
            with DiskStore.open(root, key=key) as store:
                assert read(store, segment)[1] == segment.payload
            found.append(name)
        except EncryptionKeyError:
            pass
    return found


def test_after_a_rotation_the_old_key_is_refused(root: Path, segment: SampleSegment) -> None:
    files = {path: path.read_bytes() for path in root.rglob("*.seg")}
    old_record = Layout(root).keyring.read_bytes()
    rotate(root, OLD, NEW)
    assert opens(root, segment) == ["new"]
    assert {path: path.read_bytes() for path in root.rglob("*.seg")} == files
    later = sample_segment(seeded_random())
    with DiskStore.open(root, key=NEW) as store:
        put(store, later)
    rotate(root, NEW, OTHER)
    with DiskStore.open(root, key=OTHER) as store:
        assert read(store, segment)[1] == segment.payload
        assert read(store, later)[1] == later.payload
    # Who kept the old record and the old key reads nothing that was written since.
    Layout(root).keyring.write_bytes(old_record)
    with DiskStore.open(root, key=OLD) as store:
        assert read(store, segment)[1] == segment.payload
        with pytest.raises(EncryptionKeyError, match="does not have"):
            read(store, later)


def test_a_rotation_that_is_done_is_not_done_again(root: Path, segment: SampleSegment) -> None:
    rotate(root, OLD, NEW)
    record = Layout(root).keyring.read_bytes()
    rotate(root, OLD, NEW)
    assert Layout(root).keyring.read_bytes() == record
    assert opens(root, segment) == ["new"]


def test_what_cannot_be_rotated(root: Path, tmp_path: Path, segment: SampleSegment) -> None:
    with pytest.raises(EncryptionKeyError, match="does not open"):
        rotate(root, OTHER, NEW)
    with pytest.raises(EncryptionKeyError, match="the same"):
        rotate(root, OLD, OLD)
    DiskStore.open(tmp_path / "plain").close()
    for place in (tmp_path / "plain", tmp_path / "missing"):
        with pytest.raises(EncryptionKeyError, match="no keyring"):
            rotate(place, OLD, NEW)
    assert not (tmp_path / "missing").exists()
    with DiskStore.open(root, key=OLD), pytest.raises(StoreBusyError):
        rotate(root, OLD, NEW)
    assert opens(root, segment) == ["old"]


WRITES = ("create_temp", "write", "fsync", "rename", "fsync_dir")


@pytest.mark.parametrize("short", [None, 7])
@pytest.mark.parametrize("operation", WRITES)
def test_a_rotation_killed_at_any_step_leaves_the_one_key_or_the_other(
    root: Path, segment: SampleSegment, operation: str, short: int | None
) -> None:
    """Every call of every operation it makes, one after another."""
    killed = 0
    while True:
        fs = FaultyFileSystem(short=short).fail(operation, after=killed, crash=True)
        try:
            rotate(root, OLD, NEW, fs)
        except SimulatedCrash:
            killed += 1
            renamed = operation == "fsync_dir"
            assert opens(root, segment) == ["new" if renamed else "old"]
            assert not list(root.rglob("*.tmp"))  # the next opening has removed it
            if renamed:
                break
        else:
            break
        if killed > 3 and operation == "write":
            break
    assert killed
    rotate(root, OLD, NEW)
    assert opens(root, segment) == ["new"]


@pytest.mark.parametrize("operation", WRITES)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_rotation_that_fails_says_so(
    root: Path, segment: SampleSegment, operation: str, error: int
) -> None:
    with pytest.raises(StoreError):
        rotate(root, OLD, NEW, FaultyFileSystem().fail(operation, error=error))
    assert opens(root, segment) == ["new" if operation == "fsync_dir" else "old"]
    rotate(root, OLD, NEW)
    assert opens(root, segment) == ["new"]


@pytest.mark.parametrize("operation", WRITES)
def test_a_first_opening_killed_at_any_step_can_be_repeated(
    tmp_path: Path, segment: SampleSegment, operation: str
) -> None:
    root = tmp_path / "store"
    for after in range(3):
        try:
            fs = FaultyFileSystem().fail(operation, after=after, crash=True)
            DiskStore.open(root, fs=fs, key=OLD).close()
        except SimulatedCrash:
            pass
    with DiskStore.open(root, key=OLD) as store:
        put(store, segment)
    with DiskStore.open(root, key=OLD) as store:
        assert read(store, segment)[1] == segment.payload
