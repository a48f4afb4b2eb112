"""What goes and what stays, case by case."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from engram.core.settings import Settings
from engram.errors import InvalidRequestError
from engram.retention import Reason, RetentionPolicy, Segment, Snapshot, plan
from engram.retention.forest import Forest
from unit.retention.cases import NOW, Store, kept, removed

HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class Case:
    """``remove`` in order, with reasons; ``keep`` says why the others stay; bytes after."""

    name: str
    fill: Callable[[Store], object]
    policy: RetentionPolicy
    remove: list[tuple[str, Reason]]
    keep: dict[str, str]
    after: int
    over: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    state: int = 0


def four_turns(store: Store) -> None:
    for turn, chain in enumerate(("a", "ab", "abc", "abcd"), start=1):
        store.add("A", turn, chain)


def uneven_turns(store: Store) -> None:
    """Turns of 100, 100, 200 and 100 tokens."""
    for turn, chain in enumerate(("a", "ab", "abcd", "abcde"), start=1):
        store.add("A", turn, chain)


def pins_and_names(store: Store) -> None:
    store.add("A", 1, "a", pinned=True)
    store.add("A", 2, "ab")
    store.add("A", 3, "abc")
    store.add("A", 3, "abx", branch="try")
    store.add("A", 4, "abxy", branch="try")


def over_and_done(store: Store) -> None:
    store.add("A", 1, "a", idle=8 * DAY)
    store.add("A", 2, "ab", idle=8 * DAY, pinned=True)
    store.add("A", 3, "ax", branch="try", idle=8 * DAY)
    store.add("B", 1, "b", expires_at=NOW)
    store.add("C", 1, "c", expires_at=NOW + 1, idle=6 * DAY)
    store.add("D", 1, "d", expires_at=NOW - 1, pinned=True)
    store.add("D", 2, "de", branch="try", expires_at=NOW - 90)


def went_back(store: Store) -> None:
    """Turn 3 went back to turn 1: turn 2 is left behind."""
    store.add("A", 1, "a")
    store.add("A", 2, "ab")
    store.add("A", 3, "ac")


def two_idle(store: Store) -> None:
    for turn, chain in enumerate(("a", "ab", "abc"), start=1):
        store.add("old", turn, chain, idle=3 * DAY)
    for turn, chain in enumerate(("x", "xy", "xyz"), start=1):
        store.add("new", turn, chain, idle=1 * HOUR)


def by_priority(store: Store) -> None:
    for name, chain, priority in (("low", "ab", 0), ("high", "xy", 100), ("mid", "mn", 50)):
        store.add(name, 1, chain[0], priority=priority)
        store.add(name, 2, chain, priority=priority)


def by_size(store: Store) -> None:
    """Equal in all but what going frees."""
    for name, chain in (("small", "ab"), ("large", "xy")):
        store.add(name, 1, chain[0])
        store.add(name, 2, chain)


def shared_prompt(store: Store) -> None:
    """B stands on A's beginning: A's end alone is A's."""
    store.add("A", 1, "a")
    store.add("A", 2, "ab")
    store.add("B", 1, "ax")


def same_end(store: Store) -> None:
    """Two branches end in one place, which is free only when both have gone."""
    store.add("A", 1, "a")
    store.add("A", 2, "ab")
    store.add("A", 2, "ab", branch="try")


