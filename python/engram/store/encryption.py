"""The encrypted form of a segment file: what is on the disk of a store that has a keyring.

What is encrypted is a whole segment file as `engram.snapshot.segment` has it, in chunks, each under
AES-256-GCM with the segment's identity as associated data. The byte table is in
``docs/format/encryption.md``.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from engram.core.canonical import DIGEST_BYTES
from engram.errors import EncryptionKeyError, SegmentCorruptError, StoreFormatError
from engram.snapshot.segment import Shard
from engram.store.keyring import Keyring
from engram.store.keys import derive

MAGIC: Final = b"ENGRENC\0"
VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 20
TAG_BYTES: Final = 16
SALT_BYTES: Final = 32
_FIELDS: Final = struct.Struct(f"<8sI4x16s{SALT_BYTES}sQ")
"""Magic, version, data key's id, salt, length of what is encrypted."""
HEADER_BYTES: Final = _FIELDS.size + DIGEST_BYTES
_IDENTITY: Final = struct.Struct("<32s32sQQ")
"""Namespace, segment id, rank, world size."""
_INDEX: Final = struct.Struct("<Q")
_SEGMENT_INFO: Final = b"engram segment 1"


class ReadExactly(Protocol):
    """Fills ``buffer`` from ``offset``; raises `SegmentCorruptError` if there are fewer bytes."""

    def __call__(self, buffer: memoryview, offset: int) -> None: ...


def encrypted_length(length: int) -> int:
    """Bytes of the encrypted file of a segment file of ``length`` bytes."""
    return HEADER_BYTES + length + TAG_BYTES * _chunks(length)


def is_encrypted(beginning: bytes) -> bool:
    """Whether a file that begins like this is an encrypted segment, of whatever version."""
    return beginning[: len(MAGIC)] == MAGIC


def encrypt(
    parts: Iterable[memoryview | bytes],
    length: int,
    keyring: Keyring,
    shard: Shard,
    segment_id: str,
) -> Iterator[memoryview | bytes]:
    """The parts of the encrypted file of a segment file whose ``parts`` are ``length`` bytes.

    Each is valid until the next is asked for. The salt, and with it the key, is never used again.
    """
    data_key = keyring.data_key(keyring.current)
    assert data_key is not None
    salt = secrets.token_bytes(SALT_BYTES)
    header = _seal_header(keyring.current, salt, length)
    yield header
    cipher, identity = _cipher(data_key, salt), _identity(shard, segment_id)
    sealed = memoryview(bytearray(min(length, CHUNK_BYTES) + TAG_BYTES))
    for index, chunk in enumerate(_chunked(parts)):
        out = sealed[: len(chunk) + TAG_BYTES]
        cipher.encrypt_into(_nonce(index), chunk, _associated(header, identity, index), out)
        yield out


