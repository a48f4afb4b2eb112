"""`RamTier`: bounds, eviction order and the index, one rule a test."""

from __future__ import annotations

from random import Random

import pytest

from engram.core.canonical import blake3_hex
from engram.errors import RamTierFullError
from engram.snapshot.segment import BufferSpec
from engram.testing.samples import seeded_random
from engram.tiers import ram as ram_module
from engram.tiers.base import Fill, Segment
from engram.tiers.ram import RamTier


@pytest.fixture
def rng() -> Random:
    return seeded_random()


def key(name: str) -> str:
    return blake3_hex(name.encode())


def bytes_buffer(nbytes: int) -> tuple[BufferSpec, ...]:
    return (BufferSpec(name="k.0", dtype="U8", shape=(nbytes,), offset=0, length=nbytes),)


def filling(ram: RamTier, name: str, nbytes: int, parent: Segment | None = None) -> Segment:
    start = parent.end if parent is not None else 0
    boundary = ram.reserve(
        key(name), start, start + 1, parent, bytes_buffer(nbytes), has_state=False
    )
    ram.publish(boundary)
    return boundary


def ready(ram: RamTier, name: str, nbytes: int, parent: Segment | None = None) -> Segment:
    boundary = filling(ram, name, nbytes, parent)
    boundary.payload = ram.allocate(nbytes)
    ram.complete(boundary)
    return boundary


def test_least_recently_used_goes_first() -> None:
    ram = RamTier(30)
    a, b, c = (ready(ram, name, 10) for name in "abc")
    ram.touch([a])
    ready(ram, "d", 10)
    assert (a.in_ram, b.in_ram, c.in_ram) == (True, False, True)
    assert ram.get(b.key, False) is None, "not durable, so nothing is left of it"
    assert b.payload is None
    assert (ram.used, ram.stats.evicted) == (30, 1)


def test_a_chain_is_used_as_one_and_goes_from_its_end() -> None:
    ram = RamTier(40)
    a = ready(ram, "a", 10)
    b = ready(ram, "b", 10, a)
    c = ready(ram, "c", 10, b)
    other = ready(ram, "other", 10)
    ram.touch(c.ancestors())
    for gone in (other, c, b):
        ready(ram, f"instead of {gone.key}", 10)
        assert not gone.in_ram
    assert a.in_ram


def test_no_parent_goes_before_its_resident_child() -> None:
    ram = RamTier(30)
    parent = ready(ram, "parent", 10)
    child = ready(ram, "child", 10, parent)
    ready(ram, "other", 10)
    ram.touch([child])  # the parent is now the least recently used of the three
    ready(ram, "new", 20)
    assert parent.in_ram or not child.in_ram
    assert ram.used <= ram.capacity


def test_making_room_for_a_child_leaves_its_parent() -> None:
    ram = RamTier(20)
    parent = ready(ram, "parent", 10)
    other = ready(ram, "other", 10)
    child = ready(ram, "child", 10, parent)
    assert (parent.in_ram, other.in_ram, child.in_ram) == (True, False, True)
    with pytest.raises(RamTierFullError):
        filling(ram, "grandchild", 10, child)
    assert parent.resident_children == 1
    assert child.resident_children == 0, "the failed reservation is undone"


def test_what_is_held_never_goes() -> None:
    ram = RamTier(20)
    a, b = ready(ram, "a", 10), ready(ram, "b", 10)
    held = ram.hold([a, b])
    with pytest.raises(RamTierFullError) as caught:
        filling(ram, "c", 10)
    assert "--max-warm-memory-gb" in caught.value.hint
    assert (a.in_ram, b.in_ram, ram.used, ram.held) == (True, True, 20, 20)
    ram.release(held)
    assert ram.held == 0
    ready(ram, "c", 10)
    assert not a.in_ram


def test_what_is_being_filled_never_goes() -> None:
    ram = RamTier(10)
    boundary = filling(ram, "a", 10)
    with pytest.raises(RamTierFullError):
        filling(ram, "b", 10)
    ram.complete(boundary)
    ready(ram, "b", 10)
    assert not boundary.in_ram


def test_nothing_goes_for_what_cannot_be_had_anyway() -> None:
    ram = RamTier(30)
    held, loose = ready(ram, "held", 10), ready(ram, "loose", 10)
    ram.hold([held])
    with pytest.raises(RamTierFullError):
        filling(ram, "new", 25)
    assert loose.in_ram


def test_a_parent_used_before_its_child_goes_right_after_it() -> None:
    ram = RamTier(20)
    parent = ready(ram, "parent", 10)
    child = ready(ram, "child", 10, parent)
    ready(ram, "new", 20)
    assert (parent.in_ram, child.in_ram) == (False, False)


def test_what_nobody_asked_to_keep_goes_first() -> None:
    ram = RamTier(60)
    parent = ready(ram, "parent", 10)
    wanted = ready(ram, "wanted", 10, parent)
    turn = ready(ram, "turn", 10, wanted)
    others = [ready(ram, f"other {n}", 10) for n in range(3)]
    ram.want(wanted)
    assert (parent.wanted, wanted.wanted, turn.wanted) == (True, True, False)
    others += [ready(ram, f"flood {number}", 10) for number in range(20)]
    assert (parent.in_ram, wanted.in_ram, turn.in_ram) == (True, True, False)
    assert ram.loadable(wanted, 0)
    ready(ram, "large", 50)
    assert (parent.in_ram, wanted.in_ram) == (True, False), "wanted is not held: it goes last"
    assert not any(other.in_ram for other in others)


