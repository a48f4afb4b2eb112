"""Small stores with conversations in them."""

import hashlib
from pathlib import Path
from random import Random

from engram.catalog.catalog import Catalog
from engram.core.canonical import blake3_hex
from engram.core.namespace import Namespace
from engram.core.tokens import tokens_to_bytes
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import TOKENS, SegmentHeader, Shard
from engram.store.disk import DiskStore
from engram.testing.samples import (
    SampleSegment,
    sample_manifest,
    sample_segment,
    sample_state,
    sample_turns,
)

NAMESPACE = Namespace({"model": "a model", "page_size": 1})
LENGTHS = (5, 3, 4)


def put_chain(store: DiskStore, chain: list[SampleSegment]) -> None:
    for segment in chain:
        store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)


def branch_inside(rng: Random, chain: list[SampleSegment]) -> list[SampleSegment]:
    """The chain of a turn that leaves ``chain`` one token before its second rows end."""
    first, second, shard = chain[0], chain[1], chain[0].header.shard
    tokens = second.tokens[:-1]
    key = blake3_hex(bytes.fromhex(first.header.key) + tokens_to_bytes(tokens))
    header = second.header.model_copy(update={"end": second.header.end - 1, "key": key})
    part = SampleSegment(header, second.payload, tokens, second.segment_id)
    own = sample_segment(rng, shard=shard, parent=part, length=4)
    return [first, part, own, sample_state(rng, own)]


def add_conversation(
    store: DiskStore, rng: Random, name: str = "talk", *, ranks: int = 1, tenant: str = ""
) -> list[Manifest]:
    """Three turns on main, each on the one before, and a branch from within the second."""
    seed = rng.randrange(2**32)
    turns: list[list[list[SampleSegment]]] = [[] for _ in range(4)]
    for rank in range(ranks):
        # The same tokens, and so the same keys, on every rank.
        own = Random(seed)
        chains = sample_turns(own, LENGTHS, shard=Shard(NAMESPACE.id, rank, ranks))
        chains.append(branch_inside(own, chains[1]))
        for chain in chains[:3]:
            put_chain(store, chain)
        put_chain(store, chains[3][2:])
        for turn, chain in zip(turns, chains, strict=True):
            turn.append(chain)
    store.put_namespace(NAMESPACE)
    manifests = [
        sample_manifest(
            chains,
            snapshot_id=f"{name}-{branch}-{turn}",
            conversation_id=name,
            branch_name=branch,
            turn_number=turn,
            parent_snapshot=parent and f"{name}-{parent}",
            created_at=1_700_000_000.0 + turn + (0.5 if branch != "main" else 0.0),
            tenant=tenant,
            rid=f"rid-{name}-{turn}",
        )
        for chains, (branch, turn, parent) in zip(
            turns,
            (
                ("main", 1, None),
                ("main", 2, "main-1"),
                ("main", 3, "main-2"),
                ("other", 3, "main-2"),
            ),
            strict=True,
        )
    ]
    for manifest in manifests:
        store.put_manifest(manifest)
    return manifests


def make_store(root: Path, rng: Random, **options: int) -> list[Manifest]:
    """A store of one conversation, and its catalog."""
    with DiskStore.open(root) as store:
        manifests = add_conversation(store, rng, **options)
        Catalog.open(store.catalog_path, store).close()
    return manifests


def contents(root: Path) -> dict[str, str]:
    """Every file of a folder with the digest of its bytes, every folder too."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in root.rglob("*")
    }


def make_large_store(root: Path, size: int = 96 << 20) -> int:
    """A store of one snapshot, ``large``, whose one segment has ``size`` bytes; returns that."""
    header = SegmentHeader.plan(
        shard=Shard(NAMESPACE.id, 0, 1),
        key="ab" * 32,
        start=0,
        end=3,
        parent=None,
        has_state=False,
        buffers=[("kv.0", "U8", (3, size // 3))],
    )
    payload = memoryview(bytearray(header.payload_length))
    header.view(payload, TOKENS)[:] = tokens_to_bytes([1, 2, 3])
    with DiskStore.open(root) as store:
        segment = SampleSegment(header, b"", (1, 2, 3), store.put_segment(header, payload))
        store.put_namespace(NAMESPACE)
        store.put_manifest(sample_manifest([[segment]], snapshot_id="large"))
    return size
