"""Clients that talk, save, branch, restore and delete at random, and write down what they hear."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from engram.conversation.turns import Tag
from engram.errors import CaptureLostError, NotFoundError
from faults.engine import Keeper
from faults.ledger import Ledger

LONGEST = 60
"""Tokens of a conversation: an event with all of them is one atomic write to a pipe."""
CONVERSATIONS = 6


@dataclass(eq=False)
class _Turn:
    """A reply that somebody may save; `busy` while somebody does something to it."""

    rid: str
    tokens: list[int]
    busy: bool = False


@dataclass(eq=False)
class _Saved:
    snapshot_id: str
    tokens: list[int]
    busy: bool = False


class Crowd:
    """Acts on one keeper. `tell` is given each event of the ledger, before and after the act.

    Names are unique under different values of `name`, so that one store can see many crowds.
    """

    def __init__(
        self,
        keeper: Keeper,
        rng: Random,
        tell: Callable[[Mapping[str, Any]], None],
        *,
        name: str = "",
        known: Ledger | None = None,
        most: int = 40,
    ) -> None:
        self.keeper = keeper
        self.rng = rng
        self.tell = tell
        self.counts: Counter[str] = Counter()
        self._name = name
        self._most = most
        self._made = 0
        self._turns: list[_Turn] = []
        self._saved = [
            _Saved(snapshot_id, list(promise.tokens))
            for snapshot_id, promise in (known or Ledger()).promises.items()
        ]
        self.acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self.talk),
            (30, self.save),
            (10, self.branch),
            (12, self.restore),
            (10, self.delete),
            (4, self.forget),
            (3, self.collect),
        ]

    async def act(self) -> None:
        """One act, drawn at random. Deletions keep the number of snapshots bounded."""
        if len(self._saved) > self._most:
            await self.delete()
            return
        weights, acts = zip(*self.acts, strict=True)
        await self.rng.choices(acts, weights)[0]()

    async def talk(self) -> None:
        """A turn on top of a turn or a snapshot, or the first of a new conversation."""
        known = [t.tokens for t in (*self._turns, *self._saved) if len(t.tokens) < LONGEST]
        before = self.rng.choice(known) if known and self.rng.random() < 0.8 else []
        message = [self.rng.randrange(2**32) for _ in range(self.rng.randrange(1, 8))]
        rid = self._new("rid")
        tag = Tag(f"conversation-{self.rng.randrange(CONVERSATIONS)}")
        await self.keeper.talk(before, message, tag, rid)
        self._turns.append(_Turn(rid, self.keeper.tokens.pop(rid)))
        del self._turns[:-20]
        self.counts["turns"] += 1

    async def save(self) -> None:
        turn = self._free(self._turns)
        if turn is None:
            return
        snapshot_id = self._new("snap")
        self.tell({"event": "saving", "id": snapshot_id, "tokens": turn.tokens})
        self._turns.remove(turn)
        try:
            result = await self.keeper.service.save(
                tenant="", rid=turn.rid, snapshot_id=snapshot_id
            )
        except CaptureLostError:
            # Others have filled RAM, or emptied it, twice in a row: nothing was saved.
            self._refused(snapshot_id)
            return
        assert (result.snapshot_id, result.durability) == (snapshot_id, "sync")
        self._acknowledged(snapshot_id, turn.tokens)
        self.counts["saves"] += 1

    async def branch(self) -> None:
        """A branch from a snapshot: another manifest over the same segments."""
        origin = self._free(self._saved)
        if origin is None:
            return
        origin.busy = True
        try:
            row = self.keeper.catalog.get(origin.snapshot_id)
            snapshot_id = self._new("snap")
            self.tell({"event": "saving", "id": snapshot_id, "tokens": origin.tokens})
            try:
                result = await self.keeper.service.save(
                    tenant="",
                    rid=row.rid,
                    conversation_id=row.conversation_id,
                    branch_name=self._new("branch"),
                    snapshot_id=snapshot_id,
                )
            except NotFoundError:
                # Another snapshot of the same turn was to be its start, and was deleted meanwhile.
                self._refused(snapshot_id)
                return
            assert result.snapshot_id == snapshot_id
            self._acknowledged(snapshot_id, origin.tokens)
            self.counts["branches"] += 1
        finally:
            origin.busy = False

    async def restore(self) -> None:
        saved = self._free(self._saved)
        if saved is None:
            return
        saved.busy = True
        try:
            await self.keeper.restore(self.keeper.catalog.get(saved.snapshot_id), saved.tokens)
            self.counts["restores"] += 1
        finally:
            saved.busy = False

    async def delete(self) -> None:
        saved = self._free(self._saved)
        if saved is None:
            return
        self._saved.remove(saved)
        self.tell({"event": "deleting", "id": saved.snapshot_id})
        await self.keeper.gone(saved.snapshot_id)
        self.tell({"event": "deleted", "id": saved.snapshot_id})
        self.counts["deletions"] += 1

    async def collect(self) -> None:
        """Remove what no snapshot names, however young: saves that are under way need theirs."""
        await self.keeper.collect()
        self.counts["collections"] += 1

    async def forget(self) -> None:
        """All that is in RAM and not held goes, as under pressure."""
        self.keeper.engine.manager.forget()
        self.counts["demotions"] += 1
        await asyncio.sleep(0)

    def _refused(self, snapshot_id: str) -> None:
        self.tell({"event": "refused", "id": snapshot_id})
        self.counts["refusals"] += 1

    def _acknowledged(self, snapshot_id: str, tokens: list[int]) -> None:
        self.tell({"event": "saved", "id": snapshot_id})
        self._saved.append(_Saved(snapshot_id, tokens))

    def _free(self, things: list[Any]) -> Any:
        free = [thing for thing in things if not thing.busy]
        return self.rng.choice(free) if free else None

    def _new(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._name}-{self._made}"


async def run_crowd(crowd: Crowd, clients: int, stop: Callable[[], bool]) -> None:
    """Let many clients act at once until `stop` says so."""

    async def client() -> None:
        while not stop():
            await crowd.act()

    await asyncio.gather(*(client() for _ in range(clients)))
