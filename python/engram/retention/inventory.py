"""What to plan over, made from manifests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engram.errors import InvalidRequestError
from engram.retention.base import DEFAULT_PRIORITY, Segment, Snapshot
from engram.snapshot.manifest import Manifest, SegmentRef

_Shard = tuple[str, int, int]


def snapshots_of(
    manifests: Iterable[Manifest],
    *,
    used_at: Mapping[tuple[str, str], float] | None = None,
    priorities: Mapping[tuple[str, str], int] | None = None,
) -> list[Snapshot]:
    """One `Snapshot` a manifest, in the same order.

    ``used_at`` and ``priorities`` are by (tenant, conversation id). A conversation whose last use
    is not known was used when its newest snapshot was made.

    Raises `InvalidRequestError` if two manifests disagree on what a segment stands on.
    """
    everything = list(manifests)
    latest: dict[tuple[str, str], float] = {}
    for manifest in everything:
        name = (manifest.tenant, manifest.conversation_id)
        latest[name] = max(manifest.created_at, latest.get(name, manifest.created_at))
    latest.update(used_at or {})
    # Rows may be used in part: the one who uses most of them knows best where they end.
    ends: dict[tuple[_Shard, str], int] = {}
    for manifest in everything:
        for rank, chain in enumerate(manifest.segments):
            shard = (manifest.namespace, rank, manifest.world_size)
            for ref in chain:
                place = (shard, ref.segment_id)
                ends[place] = max(ref.end, ends.get(place, 0))
    known: dict[tuple[_Shard, str], Segment] = {}
    found = []
    for manifest in everything:
        name = (manifest.tenant, manifest.conversation_id)
        found.append(
            Snapshot(
                snapshot_id=manifest.snapshot_id,
                conversation_id=manifest.conversation_id,
                branch_name=manifest.branch_name,
                turn_number=manifest.turn_number,
                token_count=manifest.token_count,
                used_at=latest[name],
                tips=tuple(
                    _tip((manifest.namespace, rank, manifest.world_size), chain, known, ends)
                    for rank, chain in enumerate(manifest.segments)
                ),
                tenant=manifest.tenant,
                priority=(priorities or {}).get(name, DEFAULT_PRIORITY),
                pinned=manifest.pinned,
                expires_at=manifest.expires_at,
            )
        )
    return found


def _tip(
    shard: _Shard,
    chain: tuple[SegmentRef, ...],
    known: dict[tuple[_Shard, str], Segment],
    ends: Mapping[tuple[_Shard, str], int],
) -> Segment:
    parent: Segment | None = None
    for ref in chain:
        segment = known.get((shard, ref.segment_id))
        if segment is None:
            segment = Segment(ref.segment_id, parent, ends[shard, ref.segment_id], ref.bytes)
            known[shard, ref.segment_id] = segment
        elif (segment.parent, segment.bytes) != (parent, ref.bytes):
            raise InvalidRequestError(
                f"two manifests disagree on segment {ref.segment_id}",
                hint="run engram doctor on the store",
            )
        parent = segment
    assert parent is not None, "a manifest has a segment on every rank"
    return parent
