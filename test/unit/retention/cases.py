"""Stores to plan over, told in a few letters.

A chain is told as segments, parent first: ``a`` alone, ``ab`` is b on a. The length of a segment is
100 tokens; its size is 10 bytes unless told. With ``state`` bytes above 0, each chain that a
snapshot ends with has a state of so many on it.
"""

from dataclasses import replace
from random import Random

from engram.retention import RetentionPlan, Segment, Snapshot

NOW = 1_000_000.0


class Store:
    """Makes snapshots that share their segments as told."""

    def __init__(self, sizes: dict[str, int] | None = None, state: int = 0) -> None:
        self.sizes = sizes or {}
        self.state = state
        self.segments: dict[str, Segment] = {}
        self.snapshots: list[Snapshot] = []

    def segment(self, chain: str) -> Segment:
        if chain not in self.segments:
            parent = self.segment(chain[:-1]) if len(chain) > 1 else None
            size = self.sizes.get(chain[-1], 10)
            self.segments[chain] = Segment(chain, parent, 100 * (len(chain) - 1), size)
        return self.segments[chain]

    def tip(self, chain: str) -> Segment:
        """What a snapshot of a chain ends with."""
        rows = self.segment(chain)
        if not self.state:
            return rows
        name = chain + "*"
        if name not in self.segments:
            self.segments[name] = Segment(name, rows, 100 * len(chain), self.state, is_state=True)
        return self.segments[name]

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
            tips=(self.tip(chain),),
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


def random_store(
    rng: Random, conversations: int = 4, ranks: int = 1, states: bool = True
) -> list[Snapshot]:
    """Conversations that go on, go back and branch, some of them on each other's segments.

    One in four that goes back shares only the beginning of a segment.
    """
    snapshots: list[Snapshot] = []
    # Chains that a turn may stand on: the last rows of each rank, and where the next ones start.
    begun: list[tuple[tuple[Segment, ...], int]] = []
    for number in range(conversations):
        used = NOW - rng.choice([0, 100, 5_000, 200_000])
        priority = rng.choice([0, 50, 50, 100])
        rows, end = rng.choice(begun) if begun and rng.random() < 0.3 else ((), 0)
        tips: tuple[Segment, ...] = ()
        for turn in range(1, rng.randrange(2, 8)):
            if not tips or rng.random() < 0.9:
                name = f"{number}-{turn}"
                rows = tuple(
                    Segment(
                        f"{name}-{rank}",
                        rows[rank] if rows else None,
                        end,
                        rng.randrange(1, 1000),
                    )
                    for rank in range(ranks)
                )
                end += rng.randrange(1, 50)
                tips = rows
                if states:
                    size = rng.randrange(1, 1000)
                    tips = tuple(
                        Segment(f"{name}-{rank}*", rows[rank], end, size, is_state=True)
                        for rank in range(ranks)
                    )
            begun.append((rows, end))
            branch = rng.choice(["main", "main", "main", "other"])
            snapshots.append(
                Snapshot(
                    snapshot_id=f"{number}-{turn}",
                    conversation_id=f"conversation-{number}",
                    branch_name=branch,
                    turn_number=turn,
                    token_count=end,
                    used_at=used,
                    tips=tips,
                    priority=priority,
                    pinned=rng.random() < 0.1,
                    expires_at=rng.choice([None, None, None, NOW - 1, NOW, NOW + 1]),
                )
            )
            if rng.random() < 0.2:
                tips = ()
                rows, end = rng.choice(begun)
                if rng.random() < 0.25 and end - rows[0].start > 1:
                    end = rng.randrange(rows[0].start + 1, end)
    rng.shuffle(snapshots)
    return snapshots


def tokens_again(snapshots: list[Snapshot], snapshot: Snapshot) -> int:
    """Tokens from the nearest earlier state that others name to where one ends: the long way."""
    nearest = []
    for tip in snapshot.tips:
        reach, on_path = snapshot.token_count, {}
        rows = tip.parent
        while rows is not None:
            on_path[rows] = reach
            reach, rows = min(reach, rows.start), rows.parent
        found = [
            other.start
            for one in snapshots
            for other in one.tips
            if other is not tip and other.parent in on_path and other.start <= on_path[other.parent]
        ]
        nearest.append(max(found, default=0))
    return snapshot.token_count - min(nearest)
