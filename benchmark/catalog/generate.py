"""A store of many snapshots, quickly: real manifests, a real catalog, segments without bytes.

What is measured at a start - names, manifests, the catalog - is as a server would have left it;
segments are named and listed, never read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

from engram.catalog.catalog import Catalog
from engram.core.canonical import blake3_hex
from engram.snapshot.manifest import Manifest, SegmentRef, make_manifest
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout

NAMESPACE = blake3_hex(b"a namespace of the catalog's benchmark")
SHARD = Shard(NAMESPACE, 0, 1)
ROWS_A_TURN = 2
"""Segments of KV rows that a turn adds: up to the end of its prompt, and up to its own."""
COMMIT_EVERY = 500


class Hasty(FileSystem):
    """Nothing waits for the disk: what is made here is not worth keeping through a crash."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


def generate(root: Path, conversations: int, turns: int, seed: int = 1) -> int:
    """Make the store below ``root``; how many snapshots it has."""
    rng = Random(seed)
    made = 0
    with DiskStore.open(root, fs=Hasty()) as store:
        catalog = Catalog.open(store.catalog_path, store)
        layout = Layout(root)
        batch: list[Manifest] = []
        for number in range(conversations):
            for manifest in conversation(rng, number, turns):
                batch.append(manifest)
                made += 1
            if len(batch) >= COMMIT_EVERY or number == conversations - 1:
                with catalog.atomic():
                    for manifest in batch:
                        catalog.insert(manifest, store.put_manifest(manifest))
                batch.clear()
        catalog.close()
        for segment_id in _segment_ids(store.catalog_path):
            path = layout.segment(SHARD, segment_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return made


def conversation(rng: Random, number: int, turns: int) -> Iterator[Manifest]:
    """The manifests of one conversation, its oldest turn first."""
    began = 1_700_000_000.0 + rng.random() * 1e7
    rows: list[SegmentRef] = []
    for turn in range(1, turns + 1):
        for _ in range(ROWS_A_TURN):
            start = rows[-1].end if rows else 0
            rows.append(_ref(rng, start, start + rng.randrange(20, 400), _digest(rng)))
        state = _ref(rng, rows[-1].end, rows[-1].end, rows[-1].key)
        chain = (*rows, state)
        total = sum(ref.bytes for ref in chain)
        yield make_manifest(
            snapshot_id=f"snap-{number}-{turn}",
            tenant="",
            conversation_id=f"conversation-{number}",
            branch_name="main",
            turn_number=turn,
            parent_snapshot=f"snap-{number}-{turn - 1}" if turn > 1 else None,
            created_at=began + turn * 60.0,
            namespace=NAMESPACE,
            model_name="a hybrid",
            layer_config={"num_layers": 48, "model_type": "qwen3_next"},
            token_count=chain[-1].end,
            pending_tokens=(rng.randrange(150_000),),
            tokens_digest=_digest(rng),
            durability="async",
            segments=(chain,),
            bytes=total,
            unique_bytes=state.bytes,
            health=None,
            user_metadata={},
            pinned=False,
            expires_at=None,
            rid=f"{rng.getrandbits(128):032x}",
        )


def _ref(rng: Random, start: int, end: int, key: str) -> SegmentRef:
    """Rows, or where ``start`` is ``end`` the state there."""
    return SegmentRef(
        segment_id=_digest(rng),
        key=key,
        start=start,
        end=end,
        has_state=start == end,
        bytes=rng.randrange(1_000_000, 60_000_000),
    )


def _digest(rng: Random) -> str:
    return f"{rng.getrandbits(256):064x}"


def _segment_ids(catalog: Path) -> list[str]:
    with closing(sqlite3.connect(catalog)) as connection:
        return [row[0] for row in connection.execute("SELECT DISTINCT segment_id FROM segments")]
