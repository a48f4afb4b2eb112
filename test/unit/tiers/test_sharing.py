"""Conversations that begin alike: what is common is stored once, bit by bit what each has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from engram.core.tokens import TokenArray
from engram.errors import RamTierFullError, SnapshotCorruptError
from engram.snapshot.manifest import SegmentRef, rows_of
from engram.store import segment_files as segment_files_module
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.testing.samples import SHARD, seeded_random
from engram.tiers import capture as capture_module
from engram.tiers.base import Segment
from engram.tiers.health import StateCheck
from engram.tiers.manager import TierManager
from engram.tiers.payload import tokens_of
from engram.tiers.ram import RamTier
from unit.tiers.device import FakeDevice, page_keys, page_keys_after, same_bits

WAIT_S = 60


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store") as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "MIN_SHARED_BYTES", 1)


class Talks:
    """Sequences whose rows are what was computed for their tokens, anew in each `epoch`."""

    def __init__(self, rng: Random, store: DiskStore) -> None:
        self.rng, self.store = rng, store
        self.manager = self.new_manager()
        self.epoch = 0
        self._rows: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def new_manager(self) -> TierManager:
        return TierManager(
            RamTier(1 << 20), self.store, SHARD, FakeDevice.layout, True, page_keys=page_keys_after
        )

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2**32) for _ in range(count)]

    def bits(self, key: str) -> dict[str, torch.Tensor]:
        """The rows and the state at a page key, [1, ...] each."""
        place = (self.epoch, key)
        if place not in self._rows:
            device = FakeDevice(self.rng)
            self._rows[place] = {name: tensor[:1] for name, tensor in device.buffers.items()}
        return self._rows[place]

    def expected(self, tokens: list[int]) -> dict[str, torch.Tensor]:
        found = [self.bits(key) for key in page_keys(tokens)]
        rows = {name: torch.cat([one[name] for one in found]) for name in ("k.0", "v.0")}
        return {**rows, "ssm.1": found[-1]["ssm.1"]}

    def capture(self, tokens: list[int]) -> Segment:
        """Capture a sequence as the cache does; its boundary, once the copy is done."""
        keys = page_keys(tokens)
        expected = self.expected(tokens)
        parent = self.manager.stand(keys[:-1])
        start = parent.end if parent is not None else 0

        def read(
            targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck
        ) -> None:
            for name, target in targets.items():
                rows = expected[name]
                target.copy_(rows if name == "ssm.1" else rows[start + first : start + last])

        done = threading.Event()
        assert self.manager.capture(
            keys[start:], start, tokens[start:], parent, read, on_done=done.set
        )
        assert done.wait(WAIT_S)
        boundary = self.manager.boundary(keys[-1])
        assert boundary is not None
        return boundary

    def save(self, tokens: list[int]) -> tuple[SegmentRef, ...]:
        return self.manager.persist(self.capture(tokens)).result(WAIT_S).refs

    def restored(self, refs: tuple[SegmentRef, ...]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Tokens and bits that another process reads."""
        fresh = self.new_manager()
        fresh.promote(refs, "owner", seconds=60, exact=True).result(WAIT_S)
        boundary = fresh.boundary(refs[-1].key)
        assert boundary is not None
        *rows, state = boundary.chain()
        tokens: list[int] = []
        for segment in rows:
            assert segment.payload is not None
            tokens += tokens_of(segment.payload, segment.buffers).tolist()
        found = {
            name: torch.cat([fresh.views(segment)[name] for segment in rows])
            for name in ("k.0", "v.0")
        }
        found["ssm.1"] = fresh.views(state)["ssm.1"].clone()
        fresh.close()
        return tokens, found

    def check(self, tokens: list[int], refs: tuple[SegmentRef, ...]) -> None:
        found, bits = self.restored(refs)
        assert found == tokens
        assert same_bits(bits, self.expected(tokens))

    def restart(self) -> None:
        """As another process on the same store: nothing is in RAM, nothing is remembered."""
        self.manager.close()
        self.manager = self.new_manager()

    def promote(self, refs: tuple[SegmentRef, ...]) -> None:
        self.manager.promote(refs, "owner", seconds=60, exact=True).result(WAIT_S)

    def stored_bytes(self) -> int:
        return sum(segment.bytes for segment in self.store.iter_segments())

    def stored_rows(self) -> int:
        """KV rows on disk, over all files."""
        count = 0
        for segment in self.store.iter_segments():
            header = self.store.verify_segment(segment.shard, segment.segment_id)
            count += header.end - header.start
        return count


