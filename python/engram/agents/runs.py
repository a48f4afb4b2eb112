"""Agent runs: begun, watched, cancelled, resumed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from engram.agents.draft import Changes, Draft, Position
from engram.agents.events import Event, EventBus
from engram.agents.execution import ToolExecutor
from engram.agents.journal import ACTIVE, INTERRUPTED, Journal, Run
from engram.agents.loop import Limits, RunLoop, SaveTurn
from engram.agents.ports import ChatEngine
from engram.agents.requests import Beginning, RunRequest, RunTask
from engram.core.ids import DEFAULT_BRANCH
from engram.errors import (
    AgentsBusyError,
    EngramError,
    InternalError,
    InvalidRequestError,
    RunConflictError,
    UnsupportedError,
)

logger = logging.getLogger(__name__)

MAX_ACTIVE_RUNS: Final = 64
CLOSE_TIMEOUT_S: Final = 40.0
"""For all runs to end with the server: more than the host gives the save of one."""

FindTurn = Callable[[str, str | None, int | None], Awaitable[Beginning]]
"""The turn of a conversation's branch, the newest without a number, made durable."""


_Place = tuple[str, str, str]
"""Owner, conversation and branch: where only one run may be under way."""


@dataclass
class _Active:
    run: Run
    task: asyncio.Task[None]
    cancelled: bool = False
    draft: Draft = field(default_factory=Draft)
    changes: Changes = field(default_factory=Changes)