NAMES_GO = RetentionPolicy(keep_named_branches=False)
CASES = [
    Case(
        "nothing asked, nothing done",
        four_turns,
        RetentionPolicy(),
        [],
        {f"A/main/{n}": "within the policy" for n in (1, 2, 3, 4)},
        40,
    ),
    Case(
        "the newest two stay, and nothing is free: they stand on the others",
        four_turns,
        RetentionPolicy(keep_last=2),
        [("A/main/1", Reason.COUNT), ("A/main/2", Reason.COUNT)],
        {"A/main/3": "within the policy", "A/main/4": "within the policy"},
        40,
    ),
    Case(
        "pins and named branches are beyond the count",
        pins_and_names,
        RetentionPolicy(keep_last=1),
        [("A/main/2", Reason.COUNT)],
        {
            "A/main/1": "pinned",
            "A/main/3": "within the policy",
            "A/try/3": "named branch",
            "A/try/4": "named branch",
        },
        50,
    ),
    Case(
        "named branches count when they are not kept",
        pins_and_names,
        RetentionPolicy(keep_last=1, keep_named_branches=False),
        [("A/main/2", Reason.COUNT), ("A/try/3", Reason.COUNT)],
        {
            "A/main/1": "pinned",
            "A/main/3": "within the policy",
            "A/try/4": "within the policy",
        },
        50,
    ),
    Case(
        "what is over goes, be it the only one; a pin holds it, a name holds it against cold only",
        over_and_done,
        RetentionPolicy(cold_retention=7 * DAY),
        [
            ("A/main/1", Reason.COLD),
            ("B/main/1", Reason.EXPIRED),
            ("D/try/2", Reason.EXPIRED),
        ],
        {
            "A/main/2": "pinned",
            "A/try/3": "named branch",
            "C/main/1": "within the policy",
            "D/main/1": "pinned",
        },
        50,
    ),
    Case(
        "an end that was left behind goes before the newest turn, though that frees more",
        went_back,
        RetentionPolicy(disk_quota=40),
        [("A/main/2", Reason.QUOTA)],
        {"A/main/1": "within the policy", "A/main/3": "within the policy"},
        40,
        sizes={"c": 30},
    ),
    Case(
        "the idle conversation gives way from its end, down to its last",
        two_idle,
        RetentionPolicy(disk_quota=40),
        [("old/main/3", Reason.QUOTA), ("old/main/2", Reason.QUOTA)],
        {
            "old/main/1": "within the policy",
            "new/main/1": "within the policy",
            "new/main/2": "within the policy",
            "new/main/3": "within the policy",
        },
        40,
    ),
    Case(
        "no more goes than has to",
        two_idle,
        RetentionPolicy(disk_quota=55),
        [("old/main/3", Reason.QUOTA)],
        {
            "old/main/1": "within the policy",
            "old/main/2": "within the policy",
            "new/main/1": "within the policy",
            "new/main/2": "within the policy",
            "new/main/3": "within the policy",
        },
        50,
    ),
    Case(
        "what cannot be had is told",
        two_idle,
        RetentionPolicy(disk_quota=5),
        [
            ("old/main/3", Reason.QUOTA),
            ("old/main/2", Reason.QUOTA),
            ("new/main/3", Reason.QUOTA),
            ("new/main/2", Reason.QUOTA),
        ],
        {"old/main/1": "the conversation's only one", "new/main/1": "the conversation's only one"},
        20,
        over=15,
    ),
    Case(
        "priority decides between equals",
        by_priority,
        RetentionPolicy(disk_quota=40),
        [("low/main/2", Reason.QUOTA), ("mid/main/2", Reason.QUOTA)],
        {
            "low/main/1": "within the policy",
            "mid/main/1": "within the policy",
            "high/main/1": "within the policy",
            "high/main/2": "within the policy",
        },
        40,
    ),
    Case(
        "of equal worth, what frees most goes",
        by_size,
        RetentionPolicy(disk_quota=119),
        [("large/main/2", Reason.QUOTA)],
        {
            "small/main/1": "within the policy",
            "small/main/2": "within the policy",
            "large/main/1": "within the policy",
        },
        30,
        sizes={"y": 90},
    ),
    Case(
        "shared segments are not freed, and the last of a conversation stays",
        shared_prompt,
        RetentionPolicy(disk_quota=1),
        [("A/main/2", Reason.QUOTA)],
        {"A/main/1": "the conversation's only one", "B/main/1": "the conversation's only one"},
        20,
        over=19,
    ),
    Case(
        "an end that a named branch shares stays",
        same_end,
        RetentionPolicy(disk_quota=1),
        [],
        {
            "A/main/1": "frees nothing by itself",
            "A/main/2": "frees nothing by itself",
            "A/try/2": "named branch",
        },
        20,
        over=19,
    ),
    Case(
        "an end that two share goes with both",
        same_end,
        RetentionPolicy(disk_quota=10, keep_named_branches=False),
        [("A/main/2", Reason.QUOTA), ("A/try/2", Reason.QUOTA)],
        {"A/main/1": "within the policy"},
        10,
    ),
    Case(
        "a run between a kept end and the one before it goes with its end",
        four_turns,
        RetentionPolicy(keep_last=2, disk_quota=10),
        [
            ("A/main/1", Reason.COUNT),
            ("A/main/2", Reason.COUNT),
            ("A/main/4", Reason.QUOTA),
        ],
        {"A/main/3": "the conversation's only one"},
        30,
        over=20,
    ),
    Case(
        "what the count takes frees its state",
        four_turns,
        RetentionPolicy(keep_last=2),
        [("A/main/1", Reason.COUNT), ("A/main/2", Reason.COUNT)],
        {"A/main/3": "within the policy", "A/main/4": "within the policy"},
        240,
        state=100,
    ),
    Case(
        "superseded states go before anything else, the newest turn of the idlest stays",
        two_idle,
        RetentionPolicy(disk_quota=300),
        [
            ("old/main/1", Reason.QUOTA),
            ("old/main/2", Reason.QUOTA),
            ("new/main/1", Reason.QUOTA),
            ("new/main/2", Reason.QUOTA),
        ],
        {"old/main/3": "within the policy", "new/main/3": "within the policy"},
        260,
        state=100,
    ),
    Case(
        "of equal superseded states those go that leave the shortest way to compute",
        uneven_turns,
        RetentionPolicy(disk_quota=250),
        [("A/main/1", Reason.QUOTA), ("A/main/2", Reason.QUOTA)],
        {"A/main/3": "within the policy", "A/main/4": "within the policy"},
        250,
        state=100,
    ),
    Case(
        "a branch keeps its beginning, not the snapshot it began at",
        shared_prompt,
        RetentionPolicy(disk_quota=230),
        [("A/main/1", Reason.QUOTA)],
        {"A/main/2": "within the policy", "B/main/1": "within the policy"},
        230,
        state=100,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Case) -> None:
    store = Store(case.sizes, case.state)
    case.fill(store)
    found = plan(store.snapshots, case.policy, NOW)
    assert [(r.snapshot.snapshot_id, r.reason) for r in found.removals] == case.remove
    assert kept(found) == case.keep
    assert (found.bytes_after, found.over_quota) == (case.after, case.over)


@pytest.mark.parametrize(
    ("idle", "changes", "text"),
    [
        (0.0, {"expires_at": NOW - 600}, "expired 10 min ago"),
        (8 * DAY, {}, "conversation unused for 8.0 days, kept for 7.0 days"),
        (0.0, {}, "not among the newest 1 of branch 'main'"),
    ],
)
def test_the_text_says_what_decided(idle: float, changes: dict[str, float], text: str) -> None:
    store = Store()
    store.add("A", 1, "a", idle=idle, **changes)
    store.add("A", 2, "ab", idle=idle)
    policy = RetentionPolicy(keep_last=1, cold_retention=7 * DAY)
    assert plan(store.snapshots, policy, NOW).removals[0].text == text


def test_the_text_of_the_quota_has_every_term() -> None:
    store = Store({"b": 70})
    store.add("A", 1, "a", idle=5 * HOUR, priority=30)
    store.add("A", 2, "ab", idle=5 * HOUR, priority=30)
    (removal,) = plan(store.snapshots, RetentionPolicy(disk_quota=20), NOW).removals
    assert removal.text == (
        "least valuable while 60 bytes over the quota: unused for 5.0 h, priority 30, "
        "100 tokens to compute again, 70 bytes"
    )
    assert removal.freed_bytes == 70


def test_a_run_between_two_ends_counts_with_all_its_tokens_and_bytes() -> None:
    store = Store()
    store.add("A", 1, "a", pinned=True)
    for turn, chain in enumerate(("ab", "abc", "abcd"), start=2):
        store.add("A", turn, chain)
    found = plan(store.snapshots, RetentionPolicy(keep_last=1, disk_quota=10), NOW)
    assert removed(found) == ["A/main/2", "A/main/3", "A/main/4"]
    assert found.removals[-1].text.endswith("300 tokens to compute again, 30 bytes")


def test_when_the_newest_turn_goes_the_one_before_is_the_newest() -> None:
    """B's turn 2 was left behind by turn 3; when 3 has gone, it is as good as any newest turn."""
    store = Store({"b": 50, "c": 500, "y": 200})
    store.add("B", 1, "a")
    store.add("B", 2, "ab")
    store.add("B", 3, "ac", idle=0.0)
    store.add("Y", 1, "x")
    store.add("Y", 2, "xy")
    # c frees most. Left behind, b would have gone before y; as the newest it is worth more.
    found = plan(store.snapshots, RetentionPolicy(disk_quota=100), NOW)
    assert removed(found) == ["B/main/3", "Y/main/2"]


def test_the_way_to_a_state_grows_as_those_before_it_go() -> None:
    store = Store(state=100)
    four_turns(store)
    found = plan(store.snapshots, RetentionPolicy(disk_quota=1), NOW)
    tokens = [int(re.search(r"(\d+) tokens", r.text)[1]) for r in found.removals]  # type: ignore[index]
    assert removed(found) == ["A/main/1", "A/main/3", "A/main/2"]
    assert tokens == [100, 100, 200]
    assert [r.freed_bytes for r in found.removals] == [100, 100, 100]


def test_a_state_inside_a_segment_counts_from_the_one_before_it_there() -> None:
    """B goes on from the middle of A's rows: A's own end is not on B's way."""
    rows = Segment("rows", None, 0, 10)
    middle, end = (Segment(f"{at}*", rows, at, 100, is_state=True) for at in (60, 100))
    more = Segment("more", rows, 60, 10)
    last = Segment("80*", more, 80, 100, is_state=True)
    snapshots = [
        Snapshot(name, name, "main", 1, tip.start, NOW, (tip,))
        for name, tip in (("middle", middle), ("end", end), ("last", last))
    ]
    forest = Forest(snapshots)
    assert [forest.stop_of[n].tokens() for n in range(3)] == [60, 40, 20]
    assert forest.remove(0)[0] == 100
    assert [forest.stop_of[n].tokens() for n in (1, 2)] == [100, 80]


def test_every_rank_has_its_share() -> None:
    first = tuple(Segment(f"1-{rank}", None, 0, 5) for rank in range(2))
    second = tuple(Segment(f"2-{rank}", tip, 10, 7) for rank, tip in enumerate(first))
    snapshots = [
        Snapshot(f"s{n}", "A", "main", n, 10 * n, NOW, tips)
        for n, tips in enumerate((first, second), start=1)
    ]
    found = plan(snapshots, RetentionPolicy(disk_quota=10), NOW)
    assert found.bytes_before == 24
    assert [(r.snapshot.snapshot_id, r.freed_bytes) for r in found.removals] == [("s2", 14)]


def test_ranks_may_differ_in_what_they_share() -> None:
    """Rank 1 stored the same turn twice, rank 0 once: each snapshot ends in a place of its own."""
    shared, mine, yours = (Segment(name, None, 0, 5) for name in ("shared", "mine", "yours"))
    snapshots = [
        Snapshot("first", "A", "main", 1, 10, NOW, (shared, mine)),
        Snapshot("second", "A", "main", 2, 10, NOW, (shared, yours)),
    ]
    found = plan(snapshots, RetentionPolicy(disk_quota=10), NOW)
    assert [(r.snapshot.snapshot_id, r.freed_bytes) for r in found.removals] == [("first", 5)]
    assert found.over_quota == 0


def test_tenants_are_apart() -> None:
    store = Store()
    store.add("A", 1, "a", tenant="one")
    store.add("A", 2, "ab", tenant="two")
    assert removed(plan(store.snapshots, RetentionPolicy(keep_last=1, disk_quota=0), NOW)) == []


def test_a_long_conversation_is_no_worse_than_many_short_ones() -> None:
    store = Store()
    tip = None
    for turn in range(1, 3001):
        tip = Segment(str(turn), tip, turn - 1, 1)
        store.snapshots.append(
            Snapshot(f"s{turn}", "A", "main", turn, turn, NOW, (tip,), pinned=turn == 10)
        )
    found = plan(store.snapshots, RetentionPolicy(disk_quota=0, keep_last=2000), NOW)
    # Down to the pinned turn, whose chain cannot go; what ends inside it frees nothing.
    assert found.bytes_after == 10
    assert {r.snapshot.turn_number for r in found.removals} == set(range(1, 3001)) - {10}


def test_an_empty_store() -> None:
    found = plan([], RetentionPolicy(1, True, 1.0, 0), NOW)
    assert (found.removals, found.kept, found.over_quota) == ((), (), 0)


def test_the_policy_of_the_settings() -> None:
    assert RetentionPolicy.of(Settings()) == RetentionPolicy(10, True, 604_800.0, None, 1800.0)
    settings = Settings(snapshot_disk_quota_gb=1.5, snapshot_keep_named_branches=False)
    assert RetentionPolicy.of(settings).disk_quota == 1_500_000_000
    assert not RetentionPolicy.of(settings).keep_named_branches


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({"priority": 101}, RetentionPolicy(), "priority of 'A' must be from 0 to 100, not 101"),
        ({"priority": -1}, RetentionPolicy(), "priority"),
        ({"snapshot_id": "A/main/2"}, RetentionPolicy(), "'A/main/2' is there twice"),
        ({}, RetentionPolicy(keep_last=0), "keep_last"),
        ({}, RetentionPolicy(half_interest=0), "half_interest"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, object], policy: RetentionPolicy, message: str
) -> None:
    store = Store()
    store.add("A", 1, "a", **changes)
    store.add("A", 2, "ab")
    with pytest.raises(InvalidRequestError, match=message):
        plan(store.snapshots, policy, NOW)
