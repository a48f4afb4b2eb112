"""Which data-parallel replica a request goes to, and which one has its state.

Replicas share the store and nothing else: each has a tree and a RAM tier of its own.  So a
conversation stays with the replica that served it last; another one, where a client asks for it,
has what is on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST_REQUESTS: Final = 50_000
"""More than are running or saveable; beyond them the oldest are forgotten."""
MOST_CONVERSATIONS: Final = 200_000

Conversation = tuple[str, str]
"""Tenant and conversation."""


@dataclass
class _Request:
    conversation: Conversation | None
    replica: int | None


class Replicas:
    """What the HTTP process knows of `count` replicas; one event loop uses it.

    A replica is chosen when it matters: for a conversation that has one, and for a request whose
    prefix is brought from disk.  All other requests are left to SGLang's load balancing, and where
    they went is learned from their replies.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._conversations: OrderedDict[Conversation, int] = OrderedDict()
        self._next = 0

    def admit(self, rid: str, conversation: Conversation | None, given: int | None) -> None:
        """A request is on its way; `given` is the replica that its client asks for."""
        replica = given
        if replica is None and conversation is not None:
            replica = self._conversations.get(conversation)
        self._remember(rid, _Request(conversation, replica))

    def fetch_to(self, rid: str) -> int:
        """The replica that a request's prefix is brought to, which it must go to from now on."""
        request = self._requests.get(rid)
        if request is not None and request.replica is not None:
            return request.replica
        replica, self._next = self._next, (self._next + 1) % self.count
        self._remember(rid, _Request(request.conversation if request else None, replica))
        return replica

    def route(self, rid: str) -> int | None:
        """Where a request has to go; None if that is up to SGLang."""
        request = self._requests.get(rid)
        return None if request is None else request.replica

    def served(self, rid: str, replica: int) -> None:
        """A replica has completed a request: what the request left is there."""
        request = self._requests.get(rid)
        conversation = request.conversation if request else None
        self._remember(rid, _Request(conversation, replica))
        if conversation is not None:
            _put(self._conversations, conversation, replica, MOST_CONVERSATIONS)

    def holder(self, rid: str) -> int:
        """The replica that has what a request left; the first where nobody remembers."""
        return self.route(rid) or 0

    def _remember(self, rid: str, request: _Request) -> None:
        _put(self._requests, rid, request, MOST_REQUESTS)


def _put(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > most:
        table.popitem(last=False)
