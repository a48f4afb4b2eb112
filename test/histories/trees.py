"""Random conversations that branch, some of their requests at the same time.

Branches share tokens that were once prefilled and once decoded, and requests that run together
share matrix products: last bits differ with or without a restart. So this is for float32, where
the tokens are equal and log probabilities within `TOLERANCE`; and two restores of one snapshot have
equal bits.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from e2e.helpers import Client, Reply, assert_close, random_ids

LONGEST_MESSAGE = 60
LONGEST_REPLY = 10
REQUESTS = (3, 6)
NEWEST, AGAIN, TOGETHER = 0.5, 0.2, 0.2
MOST_TOGETHER = 3
TOLERANCE = 1e-3
LOOKED_AT = 3
"""Snapshots restored twice after each restart."""


@dataclass(frozen=True)
class Request:
    """A request of a tree: a message after the turn `after` (None: the first), or with `again` that
    turn's own prompt once more. `number` counts the requests of a tree."""

    tree: int
    number: int
    after: int | None
    message: tuple[int, ...]
    new_tokens: int
    again: bool = False


@dataclass(frozen=True)
class Forest:
    """Trees interleaved: groups of requests that are sent together, before and after the
    restart."""

    name: str
    trees: int
    steps: tuple[tuple[tuple[Request, ...], ...], tuple[tuple[Request, ...], ...]]
    killed: bool


def draw_forest(numbers: random.Random, number: int, count: int) -> Forest:
    """So many trees, the requests of each before and after the restart at random."""
    sizes = {tree: numbers.randint(*REQUESTS) for tree in range(count)}
    waiting = [tree for tree, size in sizes.items() for _ in range(size)]
    numbers.shuffle(waiting)
    sent: Counter[int] = Counter()
    parts: tuple[list[tuple[Request, ...]], ...] = ([], [])
    for part, trees in zip(parts, _halves(waiting), strict=True):
        while trees:
            group: list[Request] = []
            size = numbers.randint(2, MOST_TOGETHER) if numbers.random() < TOGETHER else 1
            before = dict(sent)
            for tree in trees[:size]:
                # What is sent together is asked of what was there before.
                group.append(_request(numbers, tree, sent[tree], before.get(tree, 0)))
                sent[tree] += 1
            del trees[:size]
            part.append(tuple(group))
    steps = (tuple(parts[0]), tuple(parts[1]))
    return Forest(f"forest-{number}", count, steps, numbers.random() < 0.7)


def _halves(waiting: Sequence[int]) -> tuple[list[int], list[int]]:
    middle = len(waiting) // 2
    return list(waiting[:middle]), list(waiting[middle:])


def _request(numbers: random.Random, tree: int, number: int, there: int) -> Request:
    message = tuple(random_ids(numbers, numbers.randint(1, LONGEST_MESSAGE)))
    new_tokens = numbers.randint(1, LONGEST_REPLY)
    if not there:
        return Request(tree, number, None, message, new_tokens)
    after = there - 1 if numbers.random() < NEWEST else numbers.randrange(there)
    return Request(tree, number, after, message, new_tokens, numbers.random() < AGAIN)


@dataclass(frozen=True)
class Node:
    """A turn taken: its prompt, where the turn before it ends in that, and the reply."""

    key: str
    prompt: tuple[int, ...]
    before: int
    reply: Reply

    @property
    def told(self) -> tuple[int, ...]:
        return (*self.prompt, *self.reply.tokens)


@dataclass
class Side:
    """What one of the two sides was answered, by tree, in the order of requests."""

    name: str
    nodes: dict[int, list[Node]] = field(default_factory=dict)


