"""`TierManager` over a real store on disk and a device of random bits."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from engram.errors import (
    CaptureLostError,
    EngramError,
    ManifestCorruptError,
    RamTierFullError,
    SegmentCorruptError,
    SnapshotCorruptError,
)
from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import BufferSpec, SegmentHeader
from engram.store.disk import DiskStore
from engram.testing.faults import ControlledFileSystem, Fault, FaultControl
from engram.testing.samples import SHARD, seeded_random
from engram.tiers.base import BufferPlan, Segment, Tier
from engram.tiers.health import StateCheck
from engram.tiers.manager import TierManager
from engram.tiers.payload import tokens_of
from engram.tiers.ram import RamTier
from unit.tiers.device import (
    FakeDevice,
    TokenRun,
    capture,
    random_run,
    same_bits,
)

ROOMY = 1 << 20
WAIT_S = 60

NewManager = Callable[..., TierManager]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def device(rng: Random) -> FakeDevice:
    return FakeDevice(rng)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_manager(store: DiskStore, device: FakeDevice, clock: Clock) -> Iterator[NewManager]:
    made: list[TierManager] = []

    def new(capacity: int = ROOMY) -> TierManager:
        made.append(TierManager(RamTier(capacity), store, SHARD, device.layout, True, clock))
        return made[-1]

    yield new
    for manager in made:
        manager.close()


def check_contents(
    manager: TierManager, run: TokenRun, *, count: int | None = None, all_states: bool = True
) -> None:
    """The run is in RAM, bit by bit what was on the device; of its states, all or the last."""
    start = 0
    ends = run.ends[:count]
    for number, (end, expected) in enumerate(zip(ends, run.expected, strict=False), 1):
        key = run.keys[end - 1]
        rows = resident(manager.ram.get(key, False))
        assert (rows.start, rows.end) == (start, end)
        assert same_bits(manager.views(rows), {n: t for n, t in expected.items() if n != "ssm.1"})
        assert rows.payload is not None
        assert tokens_of(rows.payload, rows.buffers).tolist() == run.tokens[start:end]
        start = end
        if all_states or number == len(ends):
            state = resident(manager.boundary(key))
            assert same_bits(manager.views(state), {"ssm.1": expected["ssm.1"]})
            # Of two readers each may have won with one of the two; both have the same bits.
            below = resident(state.parent)
            assert same_bits(manager.views(below), manager.views(rows))


def resident(segment: Segment | None) -> Segment:
    assert segment is not None
    assert segment.resident
    return segment


def rows_of(boundary: Segment) -> Segment:
    """The rows that a state stands on."""
    assert boundary.has_state
    assert boundary.parent is not None
    return boundary.parent


def saved(
    new_manager: NewManager, device: FakeDevice, rng: Random, run: TokenRun
) -> list[SegmentRef]:
    """A run that is on disk, and in no memory of the manager asked for next."""
    manager = new_manager()
    chain = capture(manager, device, rng, run)
    return list(manager.persist(chain[-1]).result(WAIT_S).refs)


def payload_bytes(device: FakeDevice, num_tokens: int) -> int:
    """What rows of so many tokens and the state at their end take in RAM."""
    return rows_bytes(device, num_tokens) + state_bytes(device)


def chain_bytes(device: FakeDevice, *lengths: int) -> int:
    """What a promoted chain of rows of so many tokens takes in RAM."""
    return sum(rows_bytes(device, length) for length in lengths) + state_bytes(device)


def rows_bytes(device: FakeDevice, num_tokens: int) -> int:
    return _payload_bytes(device, 0, num_tokens)


def state_bytes(device: FakeDevice) -> int:
    return _payload_bytes(device, 1, 1)


def _payload_bytes(device: FakeDevice, start: int, end: int) -> int:
    has_state = start == end
    header = SegmentHeader.plan(
        shard=SHARD,
        key="00" * 32,
        start=start,
        end=end,
        parent="00" * 32 if start else None,
        has_state=has_state,
        buffers=device.layout(end - start, has_state),
    )
    return header.payload_length


def nothing_is_held(manager: TierManager) -> None:
    """All the room can be had again; what was in RAM is gone afterwards."""
    ram = manager.ram
    spec = BufferSpec(name="k.0", dtype="U8", shape=(ram.capacity,), offset=0, length=ram.capacity)
    everything = ram.reserve("00" * 32, 0, 1, None, (spec,), has_state=True)
    assert ram.used == ram.capacity
    ram.fail(everything, RuntimeError("of no use"))
    assert ram.used == 0


def flip_a_bit(root: Path, segment_id: str, rng: Random) -> None:
    path = next(path for path in root.rglob("*") if segment_id in path.name)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# ---- capture and lookup ----


def test_what_was_captured_is_found_bit_by_bit(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (5, 1, 7))
    capture(manager, device, rng, run)
    check_contents(manager, run)
    assert manager.ram.stats.captured == 3
    further = [*run.keys, "00" * 32]
    assert manager.lookup("rid", further, 1) == [5, 6, 13]
    assert manager.lookup("rid", further[:6], 1) == [5, 6]
    assert manager.lookup("rid", further[:4], 1) == [], "no boundary lies in there"


def test_a_lookup_past_a_device_prefix_counts_from_it(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (5, 1, 7))
    chain = capture(manager, device, rng, run)
    assert manager.lookup("rid", run.keys[3:], 1) == [2, 3, 10]
    assert manager.lookup("rid", run.keys[6:], 1) == [7]
    manager.release("rid")
    # Only what is past the device's prefix has to be in RAM.
    for segment in (chain[0], rows_of(chain[0])):
        manager.ram.fail(_filling_again(manager, segment), RuntimeError())
    assert manager.lookup("rid", run.keys[6:], 1) == [7]


def _filling_again(manager: TierManager, segment: Segment) -> Segment:
    segment.filled = type(segment.filled)()
    segment.holders += 1
    return segment


def test_lengths_are_pages(new_manager: NewManager, device: FakeDevice, rng: Random) -> None:
    manager, run = new_manager(), random_run(rng, (8, 4))
    capture(manager, device, rng, run)
    assert manager.lookup("rid", run.keys[3::4], 4) == [2, 3]
    assert manager.lookup("rid", run.keys[7::4], 4) == [1, 2]


def test_nothing_is_promised_while_it_is_filled(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (4,))
    go, reached = threading.Event(), threading.Event()
    read = device.reader(range(4), 0)

    def slow(targets: dict, first: int, last: int, check: StateCheck) -> None:
        reached.set()
        assert go.wait(WAIT_S)
        read(targets, first, last, check)

    assert manager.capture(run.keys, 0, run.tokens, None, slow, on_done=lambda: None)
    assert reached.wait(WAIT_S)
    assert manager.lookup("rid", run.keys, 1) == []
    boundary = manager.boundary(run.keys[-1])
    assert boundary is not None
    persisted = manager.persist(boundary)
    assert not persisted.done()
    go.set()
    refs = persisted.result(WAIT_S).refs
    assert [(ref.key, ref.has_state) for ref in refs] == [
        (run.keys[-1], False),
        (run.keys[-1], True),
    ]
    assert manager.lookup("rid", run.keys, 1) == [4]
    other = new_manager()
    other.promote(refs, "a", seconds=1, exact=True).result(WAIT_S)
    run.expected.append(device.rows(range(4), 0))
    check_contents(other, run)


def test_a_capture_that_fails_is_forgotten_and_lets_go_of_the_device(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (4,))

    def broken(targets: dict, first: int, last: int, check: StateCheck) -> None:
        raise RuntimeError("the device is gone")

    done = threading.Event()
    assert manager.capture(run.keys, 0, run.tokens, None, broken, on_done=done.set)
    assert done.wait(WAIT_S)
    assert manager.ram.stats.capture_failed == 1
    assert manager.ram.used == 0
    assert manager.lookup("rid", run.keys, 1) == []
    capture(manager, device, rng, run)
    check_contents(manager, run)


def test_persisting_a_capture_that_fails_says_that_its_state_is_lost(
    new_manager: NewManager, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (4,))
    go = threading.Event()

    def broken(targets: dict, first: int, last: int, check: StateCheck) -> None:
        assert go.wait(WAIT_S)
        raise RuntimeError("the device is gone")

    manager.capture(run.keys, 0, run.tokens, None, broken, on_done=lambda: None)
    boundary = manager.boundary(run.keys[-1])
    assert boundary is not None
    future = manager.persist(boundary)
    go.set()
    with pytest.raises(CaptureLostError) as caught:
        future.result(WAIT_S)
    assert caught.value.details == {"boundary": 4}, "who asked can compute it again"


@pytest.mark.parametrize("room_for_rows", [False, True])
def test_a_capture_without_room_is_refused(
    new_manager: NewManager, device: FakeDevice, rng: Random, room_for_rows: bool
) -> None:
    run = random_run(rng, (4, 4))
    size = payload_bytes(device, 4)
    manager = new_manager(size + (rows_bytes(device, 4) if room_for_rows else state_bytes(device)))
    first = capture(manager, device, rng, run, count=1)[0]
    called: list[str] = []
    held = manager.ram.hold(first.chain())
    queued = manager.capture(
        run.keys[4:],
        4,
        run.tokens[4:],
        rows_of(first),
        device.reader(range(4), 0),
        on_done=lambda: called.append("done"),
    )
    manager.ram.release(held)
    manager.quiesce()
    assert not queued
    assert called == []
    assert manager.ram.stats.capture_refused == 1
    assert manager.ram.used == size, "rows without their state are not kept"
    assert manager.lookup("rid", run.keys, 1) == [4], "what was there still is"


def test_a_capture_leaves_the_parent_it_stands_on(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run, other = random_run(rng, (4, 4)), random_run(rng, (4,))
    manager = new_manager(2 * payload_bytes(device, 4))
    parent = capture(manager, device, rng, run, count=1)[0]
    capture(manager, device, rng, other)
    done = threading.Event()
    assert manager.capture(
        run.keys[4:],
        4,
        run.tokens[4:],
        rows_of(parent),
        device.reader(range(4), 1),
        on_done=done.set,
    )
    assert done.wait(WAIT_S)
    run.expected.append(device.rows(range(4), 1))
    check_contents(manager, run, all_states=False)


# ---- persist and promote ----


def test_saved_bytes_come_back_bit_by_bit(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (5, 1, 7))
    chain = capture(manager, device, rng, run)
    done = manager.persist(chain[-1]).result(WAIT_S)
    assert [ref.key for ref in done.refs] == [*run.boundary_keys, run.keys[-1]]
    assert [(ref.start, ref.end) for ref in done.refs] == [(0, 5), (5, 6), (6, 13), (13, 13)]
    assert [ref.has_state for ref in done.refs] == [False, False, False, True]
    assert done.written == done.nbytes == sum(s.bytes for s in manager.store.iter_segments())
    fresh = new_manager()
    promoted = fresh.promote(done.refs, "rid", seconds=10, exact=True).result(WAIT_S)
    assert (promoted.source, promoted.read) == (Tier.DISK, done.written)
    check_contents(fresh, run, all_states=False)
    assert fresh.lookup("rid", run.keys, 1) == [13]
    again = fresh.promote(done.refs, "rid", seconds=10, exact=True).result(WAIT_S)
    assert (again.source, again.read, again.nbytes) == (Tier.RAM, 0, done.nbytes)


def test_only_what_is_new_is_written(
    new_manager: NewManager, device: FakeDevice, rng: Random, store: DiskStore
) -> None:
    manager, run = new_manager(), random_run(rng, (5, 6))
    chain = capture(manager, device, rng, run)
    first = manager.persist(chain[0]).result(WAIT_S)
    both = manager.persist(chain[1]).result(WAIT_S)
    again = manager.persist(chain[1]).result(WAIT_S)
    assert both.refs[0] == first.refs[0]
    assert (both.written, again.written) == (both.refs[1].bytes + both.refs[2].bytes, 0)
    assert again.refs == both.refs
    assert {s.segment_id for s in store.iter_segments()} == {
        ref.segment_id for ref in (*first.refs, *both.refs)
    }


def test_a_chain_is_promoted_on_top_of_what_is_in_ram(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run = random_run(rng, (5, 6, 3))
    manager = new_manager()
    first, *_, last = capture(manager, device, rng, run)
    earlier, refs = (manager.persist(end).result(WAIT_S).refs for end in (first, last))
    fresh = new_manager()
    fresh.promote(earlier, "a", seconds=10, exact=True).result(WAIT_S)
    before = fresh.ram.stats.promoted_segments
    fresh.promote(refs, "b", seconds=10, exact=True).result(WAIT_S)
    assert fresh.ram.stats.promoted_segments - before == 3
    check_contents(fresh, run, all_states=False)


def test_other_bits_for_the_same_tokens_do_when_nothing_exact_is_asked(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run = random_run(rng, (5,))
    refs = saved(new_manager, device, rng, run)
    stored, run.expected = run.expected, []
    manager = new_manager()
    capture(manager, device, rng, run)  # the same tokens, computed anew
    loose = manager.promote(refs, "a", seconds=10, exact=False).result(WAIT_S)
    assert (loose.source, loose.read) == (Tier.RAM, 0)
    check_contents(manager, run)
    exact = manager.promote(refs, "a", seconds=10, exact=True).result(WAIT_S)
    assert exact.source is Tier.DISK
    run.expected = stored
    check_contents(manager, run)


def test_a_parent_computed_anew_does_not_make_a_stored_child_look_damaged(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    """Its header names the parent that it was stored with, whose bits are others."""
    run = random_run(rng, (5, 3))
    refs = saved(new_manager, device, rng, run)
    manager = new_manager()
    run.expected.clear()
    capture(manager, device, rng, run, count=1)
    found = manager.promote(refs, "a", seconds=10, exact=False).result(WAIT_S)
    assert found.source is Tier.DISK
    assert manager.ram.stats.corrupt == 0
    assert manager.lookup("b", run.keys, 1) == [8]
    child = manager.boundary(run.keys[-1])
    assert child is not None
    again = manager.persist(child).result(WAIT_S)
    assert list(again.refs) == refs, "a chain that was stored as one stays one"


def test_a_file_found_damaged_in_the_middle_of_a_save_is_no_bug_of_the_clients(
    new_manager: NewManager,
    device: FakeDevice,
    store: DiskStore,
    rng: Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader takes the parent's name away while its child is written."""
    manager, run = new_manager(), random_run(rng, (5, 3))
    parent, child = capture(manager, device, rng, run)
    mark = manager.ram.mark_durable

    def mark_and_lose(
        segment: Segment, segment_id: str, file_bytes: int, file_parent: str | None
    ) -> None:
        mark(segment, segment_id, file_bytes, file_parent)
        if segment is rows_of(parent):
            manager.ram.lose_file(segment)

    monkeypatch.setattr(manager.ram, "mark_durable", mark_and_lose)
    refs = manager.persist(child).result(WAIT_S).refs
    assert store.verify_segment(SHARD, refs[1].segment_id).parent == refs[0].segment_id


