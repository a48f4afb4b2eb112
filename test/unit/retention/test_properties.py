"""What holds for every store and policy."""

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from engram.retention import Reason, RetentionPolicy, Snapshot, plan
from engram.retention.forest import Forest
from unit.retention.cases import NOW, named_bytes, random_store, removed, tokens_again

stores = st.builds(
    random_store,
    st.integers(0, 2**32).map(Random),
    st.integers(0, 6),
    st.integers(1, 2),
    st.booleans(),
)
policies = st.builds(
    RetentionPolicy,
    keep_last=st.none() | st.integers(1, 4),
    keep_named_branches=st.booleans(),
    cold_retention=st.none() | st.sampled_from([50.0, 1_000.0, 100_000.0]),
    disk_quota=st.none() | st.integers(0, 8_000),
)


def exempt(snapshot: Snapshot, policy: RetentionPolicy) -> bool:
    return snapshot.pinned or (policy.keep_named_branches and snapshot.branch_name != "main")


@given(stores, policies)
def test_every_snapshot_goes_or_stays_and_bytes_add_up(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    found = plan(store, policy, NOW)
    staying = [one.snapshot for one in found.kept]
    going = [removal.snapshot for removal in found.removals]
    assert sorted(s.snapshot_id for s in staying + going) == sorted(s.snapshot_id for s in store)
    assert found.bytes_before == named_bytes(store)
    assert found.bytes_after == named_bytes(staying)
    assert sum(removal.freed_bytes for removal in found.removals) == found.freed_bytes
    assert all(removal.text for removal in found.removals)


@given(stores, policies)
def test_each_removal_frees_what_it_says(store: list[Snapshot], policy: RetentionPolicy) -> None:
    left = list(store)
    for removal in plan(store, policy, NOW).removals:
        before = named_bytes(left)
        left.remove(removal.snapshot)
        assert before - named_bytes(left) == removal.freed_bytes


@given(st.integers(0, 2**32).map(Random), st.integers(1, 2))
def test_what_must_be_computed_again_counts_from_the_nearest_state_that_stays(
    rng: Random, ranks: int
) -> None:
    store = random_store(rng, 3, ranks)
    forest = Forest(store)
    left = dict(enumerate(store))
    while left:
        for number, snapshot in left.items():
            stop = forest.stop_of[number]
            assert stop.tokens() == tokens_again(list(left.values()), snapshot)
            others = [one for one in left.values() if one.tips != snapshot.tips]
            assert stop.frees() == named_bytes(list(left.values())) - named_bytes(others)
        number = rng.choice(list(left))
        del left[number]
        forest.remove(number)


@given(stores, policies)
def test_a_pinned_one_never_goes_and_a_named_one_only_when_it_has_expired(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    for removal in plan(store, policy, NOW).removals:
        assert not removal.snapshot.pinned
        if exempt(removal.snapshot, policy):
            assert removal.reason is Reason.EXPIRED


@given(stores, policies)
def test_count_and_quota_never_take_the_last_of_a_conversation(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    left = {id(snapshot): snapshot for snapshot in store}
    for removal in plan(store, policy, NOW).removals:
        del left[id(removal.snapshot)]
        if removal.reason in (Reason.COUNT, Reason.QUOTA):
            names = {snapshot.conversation for snapshot in left.values()}
            assert removal.snapshot.conversation in names


@given(stores, policies)
def test_the_same_again_removes_nothing_more(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    first = plan(store, policy, NOW)
    again = plan([one.snapshot for one in first.kept], policy, NOW)
    assert again.removals == ()
    assert again.over_quota == first.over_quota


@given(stores, policies, st.randoms(use_true_random=False))
def test_the_order_given_decides_nothing(
    store: list[Snapshot], policy: RetentionPolicy, rng: Random
) -> None:
    shuffled = list(store)
    rng.shuffle(shuffled)
    assert plan(shuffled, policy, NOW) == plan(store, policy, NOW)


@given(stores, policies)
def test_the_quota_is_kept_unless_nothing_else_could_go(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    found = plan(store, policy, NOW)
    if policy.disk_quota is None:
        assert found.over_quota == 0
        return
    assert found.over_quota == max(0, found.bytes_after - policy.disk_quota)
    if not found.over_quota:
        return
    # Whatever ends in one place cannot go as a whole, or would free nothing.
    staying = [one.snapshot for one in found.kept]
    for place in {snapshot.tips for snapshot in staying}:
        here = [snapshot for snapshot in staying if snapshot.tips == place]
        others = [snapshot for snapshot in staying if snapshot.tips != place]
        remaining = {snapshot.conversation for snapshot in others}
        assert (
            any(exempt(snapshot, policy) for snapshot in here)
            or any(snapshot.conversation not in remaining for snapshot in here)
            or named_bytes(others) == found.bytes_after
        )


@given(stores, policies)
def test_the_quota_takes_nothing_in_vain(store: list[Snapshot], policy: RetentionPolicy) -> None:
    found = plan(store, policy, NOW)
    freed: dict[object, int] = {}
    for removal in found.removals:
        if removal.reason is Reason.QUOTA:
            tips = removal.snapshot.tips
            freed[tips] = freed.get(tips, 0) + removal.freed_bytes
    assert all(freed.values())


@given(stores, policies, st.data())
def test_a_pin_without_a_quota_never_removes_another(
    store: list[Snapshot], policy: RetentionPolicy, data: st.DataObject
) -> None:
    if not store:
        return
    policy = replace(policy, disk_quota=None)
    place = data.draw(st.integers(0, len(store) - 1))
    pinned = [replace(s, pinned=True) if n == place else s for n, s in enumerate(store)]
    before = set(removed(plan(store, policy, NOW)))
    assert set(removed(plan(pinned, policy, NOW))) <= before - {store[place].snapshot_id}


@given(stores, policies, st.integers(0, 8_000))
def test_a_larger_quota_removes_a_beginning_of_what_a_smaller_one_does(
    store: list[Snapshot], policy: RetentionPolicy, more: int
) -> None:
    quota = policy.disk_quota or 0
    small = removed(plan(store, replace(policy, disk_quota=quota), NOW))
    large = removed(plan(store, replace(policy, disk_quota=quota + more), NOW))
    assert small[: len(large)] == large


@given(stores, policies)
def test_what_is_over_or_beyond_the_count_is_what_the_rules_say(
    store: list[Snapshot], policy: RetentionPolicy
) -> None:
    """The rules again, one snapshot at a time."""
    expected = set()
    for snapshot in store:
        if snapshot.pinned:
            continue
        cold = policy.cold_retention is not None and NOW - snapshot.used_at > policy.cold_retention
        expired = snapshot.expires_at is not None and snapshot.expires_at <= NOW
        if expired or (cold and not exempt(snapshot, policy)):
            expected.add(snapshot.snapshot_id)
    left = [snapshot for snapshot in store if snapshot.snapshot_id not in expected]
    for snapshot in left:
        newer = [
            other
            for other in left
            if (other.conversation, other.branch_name)
            == (snapshot.conversation, snapshot.branch_name)
            and other.turn_number > snapshot.turn_number
            and not exempt(other, policy)
        ]
        if policy.keep_last and len(newer) >= policy.keep_last and not exempt(snapshot, policy):
            expected.add(snapshot.snapshot_id)
    found = plan(store, replace(policy, disk_quota=None), NOW)
    assert set(removed(found)) == expected
