"""Small stores with conversations in them."""

import hashlib
from pathlib import Path
from random import Random

from engram.catalog.catalog import Catalog
from engram.core.namespace import Namespace
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.testing.samples import SampleSegment, sample_chain, sample_manifest

NAMESPACE = Namespace({"model": "a model", "page_size": 1})
LENGTHS = (5, 3, 4)


def put_chain(store: DiskStore, chain: list[SampleSegment]) -> None:
    for segment in chain:
        store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)


def add_conversation(
    store: DiskStore, rng: Random, name: str = "talk", *, ranks: int = 1, tenant: str = ""
) -> list[Manifest]:
    """Three turns on main, each on the one before, and a branch from the second."""
    seed = rng.randrange(2**32)
    chains = []
    for rank in range(ranks):
        # The same tokens, and so the same keys, on every rank.
        chain = sample_chain(Random(seed), LENGTHS, shard=Shard(NAMESPACE.id, rank, ranks))
        put_chain(store, chain)
        chains.append(chain)
    store.put_namespace(NAMESPACE)
    manifests = [
        sample_manifest(
            [chain[:length] for chain in chains],
            snapshot_id=f"{name}-{branch}-{turn}",
            conversation_id=name,
            branch_name=branch,
            turn_number=turn,
            parent_snapshot=parent and f"{name}-{parent}",
            created_at=1_700_000_000.0 + turn + (0.5 if branch != "main" else 0.0),
            tenant=tenant,
            rid=f"rid-{name}-{turn}",
        )
        for branch, turn, length, parent in (
            ("main", 1, 1, None),
            ("main", 2, 2, "main-1"),
            ("main", 3, 3, "main-2"),
            ("other", 3, 2, "main-2"),
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
