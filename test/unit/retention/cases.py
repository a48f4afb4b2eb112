"""Stores to plan over, told in a few letters.

A chain is told as segments, parent first: ``a`` alone, ``ab`` is b on a. The length of a segment is
100 tokens; its size is 10 bytes unless told.
"""

from dataclasses import replace
from random import Random

from engram.retention import RetentionPlan, Segment, Snapshot

NOW = 1_000_000.0


class Store:
    """Makes snapshots that share their segments as told."""

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        self.sizes = sizes or {}
        self.segments: dict[str, Segment] = {}
        self.snapshots: list[Snapshot] = []

    def segment(self, chain: str) -> Segment:
        if chain not in self.segments:
            parent = self.segment(chain[:-1]) if len(chain) > 1 else None
            size = self.sizes.get(chain[-1], 10)
            self.segments[chain] = Segment(chain, parent, 100 * len(chain), size)
        return self.segments[chain]

    def add(
        self, conversation: str, turn: int, chain: str, branch: str = "main", **changes: object
    ) -> Snapshot:
        """A snapshot called, for example, ``A/main/3``; used at `NOW` unless ``idle`` says."""
        idle = changes.pop("idle", 0.0)
        assert isinstance(idle, (int, float))
        plain = Snapshot(
            snapshot_id=f"{conversation}/{branch}/{turn}",
            conversation_id=conversation,
            branch_name=branch,
            turn_number=turn,
            token_count=100 * len(chain),
            used_at=NOW - idle,
            tips=(self.segment(chain),),
        )
        self.snapshots.append(replace(plain, **changes))  # type: ignore[arg-type]
        return self.snapshots[-1]


def removed(plan: RetentionPlan) -> list[str]:
    return [removal.snapshot.snapshot_id for removal in plan.removals]


def kept(plan: RetentionPlan) -> dict[str, str]:
    return {one.snapshot.snapshot_id: one.reason.value for one in plan.kept}


def named_bytes(snapshots: list[Snapshot]) -> int:
    """Bytes of all segments that snapshots stand on, each once: the long way."""
    found: set[Segment] = set()
    for snapshot in snapshots:
        for tip in snapshot.tips:
            segment: Segment | None = tip
            while segment is not None and segment not in found:
                found.add(segment)
                segment = segment.parent
    return sum(segment.bytes for segment in found)


def random_store(rng: Random, conversations: int = 4, ranks: int = 1) -> list[Snapshot]:
    """Conversations that go on, go back and branch, some of them on each other's segments."""
    snapshots: list[Snapshot] = []
    begun: list[tuple[Segment, ...]] = []
    for number in range(conversations):
        used = NOW - rng.choice([0, 100, 5_000, 200_000])
        priority = rng.choice([0, 50, 50, 100])
        tips = rng.choice(begun) if begun and rng.random() < 0.3 else None
        for turn in range(1, rng.randrange(2, 8)):
            if tips is None or rng.random() < 0.9:
                tips = tuple(
                    Segment(
                        f"{number}-{turn}-{rank}",
                        tips[rank] if tips else None,
                        (tips[rank].end if tips else 0) + rng.randrange(1, 50),
                        rng.randrange(1, 1000),
                    )
                    for rank in range(ranks)
                )
            begun.append(tips)
            branch = rng.choice(["main", "main", "main", "other"])
            snapshots.append(
                Snapshot(
                    snapshot_id=f"{number}-{turn}",
                    conversation_id=f"conversation-{number}",
                    branch_name=branch,
                    turn_number=turn,
                    token_count=tips[0].end,
                    used_at=used,
                    tips=tips,
                    priority=priority,
                    pinned=rng.random() < 0.1,
                    expires_at=rng.choice([None, None, None, NOW - 1, NOW, NOW + 1]),
                )
            )
            if rng.random() < 0.2:
                tips = rng.choice(begun)
    rng.shuffle(snapshots)
    return snapshots