class DecryptingReader:
    """Reads an encrypted file as if it were the segment file it holds. For one thread.

    ``length`` is the length of that. Every byte it gives has passed its chunk's tag.
    """

    def __init__(
        self,
        read: ReadExactly,
        file_length: int,
        keyring: Keyring | None,
        shard: Shard,
        segment_id: str,
    ) -> None:
        """``read`` reads the encrypted file, which has ``file_length`` bytes.

        Raises `SegmentCorruptError`, `EncryptionKeyError` if there is no key for it, or
        `StoreFormatError` for an intact header of another version.
        """
        if file_length < HEADER_BYTES:
            raise SegmentCorruptError("encrypted segment is cut short in its header")
        header = bytearray(HEADER_BYTES)
        read(memoryview(header), 0)
        self._header = bytes(header)
        key_id, salt, self.length = _open_header(self._header)
        if file_length != encrypted_length(self.length):
            raise SegmentCorruptError(
                f"encrypted segment has {file_length} bytes instead of "
                f"{encrypted_length(self.length)}"
            )
        self._cipher = _cipher(_data_key(keyring, key_id), salt)
        self._identity = _identity(shard, segment_id)
        self._read = read
        room = min(self.length, CHUNK_BYTES)
        self._sealed = memoryview(bytearray(room + TAG_BYTES))
        self._plain = memoryview(bytearray(room))
        self._held: int | None = None

    def __call__(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of the segment file. Raises `SegmentCorruptError`."""
        if offset + len(buffer) > self.length:
            raise SegmentCorruptError("segment is cut short")
        while buffer:
            index, skipped = divmod(offset, CHUNK_BYTES)
            size = min(CHUNK_BYTES, self.length - index * CHUNK_BYTES)
            count = min(size - skipped, len(buffer))
            if count == size and self._held != index:
                self._open_chunk(index, size, buffer[:count])
            else:
                if self._held != index:
                    self._held = None
                    self._open_chunk(index, size, self._plain[:size])
                    self._held = index
                buffer[:count] = self._plain[skipped : skipped + count]
            buffer = buffer[count:]
            offset += count

    def _open_chunk(self, index: int, size: int, into: memoryview) -> None:
        sealed = self._sealed[: size + TAG_BYTES]
        self._read(sealed, HEADER_BYTES + index * (CHUNK_BYTES + TAG_BYTES))
        associated = _associated(self._header, self._identity, index)
        try:
            self._cipher.decrypt_into(_nonce(index), sealed, associated, into)
        except InvalidTag:
            raise SegmentCorruptError(
                f"chunk {index} of the encrypted segment is not what was written here"
            ) from None


def _seal_header(key_id: str, salt: bytes, length: int) -> bytes:
    fields = _FIELDS.pack(MAGIC, VERSION, bytes.fromhex(key_id), salt, length)
    return fields + blake3(fields).digest()


def _open_header(header: bytes) -> tuple[str, bytes, int]:
    """Data key's id, salt, length."""
    fields = header[: _FIELDS.size]
    if blake3(fields).digest() != header[_FIELDS.size :]:
        raise SegmentCorruptError("the header of the encrypted segment is damaged")
    _, version, key_id, salt, length = _FIELDS.unpack(fields)
    if version != VERSION:
        raise StoreFormatError.of("an encrypted segment", version, VERSION)
    if _FIELDS.pack(MAGIC, version, key_id, salt, length) != fields:
        raise SegmentCorruptError("the header of the encrypted segment is not in its one form")
    return key_id.hex(), salt, length


def _data_key(keyring: Keyring | None, key_id: str) -> bytes:
    if keyring is None:
        raise EncryptionKeyError(
            "the segment is encrypted, and the store was opened without a key",
            hint="give the store's key",
        )
    key = keyring.data_key(key_id)
    if key is None:
        raise EncryptionKeyError(
            f"the segment is encrypted under data key {key_id}, which the keyring does not have",
            hint="put back the keyring that was in use when it was written",
            details={"data_key": key_id},
        )
    return key


def _cipher(data_key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(derive(data_key, salt, _SEGMENT_INFO))


def _identity(shard: Shard, segment_id: str) -> bytes:
    return _IDENTITY.pack(
        bytes.fromhex(shard.namespace), bytes.fromhex(segment_id), shard.rank, shard.world_size
    )


def _associated(header: bytes, identity: bytes, index: int) -> bytes:
    return header[: _FIELDS.size] + identity + _INDEX.pack(index)


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "little")


def _chunks(length: int) -> int:
    return -(-length // CHUNK_BYTES)


def _chunked(parts: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """The bytes of ``parts`` in chunks: whole ones as they lie, others gathered in one buffer."""
    gathered = memoryview(bytearray(CHUNK_BYTES))
    held = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            if not held and len(rest) >= CHUNK_BYTES:
                yield rest[:CHUNK_BYTES]
                rest = rest[CHUNK_BYTES:]
                continue
            count = min(len(rest), CHUNK_BYTES - held)
            gathered[held : held + count] = rest[:count]
            held, rest = held + count, rest[count:]
            if held == CHUNK_BYTES:
                yield gathered
                held = 0
    if held:
        yield gathered[:held]
