"""Which snapshots go. The rules, in this order, each over what those before have left:

1. expired: its own ``expires_at`` has come;
2. cold: its conversation was not used for as long as the policy says;
3. count: not among the newest turns of its branch, those that are exempt aside;
4. quota: the least valuable first, by the byte that it frees, until the store fits.

A pinned snapshot never goes. One on a named branch goes only by 1, if named branches are kept. The
last one of a conversation goes by 1 and 2, which say that it is over, never by 3 and 4.
What the value is, and why, is in the decision on retention.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

from engram.errors import InvalidRequestError
from engram.retention.base import (
    TRUNK,
    Keep,
    Kept,
    Reason,
    Removal,
    RetentionPlan,
    RetentionPolicy,
    Snapshot,
    check_entries,
)
from engram.retention.forest import Forest, Stop
from engram.snapshot.conversation import DEFAULT_PRIORITY

Branch: TypeAlias = tuple[str, str, str]
Choice: TypeAlias = tuple[int, Reason, str]

SUPERSEDED: Final = 1 / 8
"""Worth of an end that a newer turn of its branch has left behind, against the newest one."""

POINTS_PER_DOUBLING: Final = 10
"""So many points of priority make a conversation twice as valuable."""


def plan(snapshots: Iterable[Snapshot], policy: RetentionPolicy, now: float) -> RetentionPlan:
    """Decide over all snapshots of a store at the time ``now`` (seconds since the epoch).

    The order of ``snapshots`` decides nothing. Carrying the plan out and planning again at the same
    time removes nothing more.

    Raises `InvalidRequestError` for two snapshots of one id, a priority outside 0 to 100, or a
    policy that makes no sense.
    """
    ordered = sorted(snapshots, key=_place)
    _check(ordered, policy)
    return _Planner(ordered, policy, now).plan()


class _Planner:
    """One run of `plan`. Snapshots are numbered by their place in the list."""

    def __init__(self, snapshots: Sequence[Snapshot], policy: RetentionPolicy, now: float) -> None:
        self.snapshots = snapshots
        self.policy = policy
        self.now = now
        self.forest = Forest(snapshots)
        self.removals: list[Removal] = []
        self.left = dict.fromkeys(range(len(snapshots)))
        self.of_conversation = Counter(snapshot.conversation for snapshot in snapshots)
        self.interests: dict[int, float] = {}
        self.turns: defaultdict[Branch, list[int]] = defaultdict(list)

    def plan(self) -> RetentionPlan:
        before = self.forest.bytes
        for rule in (self._over, self._beyond_count):
            for number, reason, text in list(rule()):
                self._remove(number, reason, text)
        quota = self.policy.disk_quota
        if quota is not None:
            self._fit(quota)
        return RetentionPlan(
            removals=tuple(self.removals),
            kept=tuple(
                Kept(self.snapshots[n], self._why_kept(self.snapshots[n])) for n in self.left
            ),
            bytes_before=before,
            bytes_after=self.forest.bytes,
            over_quota=0 if quota is None else max(0, self.forest.bytes - quota),
        )

    def _over(self) -> Iterator[Choice]:
        """What has expired, and what is of conversations that have gone cold."""
        cold = self.policy.cold_retention
        for number in self.left:
            snapshot = self.snapshots[number]
            if snapshot.pinned:
                continue
            idle = self.now - snapshot.used_at
            if snapshot.expires_at is not None and snapshot.expires_at <= self.now:
                ago = _duration(self.now - snapshot.expires_at)
                yield number, Reason.EXPIRED, f"expired {ago} ago"
            elif cold is not None and idle > cold and not self._named(snapshot):
                text = f"conversation unused for {_duration(idle)}, kept for {_duration(cold)}"
                yield number, Reason.COLD, text

    def _beyond_count(self) -> Iterator[Choice]:
        """What is not among the newest turns of its branch; those that are exempt do not count."""
        keep = self.policy.keep_last
        for number in self.left:
            self.turns[_branch(self.snapshots[number])].append(number)
        for numbers in self.turns.values():
            numbers.sort(key=lambda number: self.snapshots[number].turn_number)
            if keep is None:
                continue
            bound = [number for number in numbers if not self._exempt(self.snapshots[number])]
            for number in bound[:-keep]:
                branch = self.snapshots[number].branch_name
                yield number, Reason.COUNT, f"not among the newest {keep} of branch {branch!r}"

    def _fit(self, quota: int) -> None:
        """Remove the least valuable, by the bytes that it frees, until everything fits.

        Only states and ends of chains free anything, so only they are offered. What one is worth
        can rise while it waits, when an earlier state of its chain or a newer turn of its branch
        has gone: then it is offered again.
        """
        heap: list[tuple[float, int, Stop]] = []

        def offer(stop: Stop) -> None:
            freed = stop.frees()
            if freed and not self._stuck(stop):
                heapq.heappush(heap, (self._density(stop, freed), stop.number, stop))

        for stop in self.forest.stops:
            freed = stop.frees()
            if freed and not self._stuck(stop):
                heap.append((self._density(stop, freed), stop.number, stop))
        heapq.heapify(heap)
        while heap and self.forest.bytes > quota:
            density, _, stop = heapq.heappop(heap)
            if not stop.snapshots or self._stuck(stop):
                continue
            freed = stop.frees()
            now = self._density(stop, freed)
            if now > density:
                heapq.heappush(heap, (now, stop.number, stop))
                continue
            over = self.forest.bytes - quota
            facts = self._facts(stop, freed)
            text = f"least valuable while {over} bytes over the quota: {facts}"
            for number in list(stop.snapshots):
                for changed in self._remove(number, Reason.QUOTA, text):
                    offer(changed)

    def _remove(self, number: int, reason: Reason, text: str) -> list[Stop]:
        snapshot = self.snapshots[number]
        del self.left[number]
        self.of_conversation[snapshot.conversation] -= 1
        freed, changed = self.forest.remove(number)
        self.removals.append(Removal(snapshot, reason, text, freed))
        return changed

    def _stuck(self, stop: Stop) -> bool:
        """True if the quota cannot have this stop: a snapshot is exempt, or a conversation's last.

        Once true it stays so: what else there is of a conversation only becomes less.
        """
        snapshots = stop.snapshots.values()
        for snapshot in snapshots:
            if self._exempt(snapshot) or self.of_conversation[snapshot.conversation] == 1:
                return True
        if len(snapshots) == 1:
            return False
        here = Counter(snapshot.conversation for snapshot in snapshots)
        return any(
            self.of_conversation[conversation] <= count for conversation, count in here.items()
        )

    def _density(self, stop: Stop, freed: int) -> float:
        """What keeping a stop is worth: the tokens that a turn would have to compute again.

        They count once for each snapshot there, as much as its conversation is likely to go on, and
        for each byte that is freed.
        """
        return (
            stop.tokens()
            / freed
            * sum([self._likelihood(n, one) for n, one in stop.snapshots.items()])
        )

    def _likelihood(self, number: int, snapshot: Snapshot) -> float:
        likely = self.interests.get(number)
        if likely is None:
            idle = max(0.0, self.now - snapshot.used_at)
            likely = interest(idle, snapshot.priority, self.policy.half_interest)
            self.interests[number] = likely
        turns = self.turns[_branch(snapshot)]
        while turns[-1] not in self.left:
            turns.pop()
        newest = self.snapshots[turns[-1]].turn_number
        return likely * SUPERSEDED if snapshot.turn_number < newest else likely

    def _facts(self, stop: Stop, freed: int) -> str:
        used = max(snapshot.used_at for snapshot in stop.snapshots.values())
        priority = max(snapshot.priority for snapshot in stop.snapshots.values())
        return (
            f"unused for {_duration(self.now - used)}, priority {priority}, "
            f"{stop.tokens()} tokens to compute again, {freed} bytes"
        )

    def _named(self, snapshot: Snapshot) -> bool:
        return self.policy.keep_named_branches and snapshot.branch_name != TRUNK

    def _exempt(self, snapshot: Snapshot) -> bool:
        return snapshot.pinned or self._named(snapshot)

    def _why_kept(self, snapshot: Snapshot) -> Keep:
        quota = self.policy.disk_quota
        if snapshot.pinned:
            return Keep.PINNED
        if self._named(snapshot):
            return Keep.NAMED_BRANCH
        if quota is None or self.forest.bytes <= quota:
            return Keep.WANTED
        if self.of_conversation[snapshot.conversation] == 1:
            return Keep.ONLY_ONE
        return Keep.SHARED


def interest(idle: float, priority: int, half_interest: float) -> float:
    """How likely a conversation is to go on, times what its priority says it is worth.

    Half as much after ``half_interest`` seconds, a third after twice as many, and so on.
    """
    weight: float = 2.0 ** ((priority - DEFAULT_PRIORITY) / POINTS_PER_DOUBLING)
    return weight * half_interest / (half_interest + idle)


def _branch(snapshot: Snapshot) -> Branch:
    return snapshot.tenant, snapshot.conversation_id, snapshot.branch_name


def _place(snapshot: Snapshot) -> tuple[object, ...]:
    """Least recently used first, then by names, so that equal cases are decided in one way."""
    return (snapshot.used_at, *_branch(snapshot), snapshot.turn_number, snapshot.snapshot_id)


def _check(snapshots: Iterable[Snapshot], policy: RetentionPolicy) -> None:
    if policy.half_interest <= 0:
        raise InvalidRequestError("half_interest must be above 0")
    if policy.keep_last is not None and policy.keep_last < 1:
        raise InvalidRequestError("keep_last must be 1 or more")
    check_entries("snapshot", ((one, one.snapshot_id) for one in snapshots))


def _duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h, 8.0 days."""
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"