def test_a_wanted_chain_keeps_its_order_of_use() -> None:
    ram = RamTier(40)
    a = ready(ram, "a", 10)
    b = ready(ram, "b", 10, a)
    c = ready(ram, "c", 10)
    for boundary in (c, b):
        ram.want(boundary)
    ready(ram, "new", 20)
    assert (a.in_ram, b.in_ram, c.in_ram) == (True, True, False)


def test_larger_than_all_of_it_is_refused_before_anything_goes() -> None:
    ram = RamTier(20)
    kept = ready(ram, "a", 10)
    with pytest.raises(RamTierFullError, match="21 bytes"):
        filling(ram, "b", 21)
    assert kept.in_ram


def test_a_failed_fill_gives_its_room_back() -> None:
    ram = RamTier(10)
    boundary = filling(ram, "a", 10)
    error = RuntimeError("the copy failed")
    ram.fail(boundary, error)
    assert boundary.filled.exception() is error
    assert (ram.used, boundary.fill, ram.get(boundary.key, False)) == (0, Fill.FAILED, None)
    assert not ram.whole(boundary)
    ready(ram, "b", 10)


def test_on_a_failed_parent_nothing_new_can_stand() -> None:
    ram = RamTier(100)
    parent = filling(ram, "a", 10)
    child = ready(ram, "b", 10, parent)
    assert ram.whole(child)
    ram.fail(parent, RuntimeError())
    assert not ram.whole(child)
    assert not ram.loadable(child, 0)
    assert not ram.whole(child)
    instead = ready(ram, "b", 10)
    assert ram.get(child.key, False) is instead, "a broken chain gives way"


def test_the_first_write_wins() -> None:
    ram = RamTier(100)
    first = ready(ram, "a", 10)
    second = ram.reserve(first.key, 0, 1, None, bytes_buffer(10), has_state=False)
    assert ram.publish(second) is first
    assert ram.get(first.key, False) is first


def test_room_of_the_second_write_comes_back() -> None:
    ram = RamTier(20)
    first = ready(ram, "a", 10)
    second = ram.reserve(first.key, 0, 1, None, bytes_buffer(10), has_state=False)
    ram.publish(second)
    ram.complete(second)
    ram.touch([first])
    ready(ram, "b", 10)
    assert first.in_ram
    assert not second.in_ram
    assert ram.get(first.key, False) is first


def test_replacing_keeps_the_old_one_whole_for_its_holder() -> None:
    ram = RamTier(30)
    old = ready(ram, "a", 10)
    payload = old.payload
    held = ram.hold([old])
    new = ram.reserve(old.key, 0, 1, None, bytes_buffer(10), has_state=False)
    assert ram.publish(new, replace=True) is new
    ram.complete(new)
    ready(ram, "b", 10)
    with pytest.raises(RamTierFullError):
        filling(ram, "c", 30)
    assert old.in_ram
    assert old.payload is payload
    ram.release(held)
    ready(ram, "d", 10)
    assert not old.in_ram
    assert ram.get(old.key, False) is new, "its successor stays"


def test_what_is_durable_stays_in_the_index() -> None:
    ram = RamTier(10)
    boundary = ready(ram, "a", 10)
    ram.mark_durable(boundary, "11" * 32, 1, None)
    ready(ram, "b", 10)
    assert (boundary.in_ram, boundary.payload) == (False, None)
    assert ram.get(boundary.key, False) is boundary
    assert ram.whole(boundary)
    assert not ram.loadable(boundary, 0)
    ram.forget_files(frozenset(("11" * 32,)))
    assert ram.get(boundary.key, False) is None


def test_forgetting_a_file_leaves_the_bytes_in_ram() -> None:
    ram = RamTier(10)
    boundary = ready(ram, "a", 10)
    ram.mark_durable(boundary, "11" * 32, 1, None)
    ram.forget_files(frozenset(("11" * 32,)))
    assert ram.get(boundary.key, False) is boundary
    assert (boundary.durable, boundary.segment_id, boundary.resident) == (False, None, True)


def test_cold_entries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_module, "MAX_COLD_ENTRIES", 3)
    ram = RamTier(10)
    made = []
    for number in range(6):
        boundary = ready(ram, str(number), 10)
        ram.mark_durable(boundary, key(f"file {number}"), 1, None)
        made.append(boundary)
    assert [ram.get(b.key, False) is b for b in made] == [False, False, True, True, True, True]


def test_loadable_past_a_token_needs_only_what_is_past_it() -> None:
    ram = RamTier(100)
    a = filling(ram, "a", 10)
    b = ready(ram, "b", 10, a)
    assert not ram.loadable(b, 0)
    assert ram.loadable(b, a.end)
    assert [node.end for node in b.chain()] == [1, 2]
    assert [node.end for node in b.chain(a.end)] == [2]