@pytest.fixture
def talks(rng: Random, store: DiskStore) -> Iterator[Talks]:
    talks = Talks(rng, store)
    yield talks
    talks.manager.close()


def test_a_common_prefix_is_stored_once(talks: Talks) -> None:
    prefix = talks.tokens(20)
    saved = []
    for _ in range(5):
        tokens = [*prefix, *talks.tokens(talks.rng.randrange(1, 9))]
        saved.append((tokens, talks.save(tokens)))
    alone = sum(len(tokens) - 20 for tokens, _ in saved)
    assert talks.stored_rows() == 20 + alone
    for tokens, refs in saved:
        talks.check(tokens, refs)
    first = saved[0][1][0]
    for _, refs in saved[1:]:
        assert (refs[0].segment_id, refs[0].bytes, refs[0].end) == (
            first.segment_id,
            first.bytes,
            20,
        )


def test_other_bits_of_the_same_tokens_are_stored_as_they_are(talks: Talks) -> None:
    """The prefix of the second was computed anew: it comes back as it was, not as the first's."""
    prefix = talks.tokens(20)
    first = [*prefix, *talks.tokens(4)]
    refs = talks.save(first)
    talks.check(first, refs)
    talks.epoch += 1
    second = [*prefix, *talks.tokens(4)]
    others = talks.save(second)
    assert others[0].segment_id != refs[0].segment_id
    talks.check(second, others)
    talks.epoch -= 1
    talks.check(first, refs)


def test_prefixes_of_different_length_and_later_turns(talks: Talks) -> None:
    """A tree: branches anywhere, turns on top of them; each token's rows lie on disk once."""
    roots = talks.tokens(30)
    known = [roots]
    distinct: set[str] = set()
    saved = []
    for _ in range(12):
        base = talks.rng.choice(known)
        cut = talks.rng.randrange(1, len(base) + 1)
        tokens = [*base[:cut], *talks.tokens(talks.rng.randrange(2, 12))]
        known.append(tokens)
        saved.append((tokens, talks.save(tokens)))
        distinct.update(page_keys(tokens))
    for tokens, refs in saved:
        talks.check(tokens, refs)
        assert sum(ref.end - ref.start for ref in rows_of(refs)) == len(tokens)
    assert talks.stored_rows() == len(distinct)


def test_what_is_too_small_is_not_cut(talks: Talks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "MIN_SHARED_BYTES", 28 * 21)
    prefix = talks.tokens(20)
    for _ in range(2):
        tokens = [*prefix, *talks.tokens(4)]
        refs = talks.save(tokens)
        assert len(refs) == 2
        talks.check(tokens, refs)
    longer = [*prefix, talks.tokens(1)[0]]
    for _ in range(2):
        refs = talks.save([*longer, *talks.tokens(4)])
    assert [ref.end for ref in refs] == [21, 25, 25]


def test_a_twin_whose_file_is_gone_is_no_twin(talks: Talks) -> None:
    prefix = talks.tokens(20)
    first = talks.save([*prefix, *talks.tokens(4)])
    talks.store.delete_segment(SHARD, first[0].segment_id)
    tokens = [*prefix, *talks.tokens(4)]
    refs = talks.save(tokens)
    assert refs[0].segment_id != first[0].segment_id
    talks.check(tokens, refs)


def test_rows_of_another_salt_are_never_shared(talks: Talks) -> None:
    """The first page's key tells them apart, whatever the tokens."""
    tokens = talks.tokens(20)
    array = np.array(tokens, dtype="<u4")
    talks.capture(tokens)
    assert talks.manager.ram.twins.common(page_keys(tokens)[0], array) == 20
    assert talks.manager.ram.twins.common("00" * 32, array) == 0


def damage(store: DiskStore, segment_id: str) -> None:
    """Flip a bit of a stored file, and let a reader find it."""
    path = Layout(store.root).segment(SHARD, segment_id)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(SnapshotCorruptError):
        store.verify_segment(SHARD, segment_id)


