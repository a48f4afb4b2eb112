"""Random conversations in which no two share a token, each turn of which has one right reply.

A block of histories is played twice on the same server, in the same order of requests, one at a
time: once from beginning to end as the reference, and once in two parts with the end of the server
between them. Both have the same tokens under different keys, so that neither finds what the other
left, and every reply of the second has the bits of the first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from e2e.helpers import Client, Reply, random_ids
from engram.testing.tiny_tokenizer import BYTES, CHARACTERS, SPECIALS

LONGEST_MESSAGE = 60
LONGEST_REPLY = 10
BROKEN_OFF_REPLY = 40
"""New tokens of a turn that is broken off and asked for again: many, to be in time for it."""
TURNS = (2, 4)
BROKEN_OFF = 0.1
SAVED = 0.15
UNTIL_AGAIN = 3
"""Requests of others between a reply that is broken off and the same request again, at most."""

OPENINGS = range(len(SPECIALS) + len(CHARACTERS), len(SPECIALS) + len(CHARACTERS) + len(BYTES))
"""First tokens of histories without a key: no other conversation of the tests begins with one."""
PLAIN = len(OPENINGS) // 2
"""How many of those a block has: those of two blocks are on a server at a time."""


@dataclass(frozen=True)
class Turn:
    """One turn: `broken_off` once in the middle of its reply, and then asked for again; `save` is
    the durability of a save after it, if one is asked for."""

    message: tuple[int, ...]
    new_tokens: int
    broken_off: bool
    save: str | None


@dataclass(frozen=True)
class History:
    """A conversation. `key` is the field of a request that keeps it apart, None for none; `tag`
    whether its requests name it; `restored` whether it is restored by request after the restart;
    `before` of its turns come before that."""

    name: str
    key: str | None
    tag: bool
    restored: bool
    turns: tuple[Turn, ...]
    before: int


@dataclass(frozen=True)
class Step:
    """A request: the turn of a history, to be broken off or to its end."""

    history: int
    turn: int
    broken_off: bool = False


@dataclass(frozen=True)
class Block:
    """Histories interleaved, the `steps` before and after the restart. `killed` is how the server
    ends, `caught` the history of which a reply is under way then, if any."""

    histories: tuple[History, ...]
    steps: tuple[tuple[Step, ...], tuple[Step, ...]]
    killed: bool
    caught: int | None


def draw_block(numbers: random.Random, number: int, count: int) -> Block:
    """So many histories; those of blocks `number` and `number + 1` have different first tokens."""
    half = list(OPENINGS)[number % 2 * PLAIN :][:PLAIN]
    openings = numbers.sample(half, len(half))
    histories = []
    for index in range(count):
        key = numbers.choice([None, "cache_salt", "extra_key"]) if openings else "cache_salt"
        opening = [openings.pop()] if key is None else []
        histories.append(_history(numbers, f"history-{number}-{index}", key, opening))
    parts = tuple(_interleave(numbers, histories, after) for after in (False, True))
    going_on = [index for index, step in enumerate(histories) if step.before < len(step.turns)]
    killed = numbers.random() < 0.7
    caught = numbers.choice(going_on) if killed and going_on else None
    return Block(tuple(histories), (parts[0], parts[1]), killed, caught)


def _history(numbers: random.Random, name: str, key: str | None, opening: Sequence[int]) -> History:
    turns = []
    for place in range(numbers.randint(*TURNS)):
        message = random_ids(numbers, numbers.randint(1, LONGEST_MESSAGE))
        broken_off = numbers.random() < BROKEN_OFF
        turns.append(
            Turn(
                tuple([*opening, *message] if place == 0 else message),
                BROKEN_OFF_REPLY if broken_off else numbers.randint(1, LONGEST_REPLY),
                broken_off,
                numbers.choice(["sync", "async"]) if numbers.random() < SAVED else None,
            )
        )
    tag, restored = numbers.random() < 0.7, numbers.random() < 0.5
    return History(name, key, tag, restored, tuple(turns), numbers.randint(1, len(turns)))


def _interleave(
    numbers: random.Random, histories: Sequence[History], after: bool
) -> tuple[Step, ...]:
    """The turns of one side of the restart, those of each history in their order."""
    waiting = {
        index: list(range(h.before, len(h.turns)) if after else range(h.before))
        for index, h in enumerate(histories)
    }
    steps: list[Step] = []
    # What was broken off, to be asked for again while VRAM still has where it starts from.
    again: Step | None = None
    others = 0
    while again or any(waiting.values()):
        held = None if again is None else again.history
        free = [index for index, turns in waiting.items() if turns and index != held]
        index = numbers.choice(free) if free else -1
        turns = histories[index].turns
        if again and (others == 0 or not free or turns[waiting[index][0]].broken_off):
            steps.append(again)
            again = None
            continue
        step = Step(index, waiting[index].pop(0))
        others -= 1
        if turns[step.turn].broken_off:
            steps.append(replace(step, broken_off=True))
            again, others = step, numbers.randint(0, UNTIL_AGAIN)
        else:
            steps.append(step)
    return tuple(steps)


@dataclass
class Side:
    """What one of the two sides has said and was answered, by history."""

    told: dict[int, list[int]] = field(default_factory=dict)
    replies: dict[tuple[int, int], Reply] = field(default_factory=dict)


class Play:
    """A block on its way: `start`, the end of the server, `finish`, `check`.

    `boundary(tokens)` is where a server has the state of a turn that computed so many.
    """

    def __init__(self, block: Block, boundary: Callable[[int], int], counts: Counter[str]) -> None:
        self.block = block
        self.counts = counts
        self.reference, self.restarted = Side(), Side()
        self._boundary = boundary
        self._open = ExitStack()

    def start(self, client: Client) -> None:
        """Everything until the server ends; the reply that is caught is under way at return."""
        before, after = self.block.steps
        for step in (*before, *after):
            self._request(client, self.reference, step)
        for step in before:
            self._request(client, self.restarted, step)
        for index, history in enumerate(self.block.histories):
            if history.tag and history.before < len(history.turns) and self._stands(index):
                client.save(conversation_id=history.name)
                self.counts["saves"] += 1
        if self.block.caught is not None:
            self._begin(client, self.block.caught)
            self.counts["caught"] += 1

    def finish(self, client: Client) -> None:
        """Everything after the server has been started again."""
        self._open.close()
        self.counts["killed" if self.block.killed else "stopped"] += 1
        met: set[int] = set()
        for step in self.block.steps[1]:
            history = self.block.histories[step.history]
            if step.history not in met:
                met.add(step.history)
                self.counts["taken up"] += 1
                if history.restored and self._stands(step.history):
                    restored = client.restore(conversation_id=history.name)
                    told = len(self.restarted.told[step.history])
                    assert restored["token_count"] == self._boundary(told - 1)
                    self.counts["restored"] += 1
            self._request(client, self.restarted, step)

    def check(self) -> None:
        """Every reply has the bits of the reference, and both computed what is new and no more."""
        for index, history in enumerate(self.block.histories):
            told = 0
            for turn, what in enumerate(history.turns):
                wanted, found = (
                    side.replies[index, turn] for side in (self.reference, self.restarted)
                )
                where = (history, turn, wanted, found)
                assert found.output == wanted.output, where
                assert found.prompt_tokens == wanted.prompt_tokens == told + len(what.message)
                assert found.cached == wanted.cached == self._cached(told, what), where
                told = found.prompt_tokens + len(found.tokens)
                self.counts["turns"] += 1
                self.counts["tokens"] += len(found.tokens)
            assert self.reference.told[index] == self.restarted.told[index]
            self.counts["histories"] += 1

    def _cached(self, told: int, turn: Turn) -> int:
        """What a turn must not compute that has been told so many tokens before."""
        if turn.broken_off:
            return self._boundary(told + len(turn.message) - 1)
        return self._boundary(told - 1) if told else 0

    def _request(self, client: Client, side: Side, step: Step) -> None:
        history = self.block.histories[step.history]
        turn = history.turns[step.turn]
        prompt = [*side.told.get(step.history, []), *turn.message]
        fields = self._fields(side, history)
        if step.broken_off:
            ended = break_off(client, prompt, turn.new_tokens, fields)
            self.counts["broken off" if ended == "abort" else "too late to break off"] += 1
            return
        reply = client.generate(prompt, turn.new_tokens, **fields)
        side.replies[step.history, step.turn] = reply
        side.told[step.history] = [*prompt, *reply.tokens]
        if side is self.restarted and self._stands(step.history):
            self._save(client, history, step.turn, reply.rid)

    def _stands(self, index: int) -> bool:
        """Whether there is a state of a history yet: with large pages it may fill none."""
        stands = self._boundary(len(self.restarted.told[index]) - 1) > 0
        self.counts["too short to save"] += not stands
        return stands

    def _fields(self, side: Side, history: History) -> dict[str, Any]:
        if side is self.reference:
            # Never without a key: the other side has the same tokens.
            name = f"reference-{history.name}"
            return {"conversation": name, history.key or "cache_salt": name}
        key = {} if history.key is None else {history.key: history.name}
        return {**key, "conversation": history.name if history.tag else None}

    def _save(self, client: Client, history: History, turn: int, rid: str) -> None:
        adopted = not history.tag and turn == history.before - 1
        durability = "sync" if adopted else history.turns[turn].save
        if durability is None:
            return
        adopt = {} if history.tag else {"conversation_id": history.name}
        client.save(rid=rid, durability=durability, **adopt)
        self.counts["saves"] += 1

    def _begin(self, client: Client, index: int) -> None:
        """Have the next turn of a history begin; it is under way until the play goes on."""
        history = self.block.histories[index]
        turn = history.turns[history.before]
        prompt = [*self.restarted.told[index], *turn.message]
        body = _streamed(prompt, 1000, self._fields(self.restarted, history))
        response = self._open.enter_context(client.http.stream("POST", "/generate", json=body))
        assert response.status_code == 200
        next(response.iter_lines())


def break_off(
    client: Client, prompt: Sequence[int], new_tokens: int, fields: dict[str, Any]
) -> str:
    """Ask for a reply and abort it once it has begun; how it ended, which it has at return."""
    rid = f"broken-off-{random.getrandbits(96):024x}"
    body = _streamed(prompt, new_tokens, {**fields, "rid": rid})
    last = ""
    with client.http.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not last and line:
                client.http.post("/abort_request", json={"rid": rid}).raise_for_status()
            last = line if line.startswith("data: {") else last
    return "abort" if '"abort"' in last else "end"


def _streamed(prompt: Sequence[int], new_tokens: int, fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    conversation = fields.pop("conversation")
    tag = {} if conversation is None else {"conversation_id": conversation}
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": params, "stream": True, **tag, **fields}