class Play:
    """A forest on its way, as `linear.Play` is a block's."""

    def __init__(
        self,
        forest: Forest,
        boundary: Callable[[int, int], int],
        counts: Counter[str],
        numbers: random.Random,
    ) -> None:
        self.forest = forest
        self.counts = counts
        self.reference = Side(f"reference-{forest.name}")
        self.restarted = Side(forest.name)
        self._boundary = boundary
        self._numbers = numbers

    def start(self, client: Client) -> None:
        """Everything until the server ends: all turns of the side that goes on are saved."""
        before, after = self.forest.steps
        for group in (*before, *after):
            self._together(client, self.reference, group)
        for group in before:
            for node in self._together(client, self.restarted, group):
                client.save(rid=node.reply.rid)
                self.counts["saves"] += 1

    def finish(self, client: Client) -> None:
        """Everything after the server has been started again."""
        self.counts["killed" if self.forest.killed else "stopped"] += 1
        self._restore_twice(client)
        for group in self.forest.steps[1]:
            self._together(client, self.restarted, group)

    def check(self) -> None:
        """Every reply is that of the reference."""
        for tree, nodes in self.reference.nodes.items():
            for wanted, found in zip(nodes, self.restarted.nodes[tree], strict=True):
                assert found.prompt == wanted.prompt
                assert_close(found.reply, wanted.reply, TOLERANCE)
                for node in (wanted, found):
                    least = self._boundary(node.before - 1, 0) if node.before else 0
                    assert node.reply.cached >= least, (node, least)
                self.counts["turns"] += 1
                self.counts["equal bits"] += found.reply.output == wanted.reply.output
            self.counts["histories"] += 1

    def _restore_twice(self, client: Client) -> None:
        """Of some snapshots: the same next turn twice, with nothing else in VRAM, bit for bit."""
        nodes = [node for nodes in self.restarted.nodes.values() for node in nodes]
        for node in self._numbers.sample(nodes, min(LOOKED_AT, len(nodes))):
            prompt = [*node.told, *random_ids(self._numbers, 20)]
            replies = []
            for _ in range(2):
                client.flush()
                client.restore(rid=node.reply.rid)
                replies.append(client.generate(prompt, LONGEST_REPLY, cache_salt=node.key))
            first, second = replies
            assert first.cached == second.cached == self._nearest(node, prompt)
            assert first.output == second.output
            self.counts["restored twice"] += 1

    def _nearest(self, node: Node, prompt: list[int]) -> int:
        """Where the nearest of the kept turns of its tree ends that the prompt goes on from.

        Mostly the node itself; where its prompt was asked for again, a reply of one token more may
        begin with all of the node's.
        """
        (nodes,) = (nodes for nodes in self.restarted.nodes.values() if node in nodes)
        ends = [(self._boundary(len(one.told) - 1, len(one.prompt)), one) for one in nodes]
        return max(end for end, one in ends if one.told[:end] == tuple(prompt[:end]))

    def _together(self, client: Client, side: Side, group: Sequence[Request]) -> list[Node]:
        """The turns of a group, asked for at the same time."""
        prompts = [self._prompt(side, request) for request in group]

        def ask(one: tuple[Request, tuple[tuple[int, ...], int]]) -> Node:
            request, (prompt, before) = one
            name = f"{side.name}-{request.tree}"
            reply = client.generate(prompt, request.new_tokens, name, cache_salt=name)
            return Node(name, prompt, before, reply)

        if len(group) > 1:
            self.counts["together"] += len(group)
        with ThreadPoolExecutor(len(group)) as clients:
            nodes = list(clients.map(ask, zip(group, prompts, strict=True)))
        for request, node in zip(group, nodes, strict=True):
            assert len(side.nodes.setdefault(request.tree, [])) == request.number
            side.nodes[request.tree].append(node)
            self.counts["again" if request.again else "asked"] += 1
        return nodes

    def _prompt(self, side: Side, request: Request) -> tuple[tuple[int, ...], int]:
        """The prompt of a request, and how much of it the turn before has told."""
        if request.after is None:
            return request.message, 0
        node = side.nodes[request.tree][request.after]
        if request.again:
            return node.prompt, node.before
        return (*node.told, *request.message), len(node.told)
