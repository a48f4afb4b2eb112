"""`RamTier` under any sequence of uses: what holds after every one of them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engram.core.canonical import blake3_hex
from engram.errors import RamTierFullError
from engram.snapshot.segment import BufferSpec
from engram.tiers.base import Fill, Segment
from engram.tiers.ram import RamTier

CAPACITY = 100
NAMES = tuple("abcdef")
ANY = st.integers(0, 2**16)


class RamTierMachine(RuleBasedStateMachine):
    """Keys are few, so that writes of the same key meet; sizes fill the tier with three or four."""

    @initialize()
    def begin(self) -> None:
        self.ram = RamTier(CAPACITY)
        self.made: list[Segment] = []
        self.filling: list[Segment] = []
        self.held: list[tuple[Segment, ...]] = []
        self.failed_now = False
        self.before: dict[Segment, tuple[bool, int]] = {}
        self.files = 0

    def _begin_step(self, failing: bool = False) -> None:
        self.failed_now = failing
        self.before = {b: (b.in_ram, b.holders) for b in self.made}

    def _parent(self, number: int) -> Segment | None:
        standing = [b for b in self.made if self.ram.get(b.key, False) is b and self.ram.whole(b)]
        choices: list[Segment | None] = [None, *standing]
        return choices[number % len(choices)]

    @rule(name=st.sampled_from(NAMES), nbytes=st.integers(1, 60), number=ANY, replace=st.booleans())
    def reserve(self, name: str, nbytes: int, number: int, replace: bool) -> None:
        self._begin_step()
        parent = self._parent(number)
        start = parent.end if parent is not None else 0
        before = blake3_hex((parent.key if parent is not None else "").encode() + name.encode())
        spec = BufferSpec(name="k.0", dtype="U8", shape=(nbytes,), offset=0, length=nbytes)
        used = self.ram.used
        try:
            boundary = self.ram.reserve(before, start, start + 1, parent, (spec,), has_state=False)
        except RamTierFullError:
            assert nbytes > self.ram.capacity - self.ram.used
            assert self.ram.used <= used
            return
        known = self.ram.get(boundary.key, False)
        first_stands = known is not None and self.ram.whole(known) and not replace
        stands = self.ram.publish(boundary, replace=replace)
        assert stands is (known if first_stands else boundary)
        assert self.ram.get(boundary.key, False) is stands
        self.made.append(boundary)
        self.filling.append(boundary)

    @precondition(lambda self: self.filling)
    @rule(number=ANY)
    def complete(self, number: int) -> None:
        self._begin_step()
        boundary = self.filling.pop(number % len(self.filling))
        boundary.payload = self.ram.allocate(boundary.nbytes)
        self.ram.complete(boundary)
        assert boundary.filled.result(0) is None
        assert boundary.resident

    @precondition(lambda self: self.filling)
    @rule(number=ANY)
    def fail(self, number: int) -> None:
        self._begin_step(failing=True)
        boundary = self.filling.pop(number % len(self.filling))
        self.ram.fail(boundary, RuntimeError("the copy failed"))
        assert not boundary.in_ram
        assert self.ram.get(boundary.key, False) is not boundary

    @precondition(lambda self: any(b.resident for b in self.made))
    @rule(number=ANY)
    def hold(self, number: int) -> None:
        self._begin_step()
        resident = [b for b in self.made if b.resident]
        chosen = resident[number % len(resident)]
        self.held.append(self.ram.hold(b for b in chosen.ancestors() if b.in_ram))

    @precondition(lambda self: self.held)
    @rule(number=ANY)
    def release(self, number: int) -> None:
        self._begin_step()
        self.ram.release(self.held.pop(number % len(self.held)))

    @precondition(lambda self: self.made)
    @rule(number=ANY)
    def want(self, number: int) -> None:
        self._begin_step()
        chosen = self.made[number % len(self.made)]
        self.ram.want(chosen)
        assert all(b.wanted for b in chosen.ancestors())

    @precondition(lambda self: any(b.resident and not b.durable for b in self.made))
    @rule(number=ANY)
    def mark_durable(self, number: int) -> None:
        self._begin_step()
        fit = [b for b in self.made if b.resident and not b.durable]
        self.files += 1
        self.ram.mark_durable(fit[number % len(fit)], blake3_hex(str(self.files).encode()), 1, None)

    @precondition(lambda self: any(b.durable for b in self.made))
    @rule(number=ANY)
    def forget_file(self, number: int) -> None:
        self._begin_step()
        durable = [b for b in self.made if b.durable]
        chosen = durable[number % len(durable)]
        segment_id = chosen.segment_id
        assert segment_id is not None
        self.ram.forget_files(frozenset((segment_id,)))
        if self.ram.get(chosen.key, False) is chosen:
            assert chosen.in_ram
            assert not chosen.durable

    @invariant()
    def room_is_counted_and_bounded(self) -> None:
        assert self.ram.used == sum(b.nbytes for b in self.made if b.in_ram)
        assert self.ram.used <= CAPACITY

    @invariant()
    def held_and_filling_stay(self) -> None:
        for boundary, (was_in_ram, holders) in self.before.items():
            if was_in_ram and holders and not self.failed_now:
                assert boundary.in_ram
        assert all(b.holders >= 1 and b.in_ram for b in self.filling)

    @invariant()
    def parents_stay_while_a_child_is_resident(self) -> None:
        for boundary in self.made:
            children = [b for b in self.made if b.parent is boundary and b.in_ram]
            assert boundary.resident_children == len(children)
            left = self.before.get(boundary, (False, 0))[0] and not boundary.in_ram
            assert not (left and children and not self.failed_now)

    def _could_go(self, boundary: Segment) -> bool:
        """Whether neither it nor anything that stands on it is held or being filled."""
        above = [b for b in self.made if b.in_ram and boundary in b.ancestors()]
        return not any(b.holders or b.fill is Fill.FILLING for b in above)

    @invariant()
    def what_nobody_wants_goes_first(self) -> None:
        gone = [b for b, (was, _) in self.before.items() if was and not b.in_ram]
        if any(b.wanted for b in gone) and not self.failed_now:
            assert not any(b.in_ram and not b.wanted and self._could_go(b) for b in self.made)

    @invariant()
    def what_a_wanted_one_stands_on_is_wanted(self) -> None:
        assert all(b.parent.wanted for b in self.made if b.wanted and b.parent is not None)

    @invariant()
    def the_index_holds_only_what_can_be_had(self) -> None:
        for boundary in self.made:
            if self.ram.get(boundary.key, False) is boundary:
                assert boundary.in_ram or boundary.durable
            if boundary.in_ram and boundary.fill is Fill.READY:
                assert boundary.payload is not None
            if not boundary.in_ram:
                assert boundary.payload is None

    def teardown(self) -> None:
        """When nobody holds anything, all the room can be had again."""
        for boundary in self.filling:
            self.ram.complete(boundary)
        for held in self.held:
            self.ram.release(held)
        assert all(b.holders == 0 for b in self.made)
        spec = BufferSpec(name="k.0", dtype="U8", shape=(CAPACITY,), offset=0, length=CAPACITY)
        self.ram.reserve(blake3_hex(b"the last"), 0, 1, None, (spec,), has_state=False)
        assert self.ram.used == CAPACITY
        assert not any(b.in_ram for b in self.made)


def test_any_sequence_of_uses() -> None:
    run_state_machine_as_test(
        RamTierMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
