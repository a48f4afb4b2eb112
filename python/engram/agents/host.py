"""Everything agents need in one server, put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from engram.agents.built_in import built_in_tools
from engram.agents.database import AgentDatabase
from engram.agents.events import Event, EventBus, Subscriber
from engram.agents.execution import MAX_RESULT_BYTES, ToolExecutor, ToolResult
from engram.agents.exploring import Explorations
from engram.agents.exploring_tools import exploring_tools
from engram.agents.journal import Journal
from engram.agents.loop import Limits
from engram.agents.memory import MemoryChange, MemoryStore
from engram.agents.owners import owner_of
from engram.agents.pool import WorkerPool
from engram.agents.ports import ChatEngine
from engram.agents.requests import Beginning
from engram.agents.runs import RunManager
from engram.agents.tool import ToolContext, ToolSpec
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH, DEFAULT_TENANT
from engram.core.settings import Settings
from engram.errors import EngramError, NotFoundError
from engram.service import SnapshotService
from engram.service.results import TierChange

WORKERS: Final = 4
"""Processes in which an operator's tools run at the same time."""
SAVE_TIMEOUT_S: Final = 30.0
"""For the save of a run that is ended; a store that hangs does not keep the server from ending."""


class AgentHost:
    """The agents of one server.  Used on one event loop; made before it runs.

    Raises `StoreError` for a database that cannot be opened.
    """

    def __init__(
        self,
        settings: Settings,
        service: SnapshotService,
        engine: ChatEngine,
        database: Path,
        *,
        keyed: bool = False,
    ) -> None:
        self.service = service
        self.keyed = keyed
        self.bus = EventBus()
        self._database = AgentDatabase(database)
        self.memory = MemoryStore(self._database, self._remembered)
        module = settings.agent_tools_module
        pool = None
        if module is not None:
            pool = WorkerPool(module, size=WORKERS, max_result_bytes=MAX_RESULT_BYTES)
        self.executor = ToolExecutor(
            [
                *built_in_tools(service, self.memory, engine.decode),
                *exploring_tools(lambda: self.explorations),
            ],
            timeout=settings.agent_tool_timeout,
            pool=pool,
        )
        journal = Journal(self._database)
        self.runs = RunManager(
            journal,
            self.executor,
            engine,
            self.bus,
            self._save_turn,
            self._find_turn,
            Limits(settings.agent_max_iterations, settings.agent_max_tool_calls_per_iteration),
        )
        self.explorations = Explorations(
            self.runs, journal, service, self._find_turn, engine.decode
        )

    async def start(self) -> None:
        """Load the tools, and find the runs that were interrupted."""
        await self.executor.load()
        self.service.context.on_tier_change = self._moved
        await self.runs.start()

    async def close(self) -> None:
        """Interrupt the runs, end the tools, close the file.  May be called again."""
        await self.runs.close()
        self.executor.close()
        self._database.close()

    def owner_of(self, authorization: str | None) -> str:
        """Whose memories and runs a request with this header means."""
        return owner_of(authorization, keyed=self.keyed)

    async def execute(
        self,
        owner: str,
        name: str,
        arguments: Mapping[str, Any],
        *,
        call_id: str,
        conversation_id: str | None = None,
        caller: Subscriber | None = None,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> ToolResult:
        """Run a tool for a client, and tell of it who has subscribed to that, but the `caller`."""
        where = {"tool": name, "call_id": call_id}

        def tell(kind: str, **data: Any) -> None:
            event = Event(kind, owner, conversation_id, None, {**where, **data})
            self.bus.publish(event, but=caller)

        def progress(fraction: float, message: str) -> None:
            tell("tool_progress", fraction=fraction, message=message)
            if on_progress is not None:
                on_progress(fraction, message)

        self.executor.spec(name)
        tell("tool_start", arguments=dict(arguments))
        context = ToolContext(call_id, owner, conversation_id, None, progress)
        try:
            result = await self.executor.execute(name, arguments, context)
        except EngramError as error:
            tell("tool_error", **error.to_dict())
            raise
        tell("tool_result", result=result.value, output=result.output)
        return result

    async def stats(self) -> dict[str, Any]:
        """What runs now, and what was done since the start."""
        return {
            "tools": asdict(self.executor.counters),
            "runs_active": self.runs.active,
            "subscribers": len(self.bus),
        }

    async def _save_turn(self, conversation_id: str, rid: str, lasts: float | None) -> str:
        work = asyncio.ensure_future(self._saved(conversation_id, rid, lasts))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The save goes on whoever waits for it. A run that has ended must have none under way:
            # it could come to light behind the removal of its branch.
            await asyncio.wait({work}, timeout=SAVE_TIMEOUT_S)
            raise

    async def _saved(self, conversation_id: str, rid: str, lasts: float | None) -> str:
        saved = await self.service.save(
            tenant=DEFAULT_TENANT, conversation_id=conversation_id, rid=rid
        )
        if lasts is not None:
            await self.service.change(
                DEFAULT_TENANT, saved.snapshot_id, expires_at=time.time() + lasts
            )
        return saved.snapshot_id

    async def _find_turn(
        self, conversation_id: str, branch_name: str | None, turn_number: int | None
    ) -> Beginning:
        tag = Tag(conversation_id, branch_name or DEFAULT_BRANCH, DEFAULT_TENANT)
        turn = await self.service.recorded.find(tag, turn_number)
        if turn is None:
            what = "no turn" if turn_number is None else f"no turn {turn_number}"
            raise NotFoundError(
                f"{what} is recorded of conversation {conversation_id!r}, branch "
                f"{tag.branch_name!r}",
                hint="turns that were not saved are forgotten when the server stops",
                details={"conversation_id": conversation_id},
            )
        saved = await self.service.save(
            tenant=DEFAULT_TENANT,
            conversation_id=conversation_id,
            branch_name=tag.branch_name,
            turn_number=turn.number,
        )
        return Beginning(
            conversation_id=conversation_id,
            branch_name=saved.branch_name,
            turn_number=saved.turn_number,
        )

    def _remembered(self, change: MemoryChange) -> None:
        data = {"key": change.key, "category": change.category, "action": change.action}
        event = Event("memory_update", change.owner, change.conversation_id, None, data)
        self.bus.publish(event)

    def _moved(self, change: TierChange) -> None:
        data = {
            "from": change.source,
            "to": change.target,
            "reason": change.reason,
            "snapshot_id": change.snapshot_id,
            "bytes": change.bytes,
        }
        self.bus.publish(Event("tier_transition", None, change.conversation_id, None, data))


def check_tools_module(module: str) -> list[ToolSpec]:
    """The tools of a module.  `InvalidRequestError` if it cannot be loaded; no loop may run."""

    async def describe() -> list[ToolSpec]:
        pool = WorkerPool(module, size=1, max_result_bytes=MAX_RESULT_BYTES)
        try:
            return await pool.describe()
        finally:
            pool.close()

    return asyncio.run(describe())