def test_what_stands_on_a_damaged_file_is_not_put_on_another(talks: Talks) -> None:
    """The rows come back as the beginning of a twin's file, on which nothing of theirs stands."""
    prefix = talks.tokens(20)
    longer = [*prefix, *talks.tokens(9)]
    talks.capture(longer)
    turns = [[*prefix, *talks.tokens(4)]]
    first = talks.save(turns[0])
    turns.append([*turns[0], *talks.tokens(5)])
    second = talks.save(turns[1])
    talks.check(longer, talks.save(longer))
    talks.check(turns[1], second)
    damage(talks.store, first[0].segment_id)
    turns.append([*turns[1], *talks.tokens(5)])
    third = talks.save(turns[2])
    talks.check(turns[2], third)
    talks.check(longer, talks.save(longer))


def test_what_is_still_being_copied_is_shared_as_well(talks: Talks) -> None:
    """A turn is saved as soon as it is over, before its copy is."""
    prefix = talks.tokens(20)
    talks.save([*prefix, *talks.tokens(4)])
    tokens = [*prefix, *talks.tokens(4)]
    keys, expected = page_keys(tokens), talks.expected(tokens)
    begun, go_on = threading.Event(), threading.Event()

    def read(targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        for name, target in targets.items():
            target.copy_(expected[name] if name == "ssm.1" else expected[name][first:last])

    assert talks.manager.capture(keys, 0, tokens, None, read, on_done=lambda: None)
    assert begun.wait(WAIT_S)
    boundary = talks.manager.boundary(keys[-1])
    assert boundary is not None
    saving = talks.manager.persist(boundary)
    # The writer is at it, or soon will be.
    while not talks.manager.depths()["writes_running"]:
        pass
    wait([saving], 0.2)
    go_on.set()
    talks.check(tokens, saving.result(WAIT_S).refs)
    assert talks.stored_rows() == 28


def test_a_common_prefix_is_stored_once_after_a_restart(talks: Talks) -> None:
    """What was read from disk is compared with what is captured, on any part of a chain."""
    prefix = talks.tokens(20)
    first = [*prefix, *talks.tokens(6)]
    talks.save(first)
    second = [*first, *talks.tokens(12)]
    refs = talks.save(second)
    before = talks.stored_rows()
    talks.restart()
    talks.promote(refs)
    saved = []
    for shared in (17, 26 + 7):
        tokens = [*second[:shared], *talks.tokens(5)]
        saved.append((tokens, talks.save(tokens)))
    assert talks.stored_rows() == before + 2 * 5
    for tokens, theirs in [*saved, (second, refs)]:
        talks.check(tokens, theirs)
    # And what is itself the beginning of a longer file.
    talks.restart()
    talks.promote(saved[0][1])
    tokens = [*second[:11], *talks.tokens(5)]
    talks.check(tokens, talks.save(tokens))
    assert talks.stored_rows() == before + 3 * 5


def test_rows_under_an_unknown_seed_are_shared_where_their_parent_tells_it(talks: Talks) -> None:
    """A salt is in no file: the first rows of a salted sequence have no key for their first page,
    those on top of them have."""

    def salted(tokens: TokenArray, before: str | None) -> list[str]:
        return page_keys(tokens.tolist(), before or "ab" * 32)

    tokens = talks.tokens(20)
    talks.save(tokens)
    refs = talks.save([*tokens, *talks.tokens(9)])
    talks.manager.close()
    talks.manager = TierManager(
        RamTier(1 << 20), talks.store, SHARD, FakeDevice.layout, True, page_keys=salted
    )
    talks.promote(refs)
    boundary = talks.manager.boundary(refs[-1].key)
    assert boundary is not None
    lower, upper, state = boundary.chain()
    assert lower.first_key is None
    assert upper.first_key == page_keys([*tokens, *_tokens(upper)])[20]
    assert state.first_key is None


def test_what_a_save_would_write_is_foreseen(talks: Talks) -> None:
    """Twins are not counted, other bits of the same tokens are, and never less than is written."""
    roots = [talks.tokens(30)]
    known, shared = list(roots), 0
    for number in range(12):
        talks.epoch = number % 3 == 2
        base = talks.rng.choice(known)
        cut = talks.rng.randrange(1, len(base) + 1)
        tokens = [*base[:cut], *talks.tokens(talks.rng.randrange(2, 12))]
        known.append(tokens)
        boundary = talks.capture(tokens)
        naive = sum(segment.segment_id is None for segment in boundary.chain())
        foreseen = talks.manager.unsaved_bytes(boundary)
        before = talks.stored_bytes()
        files = len(list(talks.store.iter_segments()))
        written = talks.manager.persist(boundary).result(WAIT_S).written
        assert foreseen == written == talks.stored_bytes() - before
        shared += naive - (len(list(talks.store.iter_segments())) - files)
        assert talks.manager.unsaved_bytes(boundary) == 0
    assert shared > 0


def test_what_a_save_would_write_stays_though_its_twin_leaves_ram(talks: Talks) -> None:
    tokens = talks.tokens(20)
    refs = talks.save([*tokens, *talks.tokens(5)])
    boundary = talks.capture([*tokens, *talks.tokens(7)])
    foreseen = talks.manager.unsaved_bytes(boundary)
    assert talks.manager.ram.demote(frozenset(ref.segment_id for ref in refs)) > 0
    assert talks.manager.persist(boundary).result(WAIT_S).written == foreseen


def test_what_a_save_would_write_counts_what_stands_on_a_lost_file(talks: Talks) -> None:
    tokens = talks.tokens(20)
    talks.save(tokens)
    longer = [*tokens, *talks.tokens(5)]
    refs = talks.save(longer)
    boundary = talks.manager.boundary(refs[-1].key)
    assert boundary is not None
    talks.store.delete_segment(SHARD, refs[0].segment_id)
    foreseen = talks.manager.unsaved_bytes(boundary)
    assert foreseen >= talks.manager.persist(boundary).result(WAIT_S).written > 0


def test_the_beginning_of_a_file_is_read_within_the_bound_of_the_tier(
    talks: Talks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier with room for the beginning alone: nothing else of the file is allocated or kept."""
    monkeypatch.setattr(segment_files_module, "PIECE_BYTES", 64)
    longer = talks.tokens(50)
    talks.save(longer)
    tokens = [*longer[:9], *talks.tokens(3)]
    refs = talks.save(tokens)
    assert [(ref.start, ref.end) for ref in refs] == [(0, 9), (9, 12), (12, 12)]
    assert refs[0].bytes > refs[1].bytes
    held = talks.manager.boundary(refs[-1].key)
    assert held is not None
    needed = sum(segment.nbytes for segment in held.chain())
    for capacity, fits in ((needed, True), (needed - 1, False)):
        allocated: list[int] = []

        class Counting(RamTier):
            def allocate(self, nbytes: int) -> torch.Tensor:
                allocated.append(nbytes)  # noqa: B023 - used within the loop alone
                return super().allocate(nbytes)

        fresh = TierManager(Counting(capacity), talks.store, SHARD, FakeDevice.layout, True)
        promoted = fresh.promote(refs, "owner", seconds=60, exact=True)
        if fits:
            promoted.result(WAIT_S)
            assert sum(allocated) == fresh.ram.used == needed
        else:
            with pytest.raises(RamTierFullError):
                promoted.result(WAIT_S)
            assert sum(allocated) <= capacity
        fresh.close()


def test_damage_behind_the_beginning_of_a_file_is_found(talks: Talks) -> None:
    longer = talks.tokens(50)
    talks.save(longer)
    refs = talks.save([*longer[:9], *talks.tokens(3)])
    path = Layout(talks.store.root).segment(SHARD, refs[0].segment_id)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    fresh = talks.new_manager()
    with pytest.raises(SnapshotCorruptError):
        fresh.promote(refs, "owner", seconds=60, exact=True).result(WAIT_S)
    assert (fresh.ram.used, fresh.ram.stats.corrupt) == (0, 1)
    fresh.close()
    assert not path.exists()


def _tokens(rows: Segment) -> list[int]:
    assert rows.payload is not None
    return tokens_of(rows.payload, rows.buffers).tolist()
