"""Explorations: several runs from one turn of a conversation, of which one is kept.

Each run has a branch of its own, so the turn that they begin at is computed once and copied by
none.  Until one is kept their snapshots expire by themselves.  What an exploration is stands in the
journal with its runs: keeping and dropping can be asked for again after a crash.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from engram.agents.journal import ACTIVE, Journal, Run
from engram.agents.loop import tokens_of
from engram.agents.requests import Beginning, ExploreRequest, RunRequest
from engram.agents.runs import FindTurn, RunManager
from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.errors import InvalidRequestError, NotFoundError, RunConflictError
from engram.service import SnapshotService

SHOWN_TOKENS: Final = 512
"""Of each branch, from where they part."""


@dataclass(frozen=True)
class Kept:
    """What became of an exploration: the snapshot that is kept, and the branches that are gone."""

    snapshot: SnapshotRow
    run_id: str
    dropped: list[str]


class Explorations:
    """The explorations of a server.  Used on one event loop."""

    def __init__(
        self,
        runs: RunManager,
        journal: Journal,
        service: SnapshotService,
        find_turn: FindTurn,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._runs = runs
        self._journal = journal
        self._service = service
        self._find_turn = find_turn
        self._decode = decode
        self._decided: set[str] = set()

    async def create(self, owner: str, request: ExploreRequest) -> str:
        """Begin the runs; the exploration's id.

        Raises what `RunManager.create` raises; then none of them has begun, or those that have are
        dropped.
        """
        for task in request.branches:
            self._runs.check(task)
            if not task.checkpoint:
                raise InvalidRequestError(
                    "checkpoint must be on: a branch that is not saved cannot be kept",
                    details={"field": "branches.checkpoint"},
                )
        begins = await self._find_turn(
            request.conversation_id, request.branch_name, request.turn_number
        )
        exploration = f"explore-{secrets.token_hex(8)}"
        try:
            for number, task in enumerate(request.branches, 1):
                run = RunRequest(
                    **task.model_dump(),
                    conversation_id=request.conversation_id,
                    branch_name=f"{exploration}.{number}",
                    continue_from=begins,
                )
                await self._runs.create(owner, run, exploration)
        except BaseException:
            await self._drop(await self._of(owner, exploration))
            raise
        return exploration

    async def get(self, owner: str, exploration: str) -> dict[str, Any]:
        """The branches beside one another.  `NotFoundError`, for another owner's too.

        `common_tokens` is with how many recorded tokens all that have any begin; the text of each
        is what follows them.
        """
        runs = await self._of(owner, exploration)
        _require(runs, exploration)
        tokens = [tokens_of(run.steps) for run in runs]
        common = _common([one for one in tokens if one])
        begins = Beginning.model_validate(runs[0].request["continue_from"])
        return {
            "exploration_id": exploration,
            "conversation_id": runs[0].conversation_id,
            "continues": begins.model_dump(),
            "status": "running" if any(run.status == ACTIVE for run in runs) else "over",
            "common_tokens": common,
            "branches": [
                self._shown(run, mine, common) for run, mine in zip(runs, tokens, strict=True)
            ],
        }

    async def ended(self, owner: str, exploration: str) -> None:
        """Return when none of its runs is under way."""
        for run in await self._of(owner, exploration):
            await self._runs.ended(run.run_id)

    async def keep(self, owner: str, exploration: str, branch_name: str) -> Kept:
        """Keep one branch, its newest turn durable, and drop the others.

        Raises `NotFoundError` for an unknown branch or one without a reply, `RunConflictError` for
        one whose run is under way. What has not been done when it fails is done when it is asked
        for again.
        """
        with self._deciding(exploration):
            return await self._keep(owner, exploration, branch_name)

    async def _keep(self, owner: str, exploration: str, branch_name: str) -> Kept:
        runs = await self._of(owner, exploration)
        _require(runs, exploration)
        kept = next((run for run in runs if run.request["branch_name"] == branch_name), None)
        if kept is None:
            raise NotFoundError(
                f"exploration {exploration} has no branch {branch_name!r}",
                hint=f"there are: {', '.join(run.request['branch_name'] for run in runs)}",
            )
        if kept.status == ACTIVE:
            raise RunConflictError(f"run {kept.run_id} is under way", hint="wait for it")
        begins = await self._find_turn(kept.conversation_id, branch_name, None)
        rows = await self._rows(kept)
        for row in rows:
            if row.expires_at is not None:
                await self._service.change(row.tenant, row.snapshot_id, expires_at=None)
        dropped = await self._drop([run for run in runs if run is not kept])
        await self._journal.explored_no_more(kept.run_id)
        newest = next(row for row in rows if row.turn_number == begins.turn_number)
        return Kept(newest, kept.run_id, dropped)

    async def drop(self, owner: str, exploration: str) -> list[str]:
        """Drop all branches, their runs and snapshots; their names.  `NotFoundError`."""
        with self._deciding(exploration):
            runs = await self._of(owner, exploration)
            _require(runs, exploration)
            return await self._drop(runs)

    @contextlib.contextmanager
    def _deciding(self, exploration: str) -> Iterator[None]:
        """One decision at a time: two that keep different branches would drop both."""
        if exploration in self._decided:
            raise RunConflictError(
                f"exploration {exploration} is being decided on", hint="see what it comes to"
            )
        self._decided.add(exploration)
        try:
            yield
        finally:
            self._decided.discard(exploration)

    async def _drop(self, runs: Sequence[Run]) -> list[str]:
        for run in runs:
            if run.status == ACTIVE:
                await self._runs.stop(run.owner, run.run_id)
            # What a trigger saves must not come to light behind what is removed.
            for step in (await self._journal.load(run.owner, run.run_id)).steps:
                await self._service.gate.settled(step.reply["rid"])
            await self._service.delete_branch(_tag(run))
            await self._runs.remove(run.owner, run.run_id)
        return [run.request["branch_name"] for run in runs]

    async def _of(self, owner: str, exploration: str) -> list[Run]:
        found = await self._journal.explored(owner, exploration)
        return [await self._journal.load(owner, run_id) for run_id in found]

    async def _rows(self, run: Run) -> list[SnapshotRow]:
        tag = _tag(run)
        every = await self._service.list(tag.tenant, tag.conversation_id)
        return [row for row in every if row.branch_name == tag.branch_name]

    def _shown(self, run: Run, tokens: list[int], common: int) -> dict[str, Any]:
        rest = tokens[common : common + SHOWN_TOKENS]
        return {
            "branch_name": run.request["branch_name"],
            "run_id": run.run_id,
            "status": run.status,
            "result": run.result,
            "iterations": len(run.steps),
            "tool_calls": sum(len(step.calls) for step in run.steps),
            "completion_tokens": sum(step.reply["completion_tokens"] for step in run.steps),
            "tokens": len(tokens),
            "text": self._decode(rest),
            "text_is_cut": len(tokens) - common > SHOWN_TOKENS,
        }


def _tag(run: Run) -> Tag:
    return Tag(run.conversation_id, run.request.get("branch_name") or DEFAULT_BRANCH)


def _require(runs: Sequence[Run], exploration: str) -> None:
    if not runs:
        raise NotFoundError(
            f"no exploration {exploration[:100]!r}",
            hint="one of which a branch was kept is over",
            details={"exploration_id": exploration[:100]},
        )


def _common(tokens: Sequence[Sequence[int]]) -> int:
    """With how many tokens all begin."""
    if not tokens:
        return 0
    shortest = min(len(one) for one in tokens)
    table = np.array([one[:shortest] for one in tokens])
    differing = np.flatnonzero((table != table[0]).any(axis=0))
    return int(differing[0]) if len(differing) else shortest
