"""The kinds of files a store reads, each changed, placed, read and judged: `KINDS`.

Allowed is what the format documents say: an error of the right class, with the file quarantined or
left alone as it should be, or a value that is byte for byte what lies there (`faults.judging`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from unittest import mock

from blake3 import blake3

from engram.core.ids import check_id
from engram.core.namespace import Namespace
from engram.errors import (
    EncryptionKeyError,
    EngramError,
    KeyringCorruptError,
    ManifestCorruptError,
    NotFoundError,
    StoreFormatError,
)
from engram.snapshot.listing import DamagedManifest, ManifestEntry, manifest_name
from engram.snapshot.manifest import Manifest, encode_manifest
from engram.snapshot.segment import (
    MAGIC,
    PAGE_BYTES,
    PREAMBLE,
    VERSION,
    Shard,
)
from engram.store import encryption
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.keyring import load_keyring
from engram.store.keys import new_key
from engram.store.layout import Layout, is_digest
from engram.store.marker import Marker, check_marker
from engram.testing.samples import sample_chain, sample_manifest
from faults.judging import (
    DIGEST,
    Hostile,
    WrongError,
    body_of,
    newer_record,
    read_segment,
    refused,
    require_sealed,
    require_unchanged,
    sealed,
)
from faults.mutations import BYTES, EXTREMES, dumps, mutate_json

SMALL_CHUNK: Final = 512
"""Small segments have many chunks of this; the real length is used as often."""


class Unsynced(FileSystem):
    """Durability is not what is looked at here."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


