"""Plan over many snapshots, and say how the time grows with their number.

python -m benchmark.retention.run
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from engram.retention import RetentionPolicy, Segment, Snapshot, plan

NOW = 1_000_000.0
ROUNDS = 5


def conversations(count: int, turns: int, seed: int = 1) -> list[Snapshot]:
    """Conversations of so many turns: one in twenty goes back a turn, is on a branch, or both.

    Each turn has its rows and, on them, a state of 55 MB.
    """
    rng = random.Random(seed)
    snapshots = []
    for number in range(count):
        tip: Segment | None = None
        end = 0
        ends = [0]
        used = NOW - rng.random() * 1_000_000
        priority = rng.randrange(101)
        for turn in range(1, turns + 1):
            if tip is not None and tip.parent is not None and rng.random() < 0.05:
                tip = tip.parent
                ends.pop()
            tip = Segment(f"{number}-{turn}", tip, ends[-1], rng.randrange(4_000_000, 5_000_000))
            ends.append(ends[-1] + rng.randrange(1, 1000))
            end = ends[-1]
            state = Segment(f"{number}-{turn}-state", tip, end, 55_000_000, is_state=True)
            snapshots.append(
                Snapshot(
                    snapshot_id=f"{number}-{turn}",
                    conversation_id=str(number),
                    branch_name="main" if rng.random() < 0.95 else "other",
                    turn_number=turn,
                    token_count=end,
                    used_at=used,
                    tips=(state,),
                    priority=priority,
                    pinned=rng.random() < 0.01,
                )
            )
    return snapshots


def seconds(snapshots: list[Snapshot], policy: RetentionPolicy) -> tuple[float, int]:
    """Median processor time of a plan, and how many snapshots it removes."""
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        removals = len(plan(snapshots, policy, NOW).removals)
        taken.append(time.process_time() - began)
    return statistics.median(taken), removals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshots", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    count = options.snapshots // options.turns
    many = conversations(count, options.turns)
    few = conversations(max(1, count // 10), options.turns)
    long = conversations(max(1, options.snapshots // 10_000), 10_000)
    total = plan(many, RetentionPolicy(), NOW).bytes_before
    policies = {
        "nothing to remove": RetentionPolicy(),
        "the newest 3 of each branch": RetentionPolicy(keep_last=3),
        "half the bytes": RetentionPolicy(disk_quota=total // 2),
        "all that can go": RetentionPolicy(disk_quota=0),
    }
    print(f"{'policy':<30}{'of 1/10':>10}{'of all':>10}{'growth':>8}{'long':>8}{'removed':>10}")
    for name, policy in policies.items():
        small, _ = seconds(few, policy)
        large, removed = seconds(many, policy)
        chains, _ = seconds(long, policy)
        print(
            f"{name:<30}{small:>9.3f}s{large:>9.3f}s{large / small:>7.1f}x"
            f"{chains / large:>7.2f}x{removed:>10,}"
        )


if __name__ == "__main__":
    main()
