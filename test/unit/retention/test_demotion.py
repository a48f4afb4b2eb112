"""Who leaves RAM."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.core.settings import Settings
from engram.errors import InvalidRequestError
from engram.retention.demotion import (
    DemotionPlan,
    DemotionPolicy,
    DemotionReason,
    Resident,
    plan_demotions,
)

NOW = 1_000_000.0
POLICY = DemotionPolicy(active_timeout=300, warm_timeout=1800)


def resident(name: str, idle: float, nbytes: int = 10, **changes: object) -> Resident:
    return replace(Resident(name, NOW - idle, nbytes), **changes)  # type: ignore[arg-type]


def told(plan: DemotionPlan) -> list[tuple[str, str]]:
    return [(one.resident.conversation_id, one.reason.value) for one in plan.demotions]


PLENTY = [
    resident("gone", 1801),
    resident("pinned", 9999, pinned=True),
    resident("held", 9999, held=True),
    resident("old", 1700),
    resident("dear", 1700, priority=100),
    resident("young", 400),
    resident("active", 10, priority=0),
]


@pytest.mark.parametrize(
    ("policy", "expected", "over"),
    [
        (POLICY, [("gone", "idle")], (0, 0)),
        (
            replace(POLICY, max_conversations=4),
            [("gone", "idle"), ("old", "count"), ("young", "count")],
            (0, 0),
        ),
        (replace(POLICY, max_bytes=50), [("gone", "idle"), ("old", "memory")], (0, 0)),
        (
            replace(POLICY, max_bytes=1, max_conversations=5),
            [
                ("gone", "idle"),
                ("old", "count"),
                ("young", "memory"),
                ("dear", "memory"),
                ("active", "memory"),
            ],
            (0, 19),
        ),
        (
            replace(POLICY, max_conversations=1),
            [
                ("gone", "idle"),
                ("old", "count"),
                ("young", "count"),
                ("dear", "count"),
                ("active", "count"),
            ],
            (1, 0),
        ),
        # One that is in active use is not idle, whatever the warm timeout.
        (DemotionPolicy(active_timeout=5000, warm_timeout=1), [], (0, 0)),
    ],
)
def test_golden(
    policy: DemotionPolicy, expected: list[tuple[str, str]], over: tuple[int, int]
) -> None:
    plan = plan_demotions(PLENTY, policy, NOW)
    assert told(plan) == expected
    assert (plan.over_conversations, plan.over_bytes) == over


def test_reasons_in_words_and_what_must_be_saved_first() -> None:
    plan = plan_demotions(
        [resident("a", 2000, durable=False), resident("b", 500), resident("c", 400)],
        replace(POLICY, max_conversations=1),
        NOW,
    )
    assert [(one.text, one.save_first) for one in plan.demotions] == [
        ("unused for 2000 s, 1800 s allowed", True),
        ("2 conversations in RAM, 1 allowed", False),
    ]
    (one,) = plan_demotions([resident("a", 0, 7)], DemotionPolicy(max_bytes=3), NOW).demotions
    assert one.text == "7 bytes in RAM, 3 allowed"


residents = st.lists(
    st.builds(
        Resident,
        conversation_id=st.integers(0, 30).map(str),
        used_at=st.sampled_from([NOW + 5, NOW, NOW - 200, NOW - 1000, NOW - 1801, NOW - 10_000]),
        bytes=st.integers(0, 20),
        priority=st.integers(0, 100),
        pinned=st.booleans(),
        held=st.booleans(),
        durable=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda one: one.conversation_id,
)
policies = st.builds(
    DemotionPolicy,
    active_timeout=st.sampled_from([1.0, 300.0]),
    warm_timeout=st.sampled_from([100.0, 1800.0]),
    max_conversations=st.none() | st.integers(1, 8),
    max_bytes=st.none() | st.integers(0, 120),
)


@given(residents, policies)
def test_limits_are_kept_by_those_who_may_leave(
    everyone: list[Resident], policy: DemotionPolicy
) -> None:
    plan = plan_demotions(everyone, policy, NOW)
    leaving = [one.resident for one in plan.demotions]
    assert len(leaving) == len(set(leaving))
    assert not [one for one in leaving if one.pinned or one.held]
    assert all(one.text for one in plan.demotions)
    staying = [one for one in everyone if one not in leaving]
    movable = [one for one in staying if not one.pinned and not one.held]
    count, used = len(staying), sum(one.bytes for one in staying)
    over_count = max(0, count - (policy.max_conversations or count))
    over_bytes = 0 if policy.max_bytes is None else max(0, used - policy.max_bytes)
    assert (plan.over_conversations, plan.over_bytes) == (over_count, over_bytes)
    assert not over_count or not movable
    assert not over_bytes or not [one for one in movable if one.bytes]


@given(residents, policies, st.randoms(use_true_random=False))
def test_order_decides_nothing_and_again_asks_for_nothing(
    everyone: list[Resident], policy: DemotionPolicy, rng: object
) -> None:
    plan = plan_demotions(everyone, policy, NOW)
    shuffled = list(everyone)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_demotions(shuffled, policy, NOW) == plan
    leaving = [one.resident for one in plan.demotions]
    staying = [one for one in everyone if one not in leaving]
    assert plan_demotions(staying, policy, NOW).demotions == ()


@given(residents, policies)
def test_an_active_one_leaves_for_a_limit_and_after_all_others(
    everyone: list[Resident], policy: DemotionPolicy
) -> None:
    seen_active = False
    for one in plan_demotions(everyone, policy, NOW).demotions:
        active = NOW - one.resident.used_at < policy.active_timeout
        if active:
            assert one.reason is not DemotionReason.IDLE
        seen_active = seen_active or active
        assert active or not seen_active


def test_the_policy_of_the_settings() -> None:
    assert DemotionPolicy.of(Settings()) == DemotionPolicy(300.0, 1800.0, 100, 10_000_000_000)


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([resident("a", 0, priority=101)], "priority"),
        ([resident("a", 0), resident("a", 1)], "'a' is there twice"),
    ],
)
def test_what_makes_no_sense_is_refused(everyone: list[Resident], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        plan_demotions(everyone, POLICY, NOW)
