"""Who hears of what: events of one owner go to the subscribers of that owner, and no others.

A subscriber that reads slowly costs bounded memory: what does not fit is left out, counted, and
told as soon as there is room.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

MAX_QUEUED: Final = 256
"""Events that wait for one subscriber."""
MAX_QUEUED_BYTES: Final = 16 << 20
"""The same, written as JSON: an event may hold all of a tool's arguments, or its result."""
MAX_JOINED: Final = 64 << 10
"""Characters of a reply that wait as one event."""

TOPICS: Final = frozenset(
    {
        *("tool_start", "tool_progress", "tool_result", "tool_error"),
        *("tier_transition", "memory_update", "run_event", "run_tokens"),
    }
)
"""What can be subscribed to."""


@dataclass(frozen=True)
class Event:
    """Something that happened.  `owner` is None for what belongs to the server as a whole."""

    type: str
    owner: str | None
    conversation_id: str | None = None
    run_id: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """About how many bytes it is sent as."""
        return len(json.dumps(self.data))

    def message(self) -> dict[str, Any]:
        """The event as it is sent."""
        where = {"conversation_id": self.conversation_id, "run_id": self.run_id}
        told = {name: value for name, value in where.items() if value is not None}
        return {"type": self.type, "timestamp": time.time(), **told, **self.data}


@dataclass(frozen=True)
class Interest:
    """Which events a subscriber wants: of these topics, in one of these conversations or runs.

    None for the conversations and the runs stands for all of the owner's.
    """

    topics: Collection[str] = frozenset()
    conversation_ids: Collection[str] | None = None
    run_ids: Collection[str] | None = None

    def wants(self, event: Event) -> bool:
        """Whether an event is among them."""
        if event.type not in self.topics:
            return False
        if self.conversation_ids is None and self.run_ids is None:
            return True
        return (
            event.conversation_id is not None
            and event.conversation_id in (self.conversation_ids or ())
        ) or (event.run_id is not None and event.run_id in (self.run_ids or ()))


class Subscriber:
    """One reader of events."""

    def __init__(self, owner: str, limit: int) -> None:
        self.owner = owner
        self.interest = Interest()
        self._limit = limit
        self._queue: deque[dict[str, Any]] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._lost = 0
        self._there = asyncio.Event()

    def offer(self, event: Event) -> None:
        """Take an event if it is wanted and allowed."""
        if event.owner not in (None, self.owner) or not self.interest.wants(event):
            return
        if event.type == "run_tokens" and self._queue and _joined(self._queue[-1], event):
            self._sizes[-1] += event.size
            self._bytes += event.size
            return
        # One alone always finds room, or it could never be told of.
        if len(self._queue) >= self._limit or (
            self._queue and self._bytes + event.size > MAX_QUEUED_BYTES
        ):
            self._lost += 1
        else:
            self._queue.append(event.message())
            self._sizes.append(event.size)
            self._bytes += event.size
        self._there.set()

    async def next(self) -> dict[str, Any]:
        """The next event; one of type ``error`` where some were left out."""
        while not self._queue and not self._lost:
            self._there.clear()
            await self._there.wait()
        if self._queue:
            self._bytes -= self._sizes.popleft()
            return self._queue.popleft()
        lost, self._lost = self._lost, 0
        return {
            "type": "error",
            "timestamp": time.time(),
            "error": "events_lost",
            "message": f"{lost} events were left out: they were not read in time",
            "hint": "read faster, or subscribe to less",
            "details": {"lost": lost},
        }


def _joined(last: dict[str, Any], event: Event) -> bool:
    """Whether the event that waits last took in another part of the same reply."""
    if last["type"] != "run_tokens" or last["run_id"] != event.run_id:
        return False
    follows = last["step"], last["offset"] + len(last["text"])
    if follows != (event.data["step"], event.data["offset"]) or len(last["text"]) >= MAX_JOINED:
        return False
    last["text"] += event.data["text"]
    return True


class EventBus:
    """Hands events to subscribers.  Used on one event loop; nothing here waits."""

    def __init__(self) -> None:
        self._subscribers: set[Subscriber] = set()

    def __len__(self) -> int:
        return len(self._subscribers)

    def subscribe(self, owner: str, *, limit: int = MAX_QUEUED) -> Subscriber:
        """A new subscriber, which wants nothing yet."""
        made = Subscriber(owner, limit)
        self._subscribers.add(made)
        return made

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """It hears nothing any more."""
        self._subscribers.discard(subscriber)

    def publish(self, event: Event, but: Subscriber | None = None) -> None:
        """Tell everybody who wants and may hear it, but one who knows."""
        for subscriber in self._subscribers:
            if subscriber is not but:
                subscriber.offer(event)
