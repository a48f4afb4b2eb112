"""The keyring: a store's data keys, sealed by the operator's key, in one small record.

Segments are encrypted under data keys that never change and never leave the keyring in the clear.
Another operator's key means another seal around the same data keys: no segment is written again.
The bytes are described in ``docs/format/encryption.md``.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, Field, ValidationError

from engram.core.canonical import canonical_json
from engram.errors import EncryptionKeyError, KeyringCorruptError, StoreFormatError
from engram.snapshot.envelope import open_record, seal_record
from engram.snapshot.fields import CLOSED, Seconds, first_problem
from engram.store.durable import sync_directory, write_durable
from engram.store.filesystem import FileSystem
from engram.store.keys import KEY_BYTES, Key
from engram.store.layout import Layout
from engram.store.lock import StoreLock
from engram.store.record_files import read_small_file

FORMAT: Final = 1
ID_BYTES: Final = 16
NONCE_BYTES: Final = 12
MAX_KEYRING_BYTES: Final = 1 << 20
MAX_DATA_KEYS: Final = 4096
"""A rotation adds one: enough for eleven years of daily rotations."""
_WRAP_INFO: Final = b"engram keyring 1"
_HEX_ID: Final = rf"^[0-9a-f]{{{2 * ID_BYTES}}}$"


class _Record(BaseModel):
    """The body of the keyring's record; ``sealed`` is AES-256-GCM over the data keys."""

    model_config = CLOSED

    format: int
    keyring_id: str = Field(pattern=_HEX_ID)
    created_at: Seconds
    wrapped_by: str = Field(pattern=_HEX_ID)
    nonce: str = Field(pattern=rf"^[0-9a-f]{{{2 * NONCE_BYTES}}}$")
    sealed: str = Field(pattern=r"^([0-9a-f]{2})+$")


class Keyring:
    """Data keys by id, and which one new segments are encrypted under. Immutable, never shown."""

    def __init__(
        self, keyring_id: str, created_at: float, current: str, keys: Mapping[str, bytes]
    ) -> None:
        self.id = keyring_id
        self.created_at = created_at
        self.current = current
        self._keys = dict(keys)

    @classmethod
    def new(cls) -> Keyring:
        """A keyring with one data key."""
        return cls(secrets.token_hex(ID_BYTES), time.time(), "", {}).with_new_data_key()

    def with_new_data_key(self) -> Keyring:
        """The same keys and a random one, which is the current one then."""
        if len(self._keys) >= MAX_DATA_KEYS:
            raise EncryptionKeyError(
                f"the keyring holds {MAX_DATA_KEYS} data keys and takes no more",
                hint="export the snapshots into a store of their own",
            )
        added = secrets.token_hex(ID_BYTES)
        keys = {**self._keys, added: secrets.token_bytes(KEY_BYTES)}
        return Keyring(self.id, self.created_at, added, keys)

    def data_key(self, key_id: str) -> bytes | None:
        """A data key; None if this keyring does not have it."""
        return self._keys.get(key_id)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Keyring({self.id}, {len(self)} data keys)"

    def seal(self, key: Key) -> bytes:
        """The bytes of the record, sealed by ``key``."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "keyring_id": self.id,
            "created_at": self.created_at,
            "wrapped_by": key.fingerprint,
            "nonce": secrets.token_hex(NONCE_BYTES),
        }
        keys = {name: value.hex() for name, value in self._keys.items()}
        plain = canonical_json({"current": self.current, "keys": keys})
        sealed = _wrapper(key, self.id).encrypt(
            bytes.fromhex(fields["nonce"]), plain, canonical_json(fields)
        )
        return seal_record({**fields, "sealed": sealed.hex()})

    @classmethod
    def unseal(cls, data: bytes, key: Key, where: str) -> Keyring:
        """The keyring in a record; ``where`` it lies is named in errors.

        Raises `EncryptionKeyError` for another key than it is sealed by, `KeyringCorruptError`, or
        `StoreFormatError` for an intact record of another format.
        """
        record, fields = _decode(data, where)
        if record.wrapped_by != key.fingerprint:
            raise EncryptionKeyError(
                f"the key does not open this store: {where} is sealed by key {record.wrapped_by}, "
                f"the one given is {key.fingerprint}",
                hint="give the store's key; after a rotation that is the new one",
                details={"sealed_by": record.wrapped_by, "given": key.fingerprint},
            )
        try:
            plain = _wrapper(key, record.keyring_id).decrypt(
                bytes.fromhex(record.nonce), bytes.fromhex(record.sealed), canonical_json(fields)
            )
        except InvalidTag:
            raise _corrupt(where, "what it seals was changed") from None
        body = json.loads(plain)
        keys = {name: bytes.fromhex(value) for name, value in body["keys"].items()}
        return cls(record.keyring_id, record.created_at, body["current"], keys)


def load_keyring(layout: Layout, key: Key, fs: FileSystem) -> Keyring | None:
    """The keyring of a store; None if it has none. Errors as `Keyring.unseal`, and `StoreError`."""
    data = read_small_file(layout.keyring, MAX_KEYRING_BYTES, fs)
    return None if data is None else Keyring.unseal(data, key, str(layout.keyring))


def sealed_by(layout: Layout, fs: FileSystem) -> str | None:
    """The fingerprint of the key that a store's keyring is sealed by; None if it has no keyring.

    Raises `KeyringCorruptError`, `StoreFormatError` or `StoreError`.
    """
    data = read_small_file(layout.keyring, MAX_KEYRING_BYTES, fs)
    return None if data is None else _decode(data, str(layout.keyring))[0].wrapped_by


def write_keyring(layout: Layout, keyring: Keyring, key: Key, fs: FileSystem) -> None:
    """Put a keyring in place, durably and at once; whoever calls holds the store's lock."""
    data = keyring.seal(key)
    write_durable(layout.keyring, [data], needed=len(data), fs=fs)


