"""Counts turns and remembers finished requests until they are saved, or long enough.

Lives in the HTTP process, where a request's prompt ids and its output ids both pass, and on its
event loop: nothing here locks or waits.  What outlives the process is in the catalog: whoever owns
the tracker asks it for the newest saved turn of a branch that is met for the first time, and tells
(`learn`).  Turns that finish before that wait for their number.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from engram.conversation.turns import FinishedRequest, RunningRequest, Tag, Turn
from engram.core.tokens import to_tokens
from engram.errors import InternalError, NotFoundError

MAX_RUNNING: Final = 65_536
MAX_UNTAGGED: Final = 1_000
UNTAGGED_SECONDS: Final = 300.0
MAX_UNTAGGED_TOKENS: Final = 32 << 20
"""Tokens of remembered untagged requests, four bytes each."""
MAX_TURN_TOKENS: Final = 32 << 20
"""Tokens of remembered turns, four bytes each; past that the oldest turns are forgotten."""
MAX_BRANCHES: Final = 10_000
"""Branches whose count is in memory; the least recently used are forgotten, the catalog is not."""

MAX_UNNUMBERED: Final = 1_000
"""Finished turns of branches not learnt yet."""


class _Branch:
    """Turns of one branch that are remembered, oldest first."""

    def __init__(self, newest: int) -> None:
        self.newest = newest
        self.turns: OrderedDict[int, Turn] = OrderedDict()


class ConversationTracker:
    """Knows every running and recently finished request."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._running: OrderedDict[str, RunningRequest] = OrderedDict()
        self._untagged: OrderedDict[str, FinishedRequest] = OrderedDict()
        self._untagged_tokens = 0
        self._branches: OrderedDict[tuple[str, str, str], _Branch] = OrderedDict()
        self._unnumbered: OrderedDict[str, tuple[Tag, FinishedRequest]] = OrderedDict()
        self._turns: OrderedDict[tuple[tuple[str, str, str], int], Turn] = OrderedDict()
        self._by_rid: dict[str, Turn] = {}
        self._turn_tokens = 0

    def begin(self, request: RunningRequest) -> None:
        """A request goes to the scheduler."""
        self._running[request.rid] = request
        if len(self._running) > MAX_RUNNING:
            self._running.popitem(last=False)

    def abandon(self, rid: str) -> None:
        """The request that runs under `rid` ended without a reply: it is no turn."""
        self._running.pop(rid, None)

    def left(self, request: RunningRequest) -> None:
        """Whoever asked for this request waits no longer.

        By then its rid may be another request's, which goes on.
        """
        if self._running.get(request.rid) is request:
            del self._running[request.rid]

    def finish(self, rid: str, output: Sequence[int]) -> Turn | None:
        """A reply is complete.  The turn it is, if the request was tagged and its branch is known.

        If the branch is not, the turn waits for its number until somebody tells it (`learn`).
        """
        request = self._running.pop(rid, None)
        if request is None:
            return None
        finished = FinishedRequest(
            rid,
            np.concatenate([request.prompt, to_tokens(output)]),
            self._clock(),
            request.extra_key,
            request.cache_salt,
            len(request.prompt),
        )
        # A client may use an id again: from here on it names this request.
        self._forget_untagged(rid)
        if request.tag is None:
            self._by_rid.pop(rid, None)
            self._untagged[rid] = finished
            self._untagged_tokens += len(finished.tokens)
            self._expire()
            return None
        if not self.knows_branch(request.tag):
            if len(self._unnumbered) >= MAX_UNNUMBERED:
                raise InternalError(f"{MAX_UNNUMBERED} turns wait for their numbers already")
            self._unnumbered[rid] = (request.tag, finished)
            return None
        return self._append(request.tag, finished)

    def unnumbered(self, rid: str) -> Tag | None:
        """The tag of a turn that waits for its number."""
        waiting = self._unnumbered.get(rid)
        return None if waiting is None else waiting[0]

    def knows_branch(self, tag: Tag) -> bool:
        """Whether turns of the branch can be counted."""
        return tag.branch in self._branches

    def knows_conversation(self, tenant: str, conversation_id: str) -> bool:
        """Whether the conversation has a turn on any branch, or one is being written."""
        wanted = (tenant, conversation_id)
        turns = (branch.newest for key, branch in self._branches.items() if key[:2] == wanted)
        running = (request.tag for request in self._running.values() if request.tag is not None)
        return any(turns) or any(tag.branch[:2] == wanted for tag in running)

    def branches_of(self, tenant: str, conversation_id: str) -> list[str]:
        """The branches of a conversation on which a request was met."""
        return [key[2] for key in self._branches if key[:2] == (tenant, conversation_id)]

    def learn(self, tag: Tag, newest_saved: int) -> list[Turn]:
        """How far a branch is saved (0: not at all); the turns that waited for their numbers."""
        if not self.knows_branch(tag):
            self._branches[tag.branch] = _Branch(newest_saved)
            if len(self._branches) > MAX_BRANCHES:
                self._forget_branch(next(iter(self._branches)))
        waiting = [rid for rid, (of, _) in self._unnumbered.items() if of.branch == tag.branch]
        return [self._append(*self._unnumbered.pop(rid)) for rid in waiting]

    def adopt(self, rid: str, tag: Tag) -> Turn:
        """Make a finished untagged request the next turn of a conversation that was learnt."""
        turn = self._by_rid.get(rid)
        if turn is not None and turn.tag.branch == tag.branch:
            return turn
        self._expire()
        finished = self._forget_untagged(rid)
        if finished is None:
            raise NotFoundError(
                f"no finished request {rid!r}",
                hint=f"the newest {MAX_UNTAGGED} untagged requests stay saveable by their rid for "
                f"{UNTAGGED_SECONDS / 60:g} minutes",
                details={"rid": rid},
            )
        return self._append(tag, finished)

    def turn_of(self, rid: str) -> Turn | None:
        """The turn that a finished request was, if it is remembered."""
        return self._by_rid.get(rid)

    def is_untagged(self, rid: str) -> bool:
        """Whether the newest finished request of this id is in no conversation yet."""
        return rid in self._untagged

    def find(self, tag: Tag, number: int | None = None) -> Turn | None:
        """A remembered turn of a branch; the newest without `number`."""
        branch = self._branches.get(tag.branch)
        if branch is None or not branch.turns:
            return None
        if number is None:
            return branch.turns.get(branch.newest)
        return branch.turns.get(number)

    def before(self, tag: Tag, number: int) -> Turn | None:
        """The newest remembered turn of a branch below `number`."""
        branch = self._branches.get(tag.branch)
        numbers = [] if branch is None else [n for n in branch.turns if n < number]
        return branch.turns[max(numbers)] if branch is not None and numbers else None

    def newest_turns(self, tenant: str, limit: int) -> list[Turn]:
        """The newest turns of a tenant's branches, of those used last, as far as remembered."""
        found = []
        for key in reversed(self._branches):
            branch = self._branches[key]
            turn = branch.turns.get(branch.newest)
            if key[0] == tenant and turn is not None:
                found.append(turn)
                if len(found) == limit:
                    break
        return found

    def newest(self, tag: Tag) -> int:
        """The number of a learnt branch's newest turn, saved or not; 0 if it has none."""
        branch = self._branches.get(tag.branch)
        return 0 if branch is None else branch.newest

    def knows(self, tag: Tag) -> bool:
        """Whether any turn of the branch is remembered here."""
        branch = self._branches.get(tag.branch)
        return branch is not None and bool(branch.turns)

    def saved(self, turn: Turn, snapshot_id: str) -> None:
        """A turn is durable: its tokens are with its snapshot now."""
        turn.snapshot_id = snapshot_id
        branch = self._branches.get(turn.tag.branch)
        if branch is not None:
            for older in [t for n, t in branch.turns.items() if n < turn.number]:
                if older.snapshot_id is not None:
                    self._forget(older)

    def reached(self, tag: Tag, number: int) -> None:
        """A branch has a snapshot of turn `number`, be it where it starts: it counts on from it."""
        branch = self._branches.get(tag.branch)
        if branch is not None:
            branch.newest = max(branch.newest, number)

    def forget_conversation(self, tenant: str, conversation_id: str) -> None:
        """Drop what is remembered of a conversation (it was deleted)."""
        for key in [k for k in self._branches if k[:2] == (tenant, conversation_id)]:
            self._forget_branch(key)
        self._forget_unnumbered((tenant, conversation_id))

    def forget_branch(self, tag: Tag) -> None:
        """Drop what is remembered of a branch (it was deleted)."""
        if self.knows_branch(tag):
            self._forget_branch(tag.branch)
        self._forget_unnumbered(tag.branch)

    def _append(self, tag: Tag, finished: FinishedRequest) -> Turn:
        branch = self._branch(tag)
        branch.newest = max(branch.newest, tag.after_turn) + 1
        turn = Turn(tag, branch.newest, finished)
        branch.turns[turn.number] = turn
        self._turns[tag.branch, turn.number] = turn
        self._by_rid[finished.rid] = turn
        self._turn_tokens += len(finished.tokens)
        while self._turn_tokens > MAX_TURN_TOKENS and len(self._turns) > 1:
            self._forget(next(iter(self._turns.values())))
        return turn

    def _branch(self, tag: Tag) -> _Branch:
        self._branches.move_to_end(tag.branch)
        return self._branches[tag.branch]

    def _forget(self, turn: Turn) -> None:
        del self._turns[turn.tag.branch, turn.number]
        # A client may have used one rid twice: the newer turn keeps it.
        if self._by_rid.get(turn.request.rid) is turn:
            del self._by_rid[turn.request.rid]
        self._turn_tokens -= len(turn.request.tokens)
        self._branches[turn.tag.branch].turns.pop(turn.number)

    def _forget_branch(self, key: tuple[str, str, str]) -> None:
        for turn in list(self._branches[key].turns.values()):
            self._forget(turn)
        del self._branches[key]

    def _forget_unnumbered(self, gone: tuple[str, ...]) -> None:
        for rid, (tag, _) in list(self._unnumbered.items()):
            if tag.branch[: len(gone)] == gone:
                del self._unnumbered[rid]

    def _expire(self) -> None:
        horizon = self._clock() - UNTAGGED_SECONDS
        while self._untagged:
            rid, oldest = next(iter(self._untagged.items()))
            many = len(self._untagged) > MAX_UNTAGGED
            large = self._untagged_tokens > MAX_UNTAGGED_TOKENS and len(self._untagged) > 1
            if not (many or large or oldest.finished_at <= horizon):
                return
            self._forget_untagged(rid)

    def _forget_untagged(self, rid: str) -> FinishedRequest | None:
        finished = self._untagged.pop(rid, None)
        if finished is not None:
            self._untagged_tokens -= len(finished.tokens)
        return finished