class Arena:
    """Two stores, one of them encrypted, and what is in them."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.fs = Unsynced()
        self.key = new_key()
        self.clear = DiskStore.open(folder / "clear", fs=self.fs)
        self.sealed = DiskStore.open(folder / "sealed", fs=self.fs, key=self.key)
        self.layouts = {store: Layout(store.root) for store in (self.clear, self.sealed)}
        keyring = load_keyring(self.layouts[self.sealed], self.key, self.fs)
        assert keyring is not None
        self.keyring = keyring
        self.roots = {name: folder / name for name in ("marked", "locked", "foreign")}
        for name, root in self.roots.items():
            DiskStore.open(root, fs=self.fs, key=None if name == "marked" else self.key).close()
        self.shard = Shard(Namespace({"model": "m"}).id, 0, 1)
        chains = [sample_chain(rng, lengths) for lengths in ((5, 3, 4), (1,), (40, 2))]
        self.segments = [segment for chain in chains for segment in chain]
        self.plain = {segment.segment_id: segment.file for segment in self.segments}
        two = [
            sample_chain(rng, (3, 2), shard=Shard(self.shard.namespace, rank, 2)) for rank in (0, 1)
        ]
        for ours, other in zip(two[0], two[1], strict=True):
            assert ours.header.end == other.header.end
        one_key = [[*two[0]], [*two[0]]]
        metadata = {"title": "é", "n": [1, 2.5, None, True], "deep": {"a": {"b": [{}]}}}
        self.manifests = [
            sample_manifest([chains[0]], user_metadata=metadata, expires_at=1.8e9, rid="r-1"),
            sample_manifest([chains[1]], snapshot_id="snap-2", tenant="team", pinned=True),
            sample_manifest(one_key, snapshot_id="snap-3", parent_snapshot="snap-2", health="h"),
        ]
        self.namespaces = [
            Namespace({"model": "m", "layers": [1, 2], "scale": 0.5, "lora": None, "on": True}),
            Namespace({"kv.dtype": "BF16", "page_size": 1, "tp_size": 2}),
        ]

    def encrypted(self, plain: bytes, shard: Shard, segment_id: str) -> bytes:
        parts = encryption.encrypt([plain], len(plain), self.keyring, shard, segment_id)
        return b"".join(bytes(part) for part in parts)


# ---- changing ----


def changed_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    how = rng.choice(list(BYTES))
    return how, BYTES[how](rng, data, others)


def changed_record(rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """A record with changed bytes, or with a changed body under a digest that fits again."""
    if rng.random() < 0.4:
        return changed_bytes(rng, data, others)
    how, text = mutate_json(rng, json.loads(data)["body"])
    try:
        sealed = dumps(json.loads(text))
    except (ValueError, RecursionError):
        sealed = text
    digest = blake3(sealed).hexdigest().encode()
    return f"body: {how}", b'{"blake3":"' + digest + b'","body":' + text + b"}\n"


def changed_segment(rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    """A segment file with changed bytes, or with a changed header and all else fitting again."""
    if rng.random() < 0.35:
        how, data = changed_bytes(rng, data, others)
        if rng.random() < 0.5:
            return f"{how}, digest right", data[:-DIGEST] + blake3(data[:-DIGEST]).digest()
        return how, data
    length = PREAMBLE.unpack_from(data)[2]
    start = -(-(PREAMBLE.size + length) // PAGE_BYTES) * PAGE_BYTES
    payload = data[start:-DIGEST]
    header = json.loads(data[PREAMBLE.size : PREAMBLE.size + length])
    if rng.random() < 0.15:
        return "header: consistent, for a longer file", _inflated(rng, header, payload)
    how, text = mutate_json(rng, header)
    version = VERSION if rng.random() < 0.97 else rng.choice(EXTREMES) % 2**32
    claimed = len(text) if rng.random() < 0.9 else rng.choice(EXTREMES) % 2**32
    prefix = PREAMBLE.pack(MAGIC, version, claimed % 2**32) + text
    prefix = prefix.ljust(-(-len(prefix) // PAGE_BYTES) * PAGE_BYTES, b"\0")
    payload = payload.ljust(min(_claimed_payload(text, len(payload)), 1 << 20), b"\0")
    whole = prefix + payload[: max(0, _claimed_payload(text, len(payload)))]
    return f"header: {how}", whole + blake3(whole).digest()


def _inflated(rng: random.Random, header: dict[str, Any], payload: bytes) -> bytes:
    """A file whose header promises a much larger last buffer than there is, and is else right."""
    last, factor = header["buffers"][-1], rng.choice((2, 2**10, 2**20, 2**30))
    last["shape"][0] *= factor
    last["length"] *= factor
    text = dumps(header)
    prefix = PREAMBLE.pack(MAGIC, VERSION, len(text)) + text
    whole = prefix.ljust(-(-len(prefix) // PAGE_BYTES) * PAGE_BYTES, b"\0") + payload
    return whole + blake3(whole).digest()


def _claimed_payload(text: bytes, otherwise: int) -> int:
    """The payload that a header asks for, where it can be told."""
    with suppress(ValueError, RecursionError, KeyError, IndexError, TypeError):
        last = json.loads(text)["buffers"][-1]
        claimed = last["offset"] + last["length"]
        if type(claimed) is int and 0 <= claimed < 1 << 40:
            return claimed
    return otherwise


def _claimed_shard(data: bytes, otherwise: Shard) -> Shard:
    with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        header = json.loads(data[PREAMBLE.size :][: int.from_bytes(data[12:16], "little")])
        shard = Shard(header["namespace"], header["rank"], header["world_size"])
        small = all(type(n) is int and 0 <= n < 1000 for n in (shard.rank, shard.world_size))
        if isinstance(shard.namespace, str) and is_digest(shard.namespace) and small:
            return shard
    return otherwise


# ---- kinds of files ----


def manifest(arena: Arena, rng: random.Random) -> str:
    """A manifest, under its name or under the one that its changed ids have."""
    known = rng.choice(arena.manifests)
    original = encode_manifest(known)
    others = [encode_manifest(other) for other in arena.manifests]
    how, data = changed_record(rng, original, others)
    tenant, snapshot_id = known.tenant, known.snapshot_id
    if rng.random() < 0.3:
        with suppress(ValueError, RecursionError, KeyError, TypeError, EngramError):
            body = json.loads(data)["body"]
            check_id("snapshot_id", body["snapshot_id"])
            if body["tenant"]:
                check_id("tenant", body["tenant"])
            tenant, snapshot_id = body["tenant"], body["snapshot_id"]
    name = manifest_name(snapshot_id, tenant)
    case = _place(arena, how, arena.layouts[arena.clear].manifest(name), data, original)
    found: Manifest | DamagedManifest | EngramError
    if rng.random() < 0.5:
        found = arena.clear.load_manifest(ManifestEntry(name, ""))
    else:
        try:
            found = arena.clear.get_manifest(snapshot_id, tenant)
        except (ManifestCorruptError, StoreFormatError) as error:
            found = error
    if isinstance(found, Manifest):
        if encode_manifest(found) != data or (found.snapshot_id, found.tenant) != (
            snapshot_id,
            tenant,
        ):
            raise WrongError("the manifest is not what lies there")
        require_sealed(case)
        return "accepted, byte for byte"
    newer = isinstance(found, StoreFormatError) or (
        isinstance(found, DamagedManifest) and found.quarantined_to is None
    )
    return refused(case, newer, newer_record(data, "version", 1))


def segment(arena: Arena, rng: random.Random) -> str:
    """A segment in the clear, under its name or under that of its changed content."""
    known = rng.choice(arena.segments)
    how, data = changed_segment(rng, known.file, [s.file for s in arena.segments])
    name, shard = known.segment_id, known.header.shard
    if rng.random() < 0.75 and len(data) >= DIGEST:
        name, shard = data[-DIGEST:].hex(), _claimed_shard(data, shard)
    path = arena.layouts[arena.clear].segment(shard, name)
    case = _place(arena, how, path, data, known.file)
    return read_segment(arena.clear, case, shard, name, data, rng.randrange(3))


def encrypted_segment(arena: Arena, rng: random.Random) -> str:
    """An encrypted segment: changed on the disk, or with a changed content under the right key."""
    chunk = rng.choice((SMALL_CHUNK, encryption.CHUNK_BYTES))
    with mock.patch.object(encryption, "CHUNK_BYTES", chunk):
        known, other = rng.choice(arena.segments), rng.choice(arena.segments)
        name, shard, plain = known.segment_id, known.header.shard, known.file
        original = arena.encrypted(plain, shard, name)
        way = rng.random()
        if way < 0.4:
            others = [arena.encrypted(other.file, other.header.shard, other.segment_id), plain]
            how, data = changed_bytes(rng, original, others)
        elif way < 0.6:
            how, data = _changed_encrypted_header(rng, original)
        elif way < 0.75:
            how, data = _changed_chunks(rng, original, chunk)
        else:
            how, plain = changed_segment(rng, plain, [s.file for s in arena.segments])
            if len(plain) >= DIGEST and rng.random() < 0.8:
                name = plain[-DIGEST:].hex()
            how, data = f"encrypted: {how}", arena.encrypted(plain, shard, name)
        if rng.random() < 0.1:
            how, shard = f"{how}, other shard", Shard(shard.namespace, 1, 3)
        path = arena.layouts[arena.sealed].segment(shard, name)
        case = _place(arena, how, path, data, original)
        try:
            return read_segment(arena.sealed, case, shard, name, plain, rng.randrange(3))
        except EncryptionKeyError:
            unknown = arena.keyring.data_key(data[16:32].hex()) is None
            if not unknown or blake3(data[:72]).digest() != data[72:104]:
                raise WrongError("damage was taken for a missing key") from None
            require_unchanged(case)
            return "refused: a data key that is not here"


def _changed_encrypted_header(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    place, size = rng.choice(((8, 4), (12, 4), (16, 16), (32, 32), (64, 8)))
    value = rng.choice(
        (rng.randbytes(size), (rng.choice(EXTREMES) % 2**32).to_bytes(size, "little"))
    )
    head = data[:place] + value + data[place + size : 72]
    return f"header at {place}, digest right", head + blake3(head).digest() + data[104:]


def _changed_chunks(rng: random.Random, data: bytes, chunk: int) -> tuple[str, bytes]:
    step = chunk + encryption.TAG_BYTES
    head, body = data[:104], data[104:]
    parts = [body[place : place + step] for place in range(0, len(body), step)]
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    how = rng.choice(("exchanged", "left out", "twice", "last left out"))
    if how == "exchanged":
        parts[one], parts[other] = parts[other], parts[one]
    elif how == "left out":
        del parts[one]
    elif how == "twice":
        parts.insert(other, parts[one])
    else:
        parts.pop()
    return f"chunks {how}", head + b"".join(parts)


def namespace(arena: Arena, rng: random.Random) -> str:
    """The description of a namespace, under its name or under that of its changed content."""
    known = rng.choice(arena.namespaces)
    others = [other.canonical for other in arena.namespaces]
    if rng.random() < 0.4:
        how, data = changed_bytes(rng, known.canonical, others)
    else:
        how, data = mutate_json(rng, json.loads(known.canonical))
    name = blake3(data).hexdigest() if rng.random() < 0.7 else known.id
    path = arena.layouts[arena.clear].namespace(name)
    case = _place(arena, how, path, data, known.canonical)
    try:
        found = arena.clear.get_namespace(name)
    except NotFoundError:
        return refused(case, False, False)
    if found.canonical != data or found.id != name or blake3(data).hexdigest() != name:
        raise WrongError("the namespace is not what lies there")
    return "accepted, byte for byte"


def marker(arena: Arena, rng: random.Random) -> str:
    """The marker: rebuilt, or the directory is of a newer format."""
    root = arena.roots["marked"]
    path = Layout(root).marker
    original = path.read_bytes()
    others = [arena.layouts[arena.clear].marker.read_bytes(), encode_manifest(arena.manifests[0])]
    how, data = changed_record(rng, original, others)
    case = _place(arena, how, path, data, original)
    try:
        try:
            with DiskStore.open(root, fs=arena.fs) as store:
                rebuilt = store.marker_rebuilt
        except StoreFormatError:
            if not newer_record(data, "format", 1):
                raise WrongError("a damaged marker was taken for a newer one") from None
            require_unchanged(case)
            return "refused as newer"
        if check_marker(Layout(root), arena.fs) is not Marker.INTACT:
            raise WrongError("the marker was not made whole")
        intact = sealed(data) and body_of(data).get("format") == 1
        if rebuilt == (intact and type(body_of(data)["format"]) is int):
            raise WrongError("an intact marker was rebuilt, or a damaged one taken")
        return "rebuilt" if rebuilt else "accepted, byte for byte"
    finally:
        path.write_bytes(original)


def keyring(arena: Arena, rng: random.Random) -> str:
    """The keyring: only the very file opens the store, and no other is touched."""
    layout = Layout(arena.roots["locked"])
    original = layout.keyring.read_bytes()
    foreign = Layout(arena.roots["foreign"]).keyring.read_bytes()
    how, data = changed_record(
        rng, original, [foreign, arena.layouts[arena.clear].marker.read_bytes()]
    )
    case = _place(arena, how, layout.keyring, data, original)
    key = arena.key if rng.random() < 0.8 else None
    try:
        DiskStore.open(layout.root, fs=arena.fs, key=key).close()
        outcome = "accepted, byte for byte"
        # Another store's keyring under the same key opens: it is intact. Its data keys are others.
        if key is None or data not in (original, foreign):
            raise WrongError("a keyring opened that is not the store's")
    except KeyringCorruptError:
        outcome = "refused as damaged"
    except StoreFormatError:
        outcome = "refused as newer"
        if not newer_record(data, "format", 1):
            raise WrongError("a damaged keyring was taken for a newer one") from None
    except EncryptionKeyError:
        outcome = "refused: the key is another"
        if not sealed(data):
            raise WrongError("damage was taken for another key") from None
    finally:
        unchanged = layout.keyring.read_bytes() == case.data
        layout.keyring.write_bytes(original)
    if not unchanged:
        raise WrongError("the keyring was touched")
    return outcome


KINDS: Final[dict[str, Callable[[Arena, random.Random], str]]] = {
    "manifest": manifest,
    "segment": segment,
    "encrypted segment": encrypted_segment,
    "namespace": namespace,
    "marker": marker,
    "keyring": keyring,
}
WEIGHTS: Final = (30, 25, 25, 8, 5, 7)


def _place(arena: Arena, how: str, path: Path, data: bytes, original: bytes) -> Hostile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    case = Hostile(how, path, data, original)
    current.append(case)
    return case


current: list[Hostile] = []
"""The case under way, for the report if it goes wrong."""


def clean(arena: Arena) -> None:
    """Remove what a case has left."""
    for case in current:
        if (
            case.path.suffix == ".seg"
            or "manifests" in case.path.parts
            or "namespaces" in case.path.parts
        ):
            case.path.unlink(missing_ok=True)
    for root in (arena.clear.root, arena.sealed.root, arena.roots["marked"]):
        quarantine = Layout(root).quarantine
        if quarantine.is_dir():
            for path in quarantine.iterdir():
                path.unlink()