def rotate(root: Path, old: Key, new: Key, fs: FileSystem | None = None) -> Keyring:
    """Seal a store's keyring by ``new`` instead of ``old``, and add a data key.

    What is written from now on can then not be read by who had the old key and kept the old
    record. Killed at any instant it leaves the one record or the other; to do again what is done
    already makes it durable. Raises `StoreBusyError` while a server uses the store, and what
    `Keyring.unseal` raises.
    """
    layout, fs = Layout(root.absolute()), fs or FileSystem()
    if old == new:
        raise EncryptionKeyError(
            "the old key and the new one are the same", hint="make one with `engram key new FILE`"
        )
    _sealed_by(layout, fs)
    lock = StoreLock.acquire(layout.lock)
    try:
        if _sealed_by(layout, fs) == new.fingerprint:
            keyring = load_keyring(layout, new, fs)
            sync_directory(layout.root, fs)
        else:
            keyring = load_keyring(layout, old, fs)
            if keyring is not None:
                keyring = keyring.with_new_data_key()
                write_keyring(layout, keyring, new, fs)
    finally:
        lock.release()
    assert keyring is not None
    return keyring


def _sealed_by(layout: Layout, fs: FileSystem) -> str:
    fingerprint = sealed_by(layout, fs)
    if fingerprint is None:
        raise EncryptionKeyError(
            f"{layout.root} has no keyring: no segment in it is encrypted",
            hint="name a --snapshot-dir that was used with a key",
        )
    return fingerprint


def _decode(data: bytes, where: str) -> tuple[_Record, dict[str, object]]:
    """The record, and what of it is authenticated with the data keys."""
    try:
        if len(data) > MAX_KEYRING_BYTES:
            raise ValueError("too long")
        body = open_record(data)
    except ValueError as error:
        raise _corrupt(where, str(error)) from None
    found = body.get("format")
    if type(found) is int and found != FORMAT:
        raise StoreFormatError.of(f"the keyring {where}", found, FORMAT)
    try:
        record = _Record.model_validate(body, strict=True)
    except ValidationError as error:
        raise _corrupt(where, first_problem(error)) from None
    return record, {name: value for name, value in body.items() if name != "sealed"}


def _wrapper(key: Key, keyring_id: str) -> AESGCM:
    return AESGCM(key.wrapping_key(bytes.fromhex(keyring_id), _WRAP_INFO))


def _corrupt(where: str, what: str) -> KeyringCorruptError:
    return KeyringCorruptError(
        f"the keyring {where} is damaged: {what}",
        hint="put the file back from a backup: without it no encrypted segment can be read",
        details={"file": where},
    )
