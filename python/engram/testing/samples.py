"""Small valid segments and manifests with random contents, for tests."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from engram.core.canonical import blake3_hex
from engram.core.tokens import tokens_digest, tokens_to_bytes
from engram.snapshot.digest import seal
from engram.snapshot.manifest import Manifest, SegmentRef, make_manifest
from engram.snapshot.segment import TOKENS, SegmentHeader, Shard

SEED_VARIABLE: Final = "ENGRAM_TEST_SEED"
SHARD: Final = Shard(blake3_hex(b"a namespace"), 0, 1)


def drawn_seed() -> int:
    """A seed, which is printed; set ``ENGRAM_TEST_SEED`` to repeat a failure."""
    seed = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "big"))
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201  pytest shows it with a failure
    return seed


def seeded_random() -> random.Random:
    """A generator of `drawn_seed`."""
    return random.Random(drawn_seed())


@dataclass(frozen=True)
class SampleSegment:
    """A segment in memory, with its id."""

    header: SegmentHeader
    payload: bytes
    tokens: tuple[int, ...]
    segment_id: str

    @property
    def ref(self) -> SegmentRef:
        """What a manifest says about it."""
        return SegmentRef(
            segment_id=self.segment_id,
            key=self.header.key,
            start=self.header.start,
            end=self.header.end,
            has_state=self.header.has_state,
            bytes=self.header.file_length,
        )

    @property
    def file(self) -> bytes:
        """The bytes of its file."""
        return self.header.prefix + self.payload + bytes.fromhex(self.segment_id)


def sample_segment(
    rng: random.Random,
    *,
    shard: Shard = SHARD,
    parent: SampleSegment | None = None,
    length: int = 5,
) -> SampleSegment:
    """``length`` random tokens after ``parent``, and two layers of KV.

    The key depends on the tokens from 0 on alone, as a chained page hash does.
    """
    start = parent.header.end if parent else 0
    tokens = tuple(rng.randrange(2**32) for _ in range(length))
    before = bytes.fromhex(parent.header.key) if parent else b""
    header = SegmentHeader.plan(
        shard=shard,
        key=blake3_hex(before + tokens_to_bytes(tokens)),
        start=start,
        end=start + length,
        parent=parent.segment_id if parent else None,
        has_state=False,
        buffers=[("kv.0", "BF16", (length, 2, 3)), ("kv.1", "BF16", (length, 2, 3))],
    )
    return _filled(rng, header, tokens)


def sample_state(rng: random.Random, rows: SampleSegment) -> SampleSegment:
    """A random recurrent state at the end of ``rows``: two buffers with a gap between them."""
    header = SegmentHeader.plan(
        shard=rows.header.shard,
        key=rows.header.key,
        start=rows.header.end,
        end=rows.header.end,
        parent=rows.segment_id,
        has_state=True,
        buffers=[("state.conv.2", "F32", (7, 3)), ("state.ssm.2", "F32", (5,))],
    )
    return _filled(rng, header, ())


def _filled(rng: random.Random, header: SegmentHeader, tokens: tuple[int, ...]) -> SampleSegment:
    payload = memoryview(bytearray(rng.randbytes(header.payload_length)))
    header.clear_padding(payload)
    if tokens:
        header.view(payload, TOKENS)[:] = tokens_to_bytes(tokens)
    return SampleSegment(header, bytes(payload), tokens, seal(header, payload).hex())


def sample_turns(
    rng: random.Random, lengths: Sequence[int], *, shard: Shard = SHARD
) -> list[list[SampleSegment]]:
    """The chains of consecutive turns: each has all rows to there, and a state of its own."""
    rows: list[SampleSegment] = []
    turns: list[list[SampleSegment]] = []
    for length in lengths:
        parent = rows[-1] if rows else None
        rows.append(sample_segment(rng, shard=shard, parent=parent, length=length))
        turns.append([*rows, sample_state(rng, rows[-1])])
    return turns


def sample_chain(
    rng: random.Random, lengths: Sequence[int] = (5, 3, 4), *, shard: Shard = SHARD
) -> list[SampleSegment]:
    """Rows from token 0, one after another, and the state at their end."""
    return sample_turns(rng, lengths, shard=shard)[-1]


def sample_manifest(chains: Sequence[Sequence[SampleSegment]], **changes: Any) -> Manifest:
    """A manifest over one chain a rank, with plain values where ``changes`` has none."""
    tokens = [token for segment in chains[0] for token in segment.tokens]
    pending = changes.get("pending_tokens", (17,))
    total = sum(segment.header.file_length for chain in chains for segment in chain)
    fields: dict[str, Any] = {
        "snapshot_id": "snap-1",
        "tenant": "",
        "conversation_id": "conversation-1",
        "branch_name": "main",
        "turn_number": 1,
        "parent_snapshot": None,
        "created_at": 1_700_000_000.25,
        "namespace": chains[0][0].header.namespace,
        "model_name": "a model",
        "layer_config": {"num_layers": 3, "model_type": "hybrid"},
        "token_count": len(tokens),
        "pending_tokens": pending,
        "tokens_digest": tokens_digest(tokens, pending),
        "durability": "sync",
        "segments": [[segment.ref for segment in chain] for chain in chains],
        "bytes": total,
        "unique_bytes": total,
        "health": None,
        "user_metadata": {},
        "pinned": False,
        "expires_at": None,
        "rid": None,
    }
    return make_manifest(**{**fields, **changes})
