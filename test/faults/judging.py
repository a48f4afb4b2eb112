"""What a store may make of a changed file, told without the code that the store uses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from engram.errors import SegmentCorruptError, StoreFormatError
from engram.snapshot.segment import MAGIC, PREAMBLE, VERSION, SegmentHeader, Shard
from engram.store import encryption
from engram.store.disk import DiskStore
from faults.mutations import dumps

DIGEST: Final = 32


class WrongError(AssertionError):
    """The store did what it must not do."""


@dataclass(frozen=True)
class Hostile:
    """A changed file. ``how`` it was changed; ``original`` is what lay in its place."""

    how: str
    path: Path
    data: bytes
    original: bytes


def read_segment(
    store: DiskStore, case: Hostile, shard: Shard, name: str, plain: bytes, way: int
) -> str:
    """Read a segment in ``way`` 0, 1 or 2. ``plain`` is the segment file that lies there."""
    payload = bytearray()

    def into(header: SegmentHeader) -> memoryview:
        if header.payload_length > len(plain) + len(case.data):
            raise WrongError(
                f"{header.payload_length} bytes were asked for a file of {len(case.data)}"
            )
        payload.extend(bytes(header.payload_length))
        return memoryview(payload)

    try:
        if way == 0:
            header = store.verify_segment(shard, name)
            start = len(header.prefix)
            payload.extend(plain[start : start + header.payload_length])
        elif way == 1:
            header, tokens = store.read_tokens(shard, name)
            if tokens.tobytes() != plain[len(header.prefix) :][: tokens.nbytes]:
                raise WrongError("the tokens are not what lies there")
            return "tokens alone, byte for byte"
        else:
            header = store.read_segment(shard, name, into)
    except SegmentCorruptError:
        return refused(case, False, False)
    except StoreFormatError:
        newer = _newer_segment(plain, name)
        return refused(case, True, newer or _newer_encrypted(case.data))
    if header.prefix + bytes(payload) != plain[:-DIGEST] or header.shard != shard:
        raise WrongError("the segment is not what lies there")
    if blake3(header.prefix + bytes(payload)).hexdigest() != name:
        raise WrongError("the segment is not what its name says")
    return "accepted, byte for byte"


def refused(case: Hostile, newer: bool, is_newer: bool) -> str:
    """What is damaged is moved aside, what is newer stays."""
    if newer != is_newer:
        raise WrongError(f"refused as {'newer' if newer else 'damaged'}, which it is not")
    if newer:
        require_unchanged(case)
        return "refused as newer"
    if case.path.exists():
        raise WrongError("a damaged file was left in its place")
    return "refused as damaged"


def require_unchanged(case: Hostile) -> None:
    """What is not damaged stays as it is."""
    if not case.path.exists() or case.path.read_bytes() != case.data:
        raise WrongError("a file that is not damaged was touched")


def require_sealed(case: Hostile) -> None:
    """What is accepted has the right digest."""
    if case.data != case.original and not sealed(case.data):
        raise WrongError("a file was accepted whose digest is wrong")


def body_of(data: bytes) -> dict[str, Any]:
    """The body of a record, if it has one; its digest may be wrong."""
    try:
        record = json.loads(data)
        body = record["body"] if record.keys() == {"blake3", "body"} else None
    except (ValueError, RecursionError, AttributeError):
        return {}
    return body if isinstance(body, dict) else {}


def sealed(data: bytes) -> bool:
    """Whether a record is whole, told without the code that the store uses."""
    body = body_of(data)
    if not body:
        return False
    try:
        text = dumps(body)
        text.decode()
    except (ValueError, RecursionError):
        return False
    digest = blake3(text).hexdigest().encode()
    whole = b'{"blake3":"' + digest + b'","body":' + text + b"}\n"
    return whole == data and b"NaN" not in text and b"Infinity" not in text


def newer_record(data: bytes, name: str, ours: int) -> bool:
    """Whether a whole record says that it is of another format."""
    found = body_of(data).get(name)
    return sealed(data) and type(found) is int and found != ours


def _newer_segment(plain: bytes, name: str) -> bool:
    if len(plain) < PREAMBLE.size + DIGEST or plain[:8] != MAGIC:
        return False
    version = int.from_bytes(plain[8:12], "little")
    return version != VERSION and blake3(plain[:-DIGEST]).hexdigest() == name


def _newer_encrypted(data: bytes) -> bool:
    version = int.from_bytes(data[8:12], "little")
    whole = len(data) >= 104 and blake3(data[:72]).digest() == data[72:104]
    return whole and data[:8] == encryption.MAGIC and version != encryption.VERSION