class RunManager:
    """The runs of a server.  Used on one event loop."""

    def __init__(
        self,
        journal: Journal,
        executor: ToolExecutor,
        engine: ChatEngine,
        bus: EventBus,
        save_turn: SaveTurn,
        find_turn: FindTurn,
        limits: Limits,
    ) -> None:
        self._journal = journal
        self._executor = executor
        self._engine = engine
        self._bus = bus
        self._save_turn = save_turn
        self._find_turn = find_turn
        self._limits = limits
        self._active: dict[str, _Active] = {}
        self._busy: set[_Place] = set()
        self._resuming: set[str] = set()
        self._preparing = 0
        self._closing = False

    @property
    def active(self) -> int:
        """Runs under way."""
        return len(self._active)

    async def start(self) -> None:
        """Find the runs that the last server left in the middle: they can be resumed."""
        for owner, run_id in await self._journal.interrupt():
            logger.info("Engram: agent run %s of %s was interrupted", run_id, owner or "everybody")

    async def close(self) -> None:
        """Interrupt what runs, and begin nothing more; it can be resumed.  May be called again."""
        self._closing = True
        tasks = {one.task for one in self._active.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            # What is not written down then, as the disk hangs, the next server finds interrupted.
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)

    async def create(self, owner: str, request: RunRequest, exploration: str | None = None) -> Run:
        """Begin a run.

        Raises `InvalidRequestError` for limits above the server's, `NotFoundError` for an unknown
        tool or turn, `UnsupportedError` where the engine cannot tell tool calls, `RunConflictError`
        for a branch with a run under way, `AgentsBusyError` for one too many.
        """
        self.check(request)
        conversation = request.conversation_id or ""
        place = (owner, conversation, request.branch_name or DEFAULT_BRANCH)
        with self._holding(place if conversation else None):
            if request.continue_from is not None:
                request.continue_from = await self._beginning(request)
            body = request.model_dump(mode="json")
            run_id = await self._journal.create(owner, conversation, body, exploration)
            run = await self._journal.load(owner, run_id)
            event = {"event": "run_started"}
            await self._journal.tell(run_id, event)
            self._begin(run, repeat=False)
            self._told(run, event)
        return run

    async def _beginning(self, request: RunRequest) -> Beginning:
        asked = request.continue_from
        assert asked is not None
        conversation = asked.conversation_id or request.conversation_id
        if conversation is None:
            raise InvalidRequestError(
                "continue_from needs a conversation_id", details={"field": "conversation_id"}
            )
        return await self._find_turn(conversation, asked.branch_name, asked.turn_number)

    async def resume(self, owner: str, run_id: str, *, repeat: bool) -> Run:
        """Go on with a run that was interrupted, cancelled or has failed.

        With `repeat`, calls whose outcome is unknown are made again; else the model is told.
        """
        if run_id in self._resuming:
            raise RunConflictError(f"run {run_id} is being resumed")
        self._resuming.add(run_id)
        try:
            run = await self._journal.load(owner, run_id)
            if run_id in self._active or run.status in ("completed", "limit_reached"):
                raise RunConflictError(
                    f"run {run_id} is {run.status}",
                    hint="only a run that was stopped can be resumed",
                )
            self.check(RunRequest.model_validate(run.request))
            with self._holding(_place(run)):
                event = {"event": "run_resumed", "step": len(run.steps)}
                await self._journal.set_status(run_id, ACTIVE, None, event)
                run.status, run.result = ACTIVE, None
                self._begin(run, repeat=repeat)
                self._told(run, event)
        finally:
            self._resuming.discard(run_id)
        return run

    async def cancel(self, owner: str, run_id: str) -> Run:
        """End a run; its tools are ended too.  `RunConflictError` if it does not run."""
        await self._journal.require(owner, run_id)
        if run_id not in self._active:
            raise RunConflictError(f"run {run_id} is not under way")
        return await self.stop(owner, run_id)

    async def stop(self, owner: str, run_id: str) -> Run:
        """The same, whether or not it runs."""
        active = self._active.get(run_id)
        if active is not None:
            active.cancelled = True
            active.task.cancel()
            await asyncio.wait({active.task})
        return await self._journal.load(owner, run_id)

    async def get(self, owner: str, run_id: str) -> Run:
        """A run as it stands.  `NotFoundError`."""
        return await self._journal.load(owner, run_id)

    async def require(self, owner: str, run_id: str) -> None:
        """Raise `NotFoundError` for a run that the owner does not have."""
        await self._journal.require(owner, run_id)

    async def newest(self, owner: str, limit: int) -> list[Run]:
        """An owner's runs, the newest first."""
        return await self._journal.newest(owner, limit)

    async def remove(self, owner: str, run_id: str) -> None:
        """Forget a run; the turns of its conversation stay.

        `NotFoundError`, and `RunConflictError` for one that is under way.
        """
        if run_id in self._active or run_id in self._resuming:
            await self._journal.require(owner, run_id)
            raise RunConflictError(f"run {run_id} is under way", hint="cancel it first")
        await self._journal.remove(owner, run_id)

    async def stream(
        self, owner: str, run_id: str, after: int = 0, *, tokens: bool = False
    ) -> AsyncIterator[tuple[int | None, dict[str, Any]]]:
        """The events of a run past number `after`, until it is over or stopped.

        They are read from the journal: none is lost, however slowly they are taken. With `tokens`
        come ``run_tokens`` besides, which have no number: what was written of a reply since the
        last one.
        """
        await self.require(owner, run_id)
        seen = Position()
        while True:
            # In this order, so that what happens in between is seen in the next round.
            active = self._active.get(run_id)
            count = 0 if active is None else active.changes.count
            found = await self._journal.events(run_id, after)
            for after, event in found:
                # A reply's last words go before what says that it is complete.
                if tokens and active and _ends(event, active.draft):
                    more = _written(run_id, active.draft, seen)
                    if more is not None:
                        yield None, more
                        seen = _past(more)
                yield after, event
            if found:
                continue
            if active is None:
                return
            if tokens and (more := _written(run_id, active.draft, seen)):
                yield None, more
                seen = _past(more)
                continue
            await active.changes.past(count)

    async def ended(self, run_id: str) -> None:
        """Return when a run is not under way any more."""
        active = self._active.get(run_id)
        if active is not None:
            await asyncio.wait({active.task})

    def check(self, request: RunTask) -> None:
        """Raise what `create` raises for what a run is to do."""
        for name in ("max_iterations", "max_tool_calls_per_iteration"):
            given, limit = getattr(request, name), getattr(self._limits, name)
            if given is not None and given > limit:
                raise InvalidRequestError(
                    f"{name} may be at most {limit}",
                    hint=f"the server's limit is --agent-{name.replace('_', '-')}",
                    details={"field": name, "limit": limit},
                )
        for name in request.tools or ():
            self._executor.spec(name)
        if request.tools != [] and not self._engine.parses_tool_calls:
            raise UnsupportedError(
                "this server does not tell tool calls from text",
                hint="start it with --tool-call-parser, or run without tools: []",
                details={"field": "tools"},
            )

    @contextlib.contextmanager
    def _holding(self, place: _Place | None) -> Iterator[None]:
        """Room for one more run, at a place of its own, while it is prepared; then it has both."""
        if self._closing:
            raise AgentsBusyError("the server is about to end", hint="try again when it is back")
        if len(self._active) + self._preparing >= MAX_ACTIVE_RUNS:
            raise AgentsBusyError(f"{MAX_ACTIVE_RUNS} runs are under way", hint="try again later")
        if place in self._busy:
            assert place is not None
            _, conversation, branch = place
            raise RunConflictError(
                f"another run of conversation {conversation!r} is under way on branch {branch!r}",
                hint="wait for it or cancel it",
            )
        if place is not None:
            self._busy.add(place)
        self._preparing += 1
        try:
            yield
        except BaseException:
            if place is not None:
                self._busy.discard(place)
            raise
        finally:
            self._preparing -= 1

    def _begin(self, run: Run, *, repeat: bool) -> None:
        if self._closing:
            # It is in the journal already: the next server finds it interrupted.
            raise AgentsBusyError("the server is about to end", hint="try again when it is back")
        place = _place(run)
        self._busy.add(place)
        task = asyncio.create_task(self._run(run, repeat=repeat))
        active = self._active[run.run_id] = _Active(run, task)

        def over(done: asyncio.Task[None]) -> None:
            self._active.pop(run.run_id, None)
            self._busy.discard(place)
            active.changes.tell()
            if not done.cancelled() and done.exception() is not None:
                logger.error(
                    "Engram: agent run %s cannot be written down",
                    run.run_id,
                    exc_info=done.exception(),
                )

        task.add_done_callback(over)

    async def _run(self, run: Run, *, repeat: bool) -> None:
        told: Callable[[dict[str, Any]], None] = lambda event: self._told(run, event)  # noqa: E731
        loop = RunLoop(
            run,
            self._journal,
            self._executor,
            self._engine,
            self._save_turn,
            self._limits,
            told,
            self._active[run.run_id].draft,
        )
        result: dict[str, Any] | None
        try:
            status, result = await loop.go_on(repeat=repeat)
        except asyncio.CancelledError:
            by_request = self._active[run.run_id].cancelled
            status, result = ("cancelled" if by_request else INTERRUPTED), None
        except EngramError as error:
            status, result = "failed", error.to_dict()
        except Exception as error:
            logger.exception("Engram: agent run %s failed", run.run_id)
            status = "failed"
            result = InternalError(f"{type(error).__name__}: {error}").to_dict()
        event = {"event": "run_finished", "status": status, "result": result}
        run.status, run.result = status, result
        writing = asyncio.ensure_future(self._journal.set_status(run.run_id, status, result, event))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # It is too late to be cancelled; who watches waits for the end all the same.
            await writing
        told(event)

    def _told(self, run: Run, event: dict[str, Any]) -> None:
        active = self._active.get(run.run_id)
        if active is not None:
            active.changes.tell()
        kind = event["event"]
        where = run.conversation_id or run.run_id
        if kind in ("tool_start", "tool_progress", "tool_result", "tool_error", "run_tokens"):
            data = {name: value for name, value in event.items() if name != "event"}
            self._bus.publish(Event(kind, run.owner, where, run.run_id, data))
        else:
            self._bus.publish(Event("run_event", run.owner, where, run.run_id, event))


def _place(run: Run) -> _Place:
    branch = run.request.get("branch_name") or DEFAULT_BRANCH
    return (run.owner, run.conversation_id or run.run_id, branch)


def _written(run_id: str, draft: Draft, seen: Position) -> dict[str, Any] | None:
    """An event of what was written since a reader looked last; None if nothing was."""
    found = draft.after(seen)
    if found is None:
        return None
    at, text = found
    return {
        "event": "run_tokens",
        "run_id": run_id,
        "step": at.step,
        "offset": at.offset,
        "text": text,
    }


def _ends(event: dict[str, Any], draft: Draft) -> bool:
    return bool(event["event"] == "run_step" and event["step"] == draft.step)


def _past(event: dict[str, Any]) -> Position:
    return Position(event["step"], event["offset"] + len(event["text"]))
