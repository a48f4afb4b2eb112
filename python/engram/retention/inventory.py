"""What to plan over, made from manifests or from the catalog."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from engram.catalog.inventory import KeptInventory
from engram.errors import InvalidRequestError
from engram.retention.base import Segment, Snapshot
from engram.snapshot.conversation import DEFAULT_PRIORITY
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
    latest: dict[tuple[str, str], float] = {}
    known: dict[tuple[_Shard, str], Segment] = {}
    found: list[Snapshot] = []
    # A manifest is many times the size of what is planned over: none is kept.
    for manifest in manifests:
        name = (manifest.tenant, manifest.conversation_id)
        latest[name] = max(manifest.created_at, latest.get(name, manifest.created_at))
        found.append(
            Snapshot(
                snapshot_id=manifest.snapshot_id,
                conversation_id=manifest.conversation_id,
                branch_name=manifest.branch_name,
                turn_number=manifest.turn_number,
                token_count=manifest.token_count,
                used_at=manifest.created_at,
                tips=tuple(
                    _tip((manifest.namespace, rank, manifest.world_size), chain, known)
                    for rank, chain in enumerate(manifest.segments)
                ),
                tenant=manifest.tenant,
                priority=(priorities or {}).get(name, DEFAULT_PRIORITY),
                pinned=manifest.pinned,
                expires_at=manifest.expires_at,
            )
        )
    latest.update(used_at or {})
    return [replace(one, used_at=latest[one.conversation]) for one in found]


def snapshots_in(
    inventory: KeptInventory,
    *,
    used_at: Mapping[tuple[str, str], float],
    priorities: Mapping[tuple[str, str], int],
) -> list[Snapshot]:
    """One `Snapshot` for each of a catalog's; otherwise as `snapshots_of`.

    A conversation was used last when its newest snapshot was made, or later if ``used_at`` says so.
    """
    segments = _segments_in(inventory)
    latest = dict(used_at)
    for one in inventory.snapshots:
        name = (one.tenant, one.conversation_id)
        latest[name] = max(one.created_at, latest.get(name, one.created_at))
    return [
        Snapshot(
            snapshot_id=one.snapshot_id,
            conversation_id=one.conversation_id,
            branch_name=one.branch_name,
            turn_number=one.turn_number,
            token_count=one.token_count,
            used_at=latest[one.tenant, one.conversation_id],
            tips=tuple([segments[tip] for tip in one.tips]),
            tenant=one.tenant,
            priority=priorities.get((one.tenant, one.conversation_id), DEFAULT_PRIORITY),
            pinned=one.pinned,
            expires_at=one.expires_at,
        )
        for one in inventory.snapshots
    ]


def _segments_in(inventory: KeptInventory) -> dict[int, Segment]:
    """The segments by row id, each made after the one it stands on."""
    made: dict[int, Segment] = {}
    for number in inventory.segments:
        waiting: dict[int, None] = {}
        below: int | None = number
        # Read in pages, rows may not fit together: what is there twice ends the way.
        while below in inventory.segments and below not in made and below not in waiting:
            assert below is not None
            waiting[below] = None
            below = inventory.segments[below].parent
        for each in reversed(waiting):
            kept = inventory.segments[each]
            parent = None if kept.parent is None else made.get(kept.parent)
            made[each] = Segment(str(each), parent, kept.start, kept.bytes, kept.is_state)
    return made


def _tip(
    shard: _Shard, chain: tuple[SegmentRef, ...], known: dict[tuple[_Shard, str], Segment]
) -> Segment:
    parent: Segment | None = None
    for ref in chain:
        segment = known.get((shard, ref.segment_id))
        if segment is None:
            # A manifest may name the beginning of a segment: where it ends says nothing of it.
            is_state = ref.start == ref.end
            segment = Segment(ref.segment_id, parent, ref.start, ref.bytes, is_state)
            known[shard, ref.segment_id] = segment
        elif (segment.parent, segment.start, segment.bytes) != (parent, ref.start, ref.bytes):
            raise InvalidRequestError(
                f"two manifests disagree on segment {ref.segment_id}",
                hint="run engram doctor on the store",
            )
        parent = segment
    assert parent is not None, "a manifest has a segment on every rank"
    return parent
