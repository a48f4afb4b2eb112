"""Histories are what their tests take them for: everything is asked once, and in its order."""

from __future__ import annotations

from collections import Counter

from engram.testing.samples import seeded_random
from histories import linear, trees

BLOCKS, COUNT = 40, 50


def test_every_turn_is_asked_for_once_and_in_order() -> None:
    numbers = seeded_random()
    for number in range(BLOCKS):
        block = linear.draw_block(numbers, number, COUNT)
        asked = [step for part in block.steps for step in part if not step.broken_off]
        for index, history in enumerate(block.histories):
            mine = [step.turn for step in asked if step.history == index]
            assert mine == list(range(len(history.turns)))
            first = [step for step in block.steps[0] if step.history == index]
            assert {step.turn for step in first} == set(range(history.before))


def test_what_is_broken_off_is_asked_for_again_before_anything_else_is() -> None:
    numbers, seen = seeded_random(), 0
    for number in range(BLOCKS):
        block = linear.draw_block(numbers, number, COUNT)
        for part in block.steps:
            for place, step in enumerate(part):
                if not step.broken_off:
                    continue
                seen += 1
                later = part[place + 1 : place + 2 + linear.UNTIL_AGAIN]
                again = next(n for n, other in enumerate(later) if other.history == step.history)
                assert (later[again].turn, later[again].broken_off) == (step.turn, False)
                assert not any(other.broken_off for other in later[:again])
        turns = [turn for history in block.histories for turn in history.turns]
        broken = sum(step.broken_off for part in block.steps for step in part)
        assert broken == sum(turn.broken_off for turn in turns)
    assert seen > BLOCKS


def test_histories_without_a_key_share_no_first_token_with_those_of_the_block_before() -> None:
    numbers = seeded_random()
    before: set[int] = set()
    for number in range(BLOCKS):
        block = linear.draw_block(numbers, number, COUNT)
        firsts = [h.turns[0].message[0] for h in block.histories if h.key is None]
        assert len(set(firsts)) == len(firsts) > 0
        assert not set(firsts) & before
        before = set(firsts)
        assert {h.key for h in block.histories} == {None, "cache_salt", "extra_key"}


def test_a_reply_is_caught_only_where_a_turn_is_to_come() -> None:
    numbers, caught = seeded_random(), 0
    for number in range(BLOCKS):
        block = linear.draw_block(numbers, number, COUNT)
        if block.caught is not None:
            caught += 1
            assert block.killed
            history = block.histories[block.caught]
            assert history.before < len(history.turns)
    assert 0 < caught < BLOCKS


def test_trees_branch_from_turns_that_were_taken() -> None:
    numbers, branches = seeded_random(), 0
    for number in range(BLOCKS):
        forest = trees.draw_forest(numbers, number, COUNT)
        there: Counter[int] = Counter()
        for group in (*forest.steps[0], *forest.steps[1]):
            for request in group:
                taken = there[request.tree]
                if request.after is None:
                    assert taken == 0
                else:
                    assert 0 <= request.after < taken
                    branches += request.after < taken - 1
            for request in group:
                assert request.number == there[request.tree]
                there[request.tree] += 1
        assert set(there) == set(range(forest.trees))
    assert branches > BLOCKS
