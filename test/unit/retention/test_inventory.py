"""Snapshots to plan over, made from manifests."""

import pytest

from engram.errors import InvalidRequestError
from engram.retention import RetentionPolicy, plan
from engram.retention.inventory import snapshots_of
from engram.snapshot.manifest import change_manifest
from engram.snapshot.segment import Shard
from engram.testing.samples import (
    SHARD,
    sample_chain,
    sample_manifest,
    sample_segment,
    sample_turns,
    seeded_random,
)
from unit.retention.cases import named_bytes, removed


def test_manifests_share_segments_as_their_files_do() -> None:
    rng = seeded_random()
    chains = sample_turns(rng, (5, 3, 4))
    manifests = [
        sample_manifest(
            [chain],
            snapshot_id=f"snap-{turn}",
            turn_number=turn,
            created_at=100.0 * turn,
            pinned=turn == 2,
            expires_at=500.0 if turn == 1 else None,
        )
        for turn, chain in enumerate(chains, 1)
    ]
    first, second, third = snapshots_of(manifests)
    rows = [snapshot.tips[0].parent for snapshot in (first, second, third)]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[2] is not None
    assert (rows[0].parent, rows[1].parent, rows[2].parent) == (None, rows[0], rows[1])
    assert [s.used_at for s in (first, second, third)] == [300.0] * 3
    assert [s.token_count for s in (first, second, third)] == [5, 8, 12]
    assert (second.pinned, first.expires_at, first.priority) == (True, 500.0, 50)
    files = {s.segment_id: s.header.file_length for chain in chains for s in chain}
    assert named_bytes([first, second, third]) == sum(files.values())
    own = chains[2][2].header.file_length + chains[2][3].header.file_length
    quota = sum(files.values()) - own
    found = plan([second, third], RetentionPolicy(disk_quota=quota), 400.0)
    assert removed(found) == ["snap-3"]
    assert found.freed_bytes == own


def test_rows_used_in_part_are_one_segment() -> None:
    rng = seeded_random()
    whole = sample_chain(rng, (5,))
    rest = sample_segment(rng, parent=whole[0], length=4)
    part = whole[0].ref.model_copy(update={"end": 3, "key": "cd" * 32})
    own = rest.ref.model_copy(update={"start": 3, "end": 7})
    other = sample_manifest(
        [[whole[0], rest]],
        snapshot_id="snap-2",
        turn_number=2,
        token_count=7,
        segments=[[part, own]],
    )
    for order in ([sample_manifest([whole]), other], [other, sample_manifest([whole])]):
        snapshots = {snapshot.snapshot_id: snapshot for snapshot in snapshots_of(order)}
        rows = snapshots["snap-1"].tips[0].parent
        assert rows is not None
        assert snapshots["snap-2"].tips[0].parent is rows
        assert rows.end == 5


def test_each_rank_has_a_chain() -> None:
    rng = seeded_random()
    shards = [Shard(SHARD.namespace, rank, 2) for rank in range(2)]
    one = sample_chain(rng, (5,), shard=shards[0])
    manifest = sample_manifest([one, one])
    (snapshot,) = snapshots_of([manifest])
    assert len(snapshot.tips) == 2
    assert snapshot.tips[0] is not snapshot.tips[1]
    assert named_bytes([snapshot]) == manifest.bytes


def test_last_use_and_priority_are_taken_where_they_are_known() -> None:
    manifest = sample_manifest([sample_chain(seeded_random(), (5,))])
    name = (manifest.tenant, manifest.conversation_id)
    (snapshot,) = snapshots_of([manifest], used_at={name: 9.0}, priorities={name: 80})
    assert (snapshot.used_at, snapshot.priority) == (9.0, 80)


def test_manifests_that_disagree_are_refused() -> None:
    chain = sample_chain(seeded_random(), (5, 3))
    whole = sample_manifest([chain])
    refs = list(whole.segments[0])
    other = refs[1].model_copy(update={"bytes": refs[1].bytes + 1})
    changed = change_manifest(
        whole,
        snapshot_id="snap-2",
        segments=[[ref.model_dump() for ref in (refs[0], other, refs[2])]],
        bytes=whole.bytes + 1,
    )
    with pytest.raises(InvalidRequestError, match=f"disagree on segment {refs[1].segment_id}"):
        snapshots_of([whole, changed])