def test_a_damaged_segment_is_never_loadable(
    new_manager: NewManager, device: FakeDevice, rng: Random, store: DiskStore
) -> None:
    run = random_run(rng, (5, 6, 3))
    before = new_manager()
    shorter, _, longer = (
        before.persist(boundary).result(WAIT_S).refs
        for boundary in capture(before, device, rng, run)
    )
    refs = list(longer)
    flip_a_bit(store.root, refs[1].segment_id, rng)
    manager = new_manager()
    manager.promote(shorter, "shorter", seconds=10, exact=False).result(WAIT_S)
    for attempt in range(2):
        with pytest.raises(SnapshotCorruptError) as caught:
            manager.promote(refs, "rid", seconds=10, exact=False).result(WAIT_S)
        assert refs[1].segment_id in str(caught.value), attempt
        assert manager.lookup("rid", run.keys, 1) == [5], "what stands before it still serves"
        manager.release("rid")
    assert manager.ram.stats.corrupt == 2
    check_contents(manager, run, count=1)
    manager.release("shorter")
    nothing_is_held(manager)


def test_a_segment_of_another_sequence_is_refused(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run, other = random_run(rng, (5,)), random_run(rng, (5,))
    refs = saved(new_manager, device, rng, run)
    foreign = saved(new_manager, device, rng, other)
    part = rng.randrange(2)
    forged = refs[part].model_copy(update={"segment_id": foreign[part].segment_id})
    manager = new_manager()
    chain = [*refs[:part], forged, *refs[part + 1 :]]
    with pytest.raises(SnapshotCorruptError, match=["key is", "parent is|key is"][part]):
        manager.promote(chain, "rid", seconds=10, exact=True).result(WAIT_S)
    assert manager.lookup("rid", run.keys, 1) == []
    nothing_is_held(manager)


@pytest.mark.parametrize("stateful", [True, False])
def test_a_chain_that_ends_as_none_of_this_model_does_is_refused(
    store: DiskStore, device: FakeDevice, rng: Random, new_manager: NewManager, stateful: bool
) -> None:
    """Rows without a state where the model has one, and a state where it has none."""
    refs = saved(new_manager, device, rng, random_run(rng, [5]))
    other = TierManager(RamTier(ROOMY), store, SHARD, device.layout, stateful)
    wrong = refs[:-1] if stateful else refs
    with pytest.raises(ManifestCorruptError, match="recurrent state at token 5") as refused:
        other.promote(wrong, "owner", seconds=60, exact=True).result(WAIT_S)
    assert refused.value.code == "snapshot_corrupt"
    assert refused.value.hint
    assert (other.ram.used, len(other.ram), other.ram.stats.corrupt) == (0, 0, 1)
    other.close()


def test_a_capture_lays_out_nothing_but_its_segments(
    store: DiskStore, device: FakeDevice, rng: Random
) -> None:
    """It is on the scheduler's thread."""
    asked: list[tuple[int, bool]] = []

    def layout(num_tokens: int, has_state: bool) -> list[BufferPlan]:
        asked.append((num_tokens, has_state))
        return device.layout(num_tokens, has_state)

    manager = TierManager(RamTier(ROOMY), store, SHARD, layout, True)
    asked.clear()
    capture(manager, device, rng, random_run(rng, [5, 7]))
    assert asked == [(5, False), (0, True), (7, False), (0, True)]
    manager.close()


def test_promoting_more_than_ram_holds_says_so_and_holds_nothing(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run = random_run(rng, (4, 4, 4))
    refs = saved(new_manager, device, rng, run)
    manager = new_manager(chain_bytes(device, 4, 4, 4) - 1)
    with pytest.raises(RamTierFullError):
        manager.promote(refs, "rid", seconds=10, exact=True).result(WAIT_S)
    nothing_is_held(manager)


def test_two_promotions_of_one_chain_take_its_room_once(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    run = random_run(rng, (4, 4))
    refs = saved(new_manager, device, rng, run)
    manager = new_manager()
    waiting = [manager.promote(refs, f"r{n}", seconds=10, exact=False) for n in range(8)]
    for future in waiting:
        future.result(WAIT_S)
    check_contents(manager, run, all_states=False)
    for number in range(8):
        manager.release(f"r{number}")
    nothing_is_held(manager)


# ---- leases ----


def test_a_lease_keeps_a_chain_in_ram_until_it_runs_out(
    new_manager: NewManager, device: FakeDevice, rng: Random, clock: Clock
) -> None:
    run, other = random_run(rng, (4, 4)), random_run(rng, (4,))
    refs = saved(new_manager, device, rng, run)
    manager = new_manager(chain_bytes(device, 4, 4))
    manager.promote(refs, "rid", seconds=30, exact=True).result(WAIT_S)
    done = threading.Event()

    def capture_other() -> bool:
        read = device.reader(range(4), 0)
        return manager.capture(other.keys, 0, other.tokens, None, read, on_done=done.set)

    clock.now += 29
    assert not capture_other()
    check_contents(manager, run, all_states=False)
    clock.now += 2
    assert capture_other()
    assert done.wait(WAIT_S)
    manager.release("rid")  # late, and no error


def test_promoting_takes_the_room_of_the_oldest_leases(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    """Else a few restores of large snapshots would keep all others out for minutes."""
    runs = [random_run(rng, (4, 4)) for _ in range(3)]
    chains = [saved(new_manager, device, rng, run) for run in runs]
    manager = new_manager(chain_bytes(device, 4, 4) * 2)
    for name, refs in zip("abc", chains, strict=True):
        manager.promote(refs, name, seconds=30, exact=True).result(WAIT_S)
    assert manager.depths()["leases"] == 2
    assert [manager.lookup(f"look-{n}", run.keys, 1) != [] for n, run in enumerate(runs)] == [
        False,
        True,
        True,
    ]
    check_contents(manager, runs[2], all_states=False)


def test_promoting_never_takes_the_room_of_what_a_lookup_promised(
    new_manager: NewManager, device: FakeDevice, rng: Random, clock: Clock
) -> None:
    runs = [random_run(rng, (4, 4)) for _ in range(2)]
    first, second = (saved(new_manager, device, rng, run) for run in runs)
    manager = new_manager(chain_bytes(device, 4, 4))
    manager.promote(first, "a", seconds=30, exact=True).result(WAIT_S)
    assert manager.lookup("a", runs[0].keys, 1)
    with pytest.raises(RamTierFullError):
        manager.promote(second, "b", seconds=30, exact=True).result(WAIT_S)
    check_contents(manager, runs[0], all_states=False)
    clock.now += 61
    manager.promote(second, "b", seconds=30, exact=True).result(WAIT_S)
    check_contents(manager, runs[1], all_states=False)


def test_releasing_ends_a_lease_early_and_renewing_prolongs_it(
    new_manager: NewManager, device: FakeDevice, rng: Random, clock: Clock
) -> None:
    manager, run = new_manager(), random_run(rng, (4, 4))
    chain = capture(manager, device, rng, run)
    manager.lease("rid", chain, seconds=10)
    clock.now += 9
    manager.lease("rid", chain, seconds=10)
    assert [b.holders for b in chain] == [1, 1]
    clock.now += 9
    manager.lease("other", chain[:1], seconds=100)
    assert [b.holders for b in chain] == [2, 1]
    clock.now += 2
    manager.lease("third", [], seconds=1)
    assert [b.holders for b in chain] == [1, 0], "the one that ran out is gone, the other is not"
    manager.release("other")
    assert [b.holders for b in chain] == [0, 0]
    manager.release("nobody")


def test_a_lookup_leases_what_it_promises(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (4, 4))
    chain = capture(manager, device, rng, run)
    manager.lookup("rid", run.keys[5:], 1)
    assert [b.holders for b in chain] == [0, 1]
    manager.lookup("rid", run.keys, 1)
    assert [b.holders for b in chain] == [1, 1]
    manager.release("rid")
    assert [b.holders for b in chain] == [0, 0]


# ---- drop ----


def test_a_dropped_segment_is_gone_from_disk_and_lives_on_in_ram(
    new_manager: NewManager, device: FakeDevice, rng: Random, store: DiskStore
) -> None:
    manager, run = new_manager(), random_run(rng, (4,))
    [boundary] = capture(manager, device, rng, run)
    refs = manager.persist(boundary).result(WAIT_S).refs
    assert manager.drop([ref.segment_id for ref in refs]).result(WAIT_S) == 2
    assert list(store.iter_segments()) == []
    check_contents(manager, run)
    assert (boundary.durable, boundary.segment_id) == (False, None)
    assert manager.persist(boundary).result(WAIT_S).refs == refs, "it can be made durable again"
    manager.drop([rng.choice(refs).segment_id]).result(WAIT_S)
    with pytest.raises(SegmentCorruptError):
        new_manager().promote(refs, "rid", seconds=1, exact=True).result(WAIT_S)


def test_a_drop_waits_for_the_writes_asked_for_before(
    new_manager: NewManager, device: FakeDevice, rng: Random, store: DiskStore
) -> None:
    manager, run = new_manager(), random_run(rng, (4, 4))
    chain = capture(manager, device, rng, run)
    first = manager.persist(chain[0]).result(WAIT_S).refs
    both = manager.persist(chain[1])
    dropped = manager.drop([ref.segment_id for ref in first])
    assert dropped.result(WAIT_S) == 2
    assert both.done()
    assert {s.segment_id for s in store.iter_segments()} == {
        ref.segment_id for ref in both.result().refs[1:]
    }


def test_persist_promote_and_drop_at_once(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    """Whatever the order, bytes are right or an error says so, and nothing stays held."""
    runs = [random_run(rng, (3, 2, 4)) for _ in range(4)]
    room = (chain_bytes(device, 3, 2, 4) + 2 * state_bytes(device)) * 3
    manager = new_manager(room)
    refs: dict[int, list[SegmentRef]] = {}
    for number, run in enumerate(runs):
        chain = capture(manager, device, rng, run)
        refs[number] = list(manager.persist(chain[-1]).result(WAIT_S).refs)
    seeds = [rng.randrange(2**32) for _ in range(4)]
    outcomes: list[BaseException | None] = []

    def work(seed: int) -> None:
        mine = Random(seed)
        for step in range(25):
            number = mine.randrange(len(runs))
            run, owner = runs[number], f"{seed}-{step}"
            action = mine.randrange(4)
            try:
                if action == 0:
                    manager.promote(
                        refs[number], owner, seconds=60, exact=mine.random() < 0.5
                    ).result(WAIT_S)
                    with manager.ram.lock:
                        held = manager.boundary(run.keys[-1])
                        # Somebody else may have put another in its place, and that may have left.
                        if held is None or not manager.ram.loadable(held, 0):
                            continue
                        manager.lease(owner, held.chain(), seconds=60)
                    *rows, state = held.chain()
                    assert all(
                        same_bits({**manager.views(r), "ssm.1": e["ssm.1"]}, e)
                        for r, e in zip(rows, run.expected, strict=True)
                    )
                    last = run.expected[-1]["ssm.1"]
                    assert same_bits(manager.views(state), {"ssm.1": last})
                elif action == 1:
                    boundary = manager.boundary(run.boundary_keys[mine.randrange(3)])
                    if boundary is not None:
                        manager.persist(boundary).result(WAIT_S)
                elif action == 2:
                    gone = mine.choice(refs[number]).segment_id
                    manager.drop([gone]).result(WAIT_S)
                else:
                    manager.lookup(owner, run.keys, 1)
            except EngramError as error:
                outcomes.append(error)
            finally:
                manager.release(owner)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, seed) for seed in seeds]:
            future.result(WAIT_S)
    allowed = (SnapshotCorruptError, CaptureLostError, RamTierFullError)
    assert [error for error in outcomes if not isinstance(error, allowed)] == []
    assert manager.ram.used <= room
    nothing_is_held(manager)
    for run in itertools.islice(runs, 2):
        run.expected.clear()
        capture(manager, device, rng, run)
        check_contents(manager, run)


# ---- files that go behind the manager's back ----


def test_a_save_never_names_a_file_that_has_gone(
    new_manager: NewManager, device: FakeDevice, store: DiskStore, rng: Random
) -> None:
    """The HTTP process quarantines what it finds damaged; the good bytes are in RAM still."""
    manager, run = new_manager(), random_run(rng, (3, 4))
    parent, child = capture(manager, device, rng, run)
    ref = manager.persist(parent).result(WAIT_S).refs[0]
    store.delete_segment(SHARD, ref.segment_id)
    saved = manager.persist(child).result(WAIT_S)
    assert saved.refs[0].segment_id == ref.segment_id, "the same bytes again"
    for one in saved.refs:
        assert store.verify_segment(SHARD, one.segment_id).file_length == one.bytes
    assert saved.written == saved.nbytes


def test_a_save_writes_a_file_that_was_cut_again(
    new_manager: NewManager, device: FakeDevice, store: DiskStore, rng: Random
) -> None:
    """What a save acknowledges is durable, the turns it stands on included."""
    manager, run = new_manager(), random_run(rng, (3, 4))
    parent, child = capture(manager, device, rng, run)
    ref = manager.persist(parent).result(WAIT_S).refs[0]
    path = next(store.root.rglob(f"{ref.segment_id}.seg"))
    path.write_bytes(path.read_bytes()[: rng.randrange(ref.bytes)])
    for one in manager.persist(child).result(WAIT_S).refs:
        assert store.verify_segment(SHARD, one.segment_id).file_length == one.bytes


def test_a_save_that_stands_on_nothing_any_more_says_so(
    new_manager: NewManager, device: FakeDevice, store: DiskStore, rng: Random
) -> None:
    manager, run = new_manager(), random_run(rng, (3, 4))
    parent, child = capture(manager, device, rng, run)
    ref = manager.persist(parent).result(WAIT_S).refs[0]
    with manager.ram.lock:
        manager.ram._drop_payload(rows_of(parent))
    store.delete_segment(SHARD, ref.segment_id)
    with pytest.raises(CaptureLostError) as caught:
        manager.persist(child).result(WAIT_S)
    assert caught.value.details == {"boundary": 7}, "who asked can compute it again"
    assert not manager.ram.whole(child), "so that it is captured anew"
    assert manager.stand(run.keys) is None


# ---- a slow store ----


@pytest.fixture
def control(tmp_path: Path) -> FaultControl:
    return FaultControl(tmp_path / "faults")


@pytest.fixture
def slow_manager(
    tmp_path: Path, device: FakeDevice, clock: Clock, control: FaultControl
) -> Iterator[NewManager]:
    made: list[TierManager] = []
    store = DiskStore.open(tmp_path / "slow", lock=False, fs=ControlledFileSystem(control))

    def new(capacity: int = ROOMY) -> TierManager:
        made.append(TierManager(RamTier(capacity), store, SHARD, device.layout, True, clock))
        return made[-1]

    yield new
    control.clear()
    for manager in made:
        manager.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(WAIT_S * 100):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_what_waits_to_be_written_leaves_room_in_ram(
    slow_manager: NewManager, device: FakeDevice, rng: Random, control: FaultControl
) -> None:
    size = payload_bytes(device, 4)
    manager = slow_manager(size * 4)
    control.set(write=Fault(block=True))
    waiting, runs = [], [random_run(rng, (4,)) for _ in range(4)]
    for run in runs:
        [boundary] = capture(manager, device, rng, run)
        waiting.append(manager.persist(boundary))
    until(lambda: control.blocked("write") == 1)
    assert manager.ram.held == 2 * size, "a half of the RAM tier"
    depths = manager.depths()
    assert (depths["writes_running"], depths["writes_waiting"]) == (2, 2)
    assert depths["bytes_held_for_writing"] == 2 * size
    other = random_run(rng, (4,))
    capture(manager, device, rng, other)
    check_contents(manager, other)
    assert manager.boundary(runs[0].keys[-1]) is not None
    control.clear()
    assert [f.result(WAIT_S).written > 0 for f in waiting[:2]] == [True, True]
    lost = [f.exception(WAIT_S) for f in waiting[2:]]
    assert sum(isinstance(error, CaptureLostError) for error in lost) == 1, "one had to make room"
    assert all(e is None or e.details == {"boundary": 4} for e in lost)  # type: ignore[attr-defined]
    assert manager.depths()["bytes_held_for_writing"] == 0
    nothing_is_held(manager)


def test_a_segment_is_let_go_as_soon_as_it_is_written(
    slow_manager: NewManager, device: FakeDevice, rng: Random, control: FaultControl
) -> None:
    size = payload_bytes(device, 4)
    manager = slow_manager(size * 3)
    run = random_run(rng, (4, 4, 4))
    chain = capture(manager, device, rng, run)
    first = manager.persist(chain[0]).result(WAIT_S).refs[0]
    control.set(write=Fault(block=True))
    all_of_it = manager.persist(chain[-1])
    until(lambda: control.blocked("write") == 1)
    held = [segment.holders for segment in chain[-1].chain()]
    assert held == [0, 1, 1, 1], "what is on disk need not be held"
    assert first.segment_id == rows_of(chain[0]).segment_id
    assert [b.holders for b in chain[:2]] == [0, 0], "earlier states are not part of it"
    control.clear()
    assert len(all_of_it.result(WAIT_S).refs) == 4
    assert [segment.holders for segment in chain[-1].chain()] == [0, 0, 0, 0]


def test_a_chain_larger_than_the_share_is_written_when_nothing_else_is(
    slow_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    manager = slow_manager(payload_bytes(device, 4) * 3)
    chain = capture(manager, device, rng, random_run(rng, (4, 4, 4)))
    assert manager.persist(chain[-1]).result(WAIT_S).written > 0


def test_a_drop_waits_for_writes_that_are_not_held_yet(
    slow_manager: NewManager, device: FakeDevice, rng: Random, control: FaultControl
) -> None:
    manager = slow_manager(payload_bytes(device, 4) * 4)
    runs = [random_run(rng, (4,)) for _ in range(3)]
    boundaries = [capture(manager, device, rng, run)[0] for run in runs]
    control.set(write=Fault(block=True))
    writes = [manager.persist(boundary) for boundary in boundaries]
    dropped = manager.drop(["00" * 32])
    until(lambda: control.blocked("write") == 1)
    assert manager.depths()["writes_waiting"] == 2
    assert not dropped.done()
    control.clear()
    assert dropped.result(WAIT_S) == 1
    assert all(write.done() for write in writes)


def test_promotions_that_nobody_waits_for_never_begin(
    slow_manager: NewManager, device: FakeDevice, rng: Random, control: FaultControl
) -> None:
    runs = [random_run(rng, (4,)) for _ in range(5)]
    refs = [saved(slow_manager, device, rng, run) for run in runs]
    manager = slow_manager()
    control.set(read=Fault(block=True))
    futures = [manager.promote(ref, f"r{n}", seconds=10, exact=True) for n, ref in enumerate(refs)]
    until(lambda: control.blocked("read") == 2)
    assert manager.depths()["promotions"] == 5
    for number in (3, 4, 0):
        manager.abandon(f"r{number}")
    manager.abandon("nobody")
    assert [future.cancelled() for future in futures] == [False, False, False, True, True]
    assert manager.depths()["promotions"] == 2
    control.clear()
    for future in futures[:3]:
        future.result(WAIT_S)
    assert manager.depths()["leases"] == 2, "what was begun is in RAM, but leased to nobody"
    assert manager.lookup("x", runs[3].keys, 1) == []
    assert manager.depths()["promotions"] == 0


def test_saved_and_promoted_chains_outlive_a_flood(
    new_manager: NewManager, device: FakeDevice, rng: Random
) -> None:
    """The RAM tier keeps what somebody asked to keep, as long as what nobody did can go."""
    size = payload_bytes(device, 4)
    promoted, kept = random_run(rng, (4, 4)), random_run(rng, (4,))
    refs = saved(new_manager, device, rng, promoted)
    manager = new_manager(size * 5)
    manager.promote(refs, "rid", seconds=10, exact=True).result(WAIT_S)
    manager.release("rid")
    [boundary] = capture(manager, device, rng, kept)
    manager.persist(boundary).result(WAIT_S)
    for _ in range(10):
        capture(manager, device, rng, random_run(rng, (4,)))
    check_contents(manager, promoted, all_states=False)
    check_contents(manager, kept)
