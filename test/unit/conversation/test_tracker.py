"""`ConversationTracker`: what is a turn, which number it has, and for how long it is known."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from engram.conversation import tracker as tracker_module
from engram.conversation.tracker import MAX_UNTAGGED, UNTAGGED_SECONDS, ConversationTracker
from engram.conversation.turns import RunningRequest, Tag, Turn
from engram.core.tokens import to_tokens
from engram.errors import InternalError, NotFoundError
from engram.testing.samples import seeded_random


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Told(ConversationTracker):
    """A tracker that learns of a branch before it is asked about it, as the service sees to it."""

    def __init__(self, saved: Counter[tuple[str, str, str]], **options: Any) -> None:
        super().__init__(**options)
        self._saved = saved

    def begin(self, request: RunningRequest) -> None:
        if request.tag is not None:
            assert self.learn(request.tag, self._saved[request.tag.branch]) == []
        super().begin(request)

    def adopt(self, rid: str, tag: Tag) -> Turn:
        self.learn(tag, self._saved[tag.branch])
        return super().adopt(rid, tag)

    def newest(self, tag: Tag) -> int:
        self.learn(tag, self._saved[tag.branch])
        return super().newest(tag)


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def saved() -> Counter[tuple[str, str, str]]:
    """Branch -> number of its newest saved turn."""
    return Counter()


@pytest.fixture
def tracker(clock: Clock, saved: Counter[tuple[str, str, str]]) -> ConversationTracker:
    return Told(saved, clock=clock)


def serve(
    tracker: ConversationTracker, rid: str, tag: Tag | None = None, length: int = 3
) -> Turn | None:
    tracker.begin(RunningRequest(rid, to_tokens(range(length)), tag, "lora", "salt"))
    return tracker.finish(rid, [7, 8])


def test_a_turn_has_all_tokens_and_what_its_keys_are_seeded_with(
    tracker: ConversationTracker, clock: Clock, rng: Random
) -> None:
    prompt = [rng.randrange(2**32) for _ in range(5)]
    output = [rng.randrange(2**32) for _ in range(3)]
    tag = Tag("c")
    tracker.begin(RunningRequest("r", to_tokens(prompt), tag, "lora", "salt"))
    turn = tracker.finish("r", output)
    assert turn is not None
    assert turn.request.tokens.tolist() == prompt + output
    assert (turn.request.extra_key, turn.request.cache_salt) == ("lora", "salt")
    assert (turn.tag, turn.number, turn.request.finished_at) == (tag, 1, clock.now)


def test_turns_are_counted_by_branch_and_tenant(tracker: ConversationTracker) -> None:
    tags = [Tag("c"), Tag("c", "other"), Tag("d"), Tag("c", tenant="t")]
    numbers = {tag.branch: 0 for tag in tags}
    for count in range(12):
        tag = tags[count % 3 if count < 9 else 3]
        turn = serve(tracker, f"r{count}", tag)
        assert turn is not None
        numbers[tag.branch] += 1
        assert turn.number == numbers[tag.branch] == tracker.newest(tag)
        assert tracker.find(tag) is turn
        assert tracker.find(tag, turn.number) is turn
        assert tracker.turn_of(f"r{count}") is turn


def test_counting_goes_on_from_the_newest_saved_turn(
    tracker: ConversationTracker, saved: Counter[tuple[str, str, str]]
) -> None:
    tag = Tag("c")
    saved[tag.branch] = 4
    assert tracker.newest(tag) == 4
    assert tracker.find(tag) is None
    assert not tracker.knows(tag)
    turn = serve(tracker, "r", tag)
    assert turn is not None
    assert turn.number == 5
    assert tracker.knows(tag)


def test_a_branch_counts_on_from_the_turn_it_starts_at(tracker: ConversationTracker) -> None:
    tag = Tag("c", "try")
    assert tracker.newest(tag) == 0
    tracker.reached(tag, 4)
    assert tracker.find(tag) is None
    turn = serve(tracker, "r", tag)
    assert turn is not None
    assert turn.number == 5
    tracker.reached(tag, 4)
    assert tracker.find(tag) is turn, "an older turn saved late changes nothing"


def test_a_continuation_from_a_snapshot_counts_on_its_branch(tracker: ConversationTracker) -> None:
    serve(tracker, "a", Tag("c"))
    turn = serve(tracker, "b", Tag("c", parent_snapshot="snap-1"))
    assert turn is not None
    assert (turn.number, turn.tag.parent_snapshot) == (2, "snap-1")


def test_what_never_began_or_was_abandoned_is_no_turn(tracker: ConversationTracker) -> None:
    assert tracker.finish("unknown", [1]) is None
    tracker.begin(RunningRequest("r", to_tokens([1]), Tag("c")))
    tracker.abandon("r")
    tracker.abandon("r")
    assert tracker.finish("r", [1]) is None
    assert tracker.newest(Tag("c")) == 0


def test_a_request_that_is_left_does_not_take_another_of_its_id_along(
    tracker: ConversationTracker,
) -> None:
    first = RunningRequest("r", to_tokens([1]), Tag("c"))
    tracker.begin(first)
    tracker.left(RunningRequest("r", to_tokens([1]), Tag("c")))  # a duplicate that was refused
    assert tracker.finish("r", [2]) is not None
    tracker.begin(RunningRequest("r", to_tokens([3]), Tag("c")))
    tracker.left(first)  # its client closes the reply only now
    assert tracker.finish("r", [4]) is not None
    tracker.begin(first)
    tracker.left(first)
    assert tracker.finish("r", [2]) is None


def test_running_requests_are_bounded(
    tracker: ConversationTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_RUNNING", 3)
    for number in range(5):
        tracker.begin(RunningRequest(f"r{number}", to_tokens([1]), Tag("c")))
    finished = [tracker.finish(f"r{number}", [2]) is not None for number in range(5)]
    assert finished == [False, False, True, True, True]


# ---- adoption ----


def test_an_untagged_request_is_adopted_as_the_next_turn(tracker: ConversationTracker) -> None:
    serve(tracker, "a", Tag("c"))
    assert serve(tracker, "plain") is None
    assert tracker.turn_of("plain") is None
    turn = tracker.adopt("plain", Tag("c"))
    assert turn.number == 2
    assert turn.request.rid == "plain"
    assert tracker.adopt("plain", Tag("c")) is turn, "adopting twice is adopting once"
    assert tracker.newest(Tag("c")) == 2
    with pytest.raises(NotFoundError):
        tracker.adopt("plain", Tag("another"))


def test_the_refusal_says_how_long_requests_are_remembered(tracker: ConversationTracker) -> None:
    with pytest.raises(NotFoundError, match="'nobody'") as caught:
        tracker.adopt("nobody", Tag("c"))
    assert "1000" in caught.value.hint
    assert "5 minutes" in caught.value.hint


def test_untagged_requests_expire_by_age(tracker: ConversationTracker, clock: Clock) -> None:
    serve(tracker, "old")
    clock.now += UNTAGGED_SECONDS / 2
    serve(tracker, "young")
    clock.now += UNTAGGED_SECONDS / 2 + 1
    with pytest.raises(NotFoundError):
        tracker.adopt("old", Tag("c"))
    assert tracker.adopt("young", Tag("c")).number == 1


def test_untagged_requests_expire_by_number(tracker: ConversationTracker) -> None:
    for number in range(MAX_UNTAGGED + 2):
        serve(tracker, f"r{number}", length=1)
    for gone in ("r0", "r1"):
        with pytest.raises(NotFoundError):
            tracker.adopt(gone, Tag("c"))
    assert tracker.adopt("r2", Tag("c")).number == 1


def test_untagged_requests_expire_by_their_tokens(
    tracker: ConversationTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_UNTAGGED_TOKENS", 25)
    for rid in ("first", "second", "third"):
        serve(tracker, rid, length=10)
    with pytest.raises(NotFoundError):
        tracker.adopt("first", Tag("c"))
    assert [tracker.adopt(rid, Tag("c")).number for rid in ("second", "third")] == [1, 2]


def test_a_rid_used_again_neither_expires_early_nor_keeps_others_alive(
    tracker: ConversationTracker, clock: Clock
) -> None:
    serve(tracker, "twice", length=3)
    serve(tracker, "once")
    clock.now += UNTAGGED_SECONDS - 1
    serve(tracker, "twice", length=9)
    clock.now += 2
    with pytest.raises(NotFoundError):
        tracker.adopt("once", Tag("c"))
    assert len(tracker.adopt("twice", Tag("c")).request.tokens) == 11


# ---- forgetting ----


def test_turns_are_bounded_by_their_tokens(
    tracker: ConversationTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_TURN_TOKENS", 25)
    tag, other = Tag("c"), Tag("d")
    for number in range(3):
        serve(tracker, f"r{number}", tag if number else other, length=8)
    assert tracker.find(other) is None
    assert tracker.turn_of("r0") is None
    assert tracker.find(tag, 1) is not None
    assert tracker.newest(other) == 1, "what is forgotten is still counted"
    serve(tracker, "large", tag, length=100)
    newest = tracker.find(tag)
    assert newest is not None
    assert newest.request.rid == "large", "the newest always stays"
    assert tracker.find(tag, 2) is None


def test_saved_turns_are_forgotten_but_for_the_newest(tracker: ConversationTracker) -> None:
    tag = Tag("c")
    turns = [serve(tracker, f"r{n}", tag) for n in range(3)]
    assert turns[0] is not None
    assert turns[1] is not None
    assert turns[2] is not None
    tracker.saved(turns[0], "s1")
    assert tracker.find(tag, 1) is turns[0]
    tracker.saved(turns[2], "s3")
    assert tracker.find(tag, 1) is None
    assert tracker.find(tag, 2) is turns[1], "not saved yet, so it stays"
    assert tracker.find(tag, 3) is turns[2]
    tracker.saved(turns[1], "s2")
    assert tracker.find(tag) is turns[2]


def test_a_rid_used_in_two_turns_names_the_newer_one(
    tracker: ConversationTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = serve(tracker, "same", Tag("c"), length=8)
    second = serve(tracker, "same", Tag("d"), length=8)
    assert first is not None
    assert tracker.turn_of("same") is second
    monkeypatch.setattr(tracker_module, "MAX_TURN_TOKENS", 15)
    serve(tracker, "small", Tag("d"), length=1)
    assert tracker.find(Tag("c"), 1) is None
    assert tracker.turn_of("same") is second, "forgetting the older one leaves the newer one"


def test_a_deleted_conversation_is_forgotten_for_its_tenant_alone(
    tracker: ConversationTracker, saved: Counter[tuple[str, str, str]]
) -> None:
    for number, tag in enumerate((Tag("c"), Tag("c", "b"), Tag("c", tenant="t"), Tag("cc"))):
        serve(tracker, f"r{number}", tag)
    tracker.forget_conversation("", "c")
    known = [tracker.turn_of(f"r{number}") is not None for number in range(4)]
    assert known == [False, False, True, True]
    assert tracker.newest(Tag("c")) == 0
    assert tracker.newest(Tag("c", tenant="t")) == 1


def test_a_branch_is_forgotten_alone(tracker: ConversationTracker) -> None:
    for number, tag in enumerate((Tag("c"), Tag("c", "b"), Tag("c", "b", "t"))):
        serve(tracker, f"r{number}", tag)
    tracker.forget_branch(Tag("c", "b"))
    tracker.forget_branch(Tag("c", "unknown"))
    known = [tracker.turn_of(f"r{number}") is not None for number in range(3)]
    assert known == [True, False, True]
    assert tracker.newest(Tag("c", "b")) == 0


def test_turns_of_a_branch_that_is_not_known_wait_for_their_numbers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = ConversationTracker(clock=clock)
    for rid, tag in (("a", Tag("c")), ("b", Tag("c")), ("other", Tag("d"))):
        assert serve(tracker, rid, tag) is None
    assert tracker.unnumbered("a") == Tag("c")
    assert tracker.unnumbered("nobody") is None
    assert tracker.turn_of("a") is None
    assert tracker.find(Tag("c")) is None
    tracker.reached(Tag("c"), 9)  # the catalog has it, and will tell
    turns = tracker.learn(Tag("c"), 4)
    assert [(turn.request.rid, turn.number) for turn in turns] == [("a", 5), ("b", 6)]
    assert tracker.find(Tag("c")) is turns[1]
    assert tracker.unnumbered("a") is None
    assert tracker.learn(Tag("c"), 4) == []
    assert tracker.newest(Tag("c")) == 6, "it was learnt before"
    later = serve(tracker, "c", Tag("c"))
    assert later is not None
    assert later.number == 7
    monkeypatch.setattr(tracker_module, "MAX_UNNUMBERED", 1)
    with pytest.raises(InternalError, match="wait for their numbers"):
        serve(tracker, "one too many", Tag("d"))
    assert [turn.number for turn in tracker.learn(Tag("d"), 0)] == [1]


def test_a_conversation_is_known_by_its_turns_and_not_by_questions() -> None:
    tracker = ConversationTracker()
    tag = Tag("a")
    tracker.learn(tag, 0)  # somebody asked for it
    assert not tracker.knows_conversation("", "a")
    tracker.begin(RunningRequest("r", to_tokens([1, 2]), tag))
    assert tracker.knows_conversation("", "a")
    assert not tracker.knows_conversation("other", "a")
    assert tracker.finish("r", [3]) is not None
    assert tracker.knows_conversation("", "a")
    assert not tracker.knows_conversation("", "b")


def test_branches_are_bounded_and_counted_on_from_the_catalog(
    tracker: ConversationTracker,
    saved: Counter[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_BRANCHES", 2)
    serve(tracker, "a", Tag("a"))
    serve(tracker, "b", Tag("b"))
    serve(tracker, "a2", Tag("a"))  # used again: now "b" is the older one
    serve(tracker, "c", Tag("c"))
    assert tracker.turn_of("b") is None
    assert not tracker.knows(Tag("b"))
    assert tracker.knows(Tag("a"))
    saved["", "b", "main"] = 1
    turn = serve(tracker, "b2", Tag("b"))
    assert turn is not None
    assert turn.number == 2


def test_any_sequence_of_uses_keeps_the_books(
    tracker: ConversationTracker, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers never repeat on a branch, and what is remembered stays within its bound."""
    monkeypatch.setattr(tracker_module, "MAX_TURN_TOKENS", 60)
    monkeypatch.setattr(tracker_module, "MAX_BRANCHES", 4)
    newest: Counter[tuple[str, str, str]] = Counter()
    tracker = Told(newest)
    for step in range(400):
        tag = Tag(rng.choice("abcd"), rng.choice(["main", "b"]))
        action = rng.randrange(4)
        if action == 0:
            known = tracker.find(tag)
            if known is not None:
                tracker.saved(known, f"s{step}")
            continue
        turn = serve(tracker, f"r{rng.randrange(50)}", tag, length=rng.randrange(1, 10))
        assert turn is not None
        newest[tag.branch] += 1
        assert turn.number == newest[tag.branch]
        remembered = [
            found
            for name in "abcd"
            for branch in ("main", "b")
            for number in range(1, newest["", name, branch] + 1)
            if (found := tracker.find(Tag(name, branch), number)) is not None
        ]
        assert turn in remembered
        assert sum(len(t.request.tokens) for t in remembered) <= 60
        assert len({t.tag.branch for t in remembered}) <= 4
