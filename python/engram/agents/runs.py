"""Agent runs: begun, watched, cancelled, resumed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from engram.agents.events import Event, EventBus
from engram.agents.execution import ToolExecutor
from engram.agents.journal import ACTIVE, INTERRUPTED, Journal, Run
from engram.agents.loop import Limits, RunLoop, SaveTurn
from engram.agents.ports import ChatEngine
from engram.agents.requests import RunRequest
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


@dataclass
class _Active:
    run: Run
    task: asyncio.Task[None]
    cancelled: bool = False


class RunManager:
    """The runs of a server.  Used on one event loop."""

    def __init__(
        self,
        journal: Journal,
        executor: ToolExecutor,
        engine: ChatEngine,
        bus: EventBus,
        save_turn: SaveTurn,
        limits: Limits,
    ) -> None:
        self._journal = journal
        self._executor = executor
        self._engine = engine
        self._bus = bus
        self._save_turn = save_turn
        self._limits = limits
        self._active: dict[str, _Active] = {}
        self._busy: set[tuple[str, str]] = set()
        self._changed: dict[str, asyncio.Event] = {}
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
        for one in list(self._active.values()):
            one.task.cancel()
        await asyncio.gather(*(one.task for one in self._active.values()), return_exceptions=True)

    async def create(self, owner: str, request: RunRequest) -> Run:
        """Begin a run.

        Raises `InvalidRequestError` for limits above the server's, `NotFoundError` for an unknown
        tool, `UnsupportedError` where the engine cannot tell tool calls, `RunConflictError` for a
        conversation with a run under way, `AgentsBusyError` for one too many.
        """
        self._check(request)
        self._admit(owner, request.conversation_id)
        body = request.model_dump(mode="json")
        conversation = request.conversation_id
        place = (owner, conversation) if conversation is not None else None
        if place is not None:
            self._busy.add(place)
        try:
            run_id = await self._journal.create(owner, conversation or "", body)
            run = await self._journal.load(owner, run_id)
            await self._journal.tell(run_id, {"event": "run_started"})
        except BaseException:
            self._busy.discard(place or ("", ""))
            raise
        self._begin(run, repeat=False)
        return run

    async def resume(self, owner: str, run_id: str, *, repeat: bool) -> Run:
        """Go on with a run that was interrupted, cancelled or has failed.

        With `repeat`, calls whose outcome is unknown are made again; else the model is told.
        """
        run = await self._journal.load(owner, run_id)
        if run_id in self._active or run.status in ("completed", "limit_reached"):
            raise RunConflictError(
                f"run {run_id} is {run.status}", hint="only a run that was stopped can be resumed"
            )
        request = RunRequest.model_validate(run.request)
        self._check(request)
        place = run.conversation_id or run_id
        self._admit(owner, place)
        self._busy.add((owner, place))
        try:
            event = {"event": "run_resumed", "step": len(run.steps)}
            await self._journal.set_status(run_id, ACTIVE, None, event)
        except BaseException:
            self._busy.discard((owner, place))
            raise
        run.status, run.result = ACTIVE, None
        self._begin(run, repeat=repeat)
        return run

    async def cancel(self, owner: str, run_id: str) -> Run:
        """End a run; its tools are ended too.  `RunConflictError` if it does not run."""
        await self._journal.load(owner, run_id)
        active = self._active.get(run_id)
        if active is None:
            raise RunConflictError(f"run {run_id} is not under way")
        active.cancelled = True
        active.task.cancel()
        await asyncio.gather(active.task, return_exceptions=True)
        return await self._journal.load(owner, run_id)

    async def get(self, owner: str, run_id: str) -> Run:
        """A run as it stands.  `NotFoundError`."""
        return await self._journal.load(owner, run_id)

    async def newest(self, owner: str, limit: int) -> list[Run]:
        """An owner's runs, the newest first."""
        return await self._journal.newest(owner, limit)

    async def stream(
        self, owner: str, run_id: str, after: int = 0
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """The events of a run past number `after`, until it is over or stopped.

        They are read from the journal: none is lost, however slowly they are taken.
        """
        await self._journal.load(owner, run_id)
        while True:
            # In this order, so that what happens in between is seen in the next round.
            running = run_id in self._active
            changed = self._changed.get(run_id)
            if changed is not None:
                changed.clear()
            found = await self._journal.events(run_id, after)
            for after, event in found:
                yield after, event
            if found:
                continue
            if not running:
                return
            if changed is not None and run_id in self._active:
                await changed.wait()

    def _check(self, request: RunRequest) -> None:
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

    def _admit(self, owner: str, conversation: str | None) -> None:
        if self._closing:
            raise AgentsBusyError("the server is about to end", hint="try again when it is back")
        if len(self._active) >= MAX_ACTIVE_RUNS:
            raise AgentsBusyError(f"{MAX_ACTIVE_RUNS} runs are under way", hint="try again later")
        if conversation is not None and (owner, conversation) in self._busy:
            raise RunConflictError(
                f"another run of conversation {conversation!r} is under way",
                hint="wait for it or cancel it",
            )

    def _begin(self, run: Run, *, repeat: bool) -> None:
        place = (run.owner, run.conversation_id or run.run_id)
        self._busy.add(place)
        self._changed[run.run_id] = asyncio.Event()
        task = asyncio.create_task(self._run(run, repeat=repeat))
        self._active[run.run_id] = _Active(run, task)

        def over(done: asyncio.Task[None]) -> None:
            self._active.pop(run.run_id, None)
            self._busy.discard(place)
            changed = self._changed.pop(run.run_id, None)
            if changed is not None:
                changed.set()
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
            run, self._journal, self._executor, self._engine, self._save_turn, self._limits, told
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
        await self._journal.set_status(run.run_id, status, result, event)
        told(event)

    def _told(self, run: Run, event: dict[str, Any]) -> None:
        changed = self._changed.get(run.run_id)
        if changed is not None:
            changed.set()
        kind = event["event"]
        where = run.conversation_id or run.run_id
        if kind in ("tool_start", "tool_progress", "tool_result", "tool_error"):
            data = {name: value for name, value in event.items() if name != "event"}
            self._bus.publish(Event(kind, run.owner, where, run.run_id, data))
        else:
            self._bus.publish(Event("run_event", run.owner, where, run.run_id, event))
