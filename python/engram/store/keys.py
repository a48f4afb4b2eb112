"""The operator's key: what it looks like, where it comes from, and how it is kept out of sight.

A key is 32 random bytes, spelled ``engram-key-1:`` and 64 lower-case hex digits. It never encrypts
a segment: it wraps the data keys of a store's keyring (`engram.store.keyring`).
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final, NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from engram.errors import EncryptionKeyError
from engram.store.durable import store_error, sync_directory
from engram.store.filesystem import FileSystem

KEY_VARIABLE: Final = "ENGRAM_SNAPSHOT_KEY"
KEY_BYTES: Final = 32
FINGERPRINT_BYTES: Final = 16
_PREFIX: Final = "engram-key-1:"
_FORM: Final = re.compile(re.escape(_PREFIX) + r"([0-9a-f]{64})\n?", re.ASCII)
_MAX_FILE_BYTES: Final = 4096
_MAKE_ONE: Final = "make one with `engram key new FILE`"
_FINGERPRINT_INFO: Final = b"engram key fingerprint 1"


class Key:
    """A key in memory. Shown and logged it is its fingerprint; it cannot be pickled.

    ``fingerprint`` is 32 hex digits that tell two keys apart and nothing about either.
    """

    __slots__ = ("_secret", "fingerprint")

    def __init__(self, secret: bytes) -> None:
        """``secret`` is `KEY_BYTES` long."""
        assert len(secret) == KEY_BYTES
        self._secret = secret
        self.fingerprint = derive(secret, b"", _FINGERPRINT_INFO, FINGERPRINT_BYTES).hex()

    def wrapping_key(self, salt: bytes, info: bytes) -> bytes:
        """A key of `KEY_BYTES` for one purpose, derived by HKDF-SHA256."""
        return derive(self._secret, salt, info)

    def text(self) -> str:
        """The key spelled as a key file has it, line feed included."""
        return f"{_PREFIX}{self._secret.hex()}\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and secrets.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Key({self.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled")


def derive(secret: bytes, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), length, salt, info).derive(secret)


def new_key() -> Key:
    """A random key."""
    return Key(secrets.token_bytes(KEY_BYTES))


def parse_key(text: str, where: str) -> Key:
    """The key that ``text`` spells; ``where`` it was found is named in the error.

    Raises `EncryptionKeyError`, which never repeats what was found.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise EncryptionKeyError(
            f"{where} holds no key: it must be {_PREFIX!r} and 64 lower-case hex digits",
            hint=_MAKE_ONE,
        )
    return Key(bytes.fromhex(match[1]))


def read_key_file(path: Path | str) -> Key:
    """The key in a file that nobody but this user (or root) can have written or read.

    Raises `EncryptionKeyError`.
    """
    where = f"the key file {path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise EncryptionKeyError(
            f"{where} cannot be read: {error.strerror}", hint=f"name a key file, or {_MAKE_ONE}"
        ) from error
    try:
        status = os.fstat(fd)
        _require_private(status, where)
        data = os.read(fd, _MAX_FILE_BYTES)
    except OSError as error:
        raise EncryptionKeyError(f"{where} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    return parse_key(data.decode("ascii", "replace"), where)


def key_from_environment() -> Key | None:
    """The key in ``ENGRAM_SNAPSHOT_KEY``; None where that is not set. `EncryptionKeyError`."""
    text = os.environ.get(KEY_VARIABLE)
    return None if text is None else parse_key(text, f"the variable {KEY_VARIABLE}")


def find_key(key_file: Path | str | None) -> Key | None:
    """The key of a file if one is named, else of the environment; None without either.

    Raises `EncryptionKeyError`, also where both are given: which was meant is not for us to guess.
    """
    in_environment = KEY_VARIABLE in os.environ
    if key_file is None:
        return key_from_environment()
    if in_environment:
        raise EncryptionKeyError(
            f"a key file is named and {KEY_VARIABLE} is set",
            hint="give the key in one of the two ways",
        )
    return read_key_file(key_file)


def write_key_file(path: Path, key: Key) -> None:
    """Write a key file for this user alone, durably. An existing file is never replaced.

    Raises `EncryptionKeyError` if there is one, `StoreError` where the system refuses.
    """
    # Not the durable writer, which replaces what is there: a key that is gone is gone for good.
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise EncryptionKeyError(
            f"{path} exists and may hold a key that something needs", hint="name a new file"
        ) from None
    except OSError as error:
        raise store_error("make", path, error) from error
    try:
        os.fchmod(fd, 0o600)
        os.write(fd, key.text().encode())
        os.fsync(fd)
    except OSError as error:
        os.unlink(path)
        raise store_error("write", path, error) from error
    finally:
        os.close(fd)
    sync_directory(path.absolute().parent, FileSystem())


def publish_in_memory(key: Key) -> str:
    """Where child processes of this user find the key: a key file that is on no disk.

    It lives as long as this process. The path names it for other processes too.
    """
    fd = os.memfd_create("engram-key", os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.write(fd, key.text().encode())
    return f"/proc/{os.getpid()}/fd/{fd}"


def _require_private(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise EncryptionKeyError(f"{where} is not a regular file", hint="name a key file")
    if status.st_uid not in (0, os.geteuid()):
        raise EncryptionKeyError(
            f"{where} belongs to another user", hint="a key file belongs to the server's user"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise EncryptionKeyError(
            f"{where} is open to other users: its mode is {mode:04o}",
            hint=f"chmod 600 it; if others may have read it, {_MAKE_ONE} and rotate",
        )
