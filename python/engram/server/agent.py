"""`/v1/agent/*`: tools, memory, conversations, tiers and runs."""

from __future__ import annotations

import asyncio
import functools
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from engram.agents.built_in import shown
from engram.agents.host import AgentHost
from engram.agents.journal import Run
from engram.agents.requests import ExploreRequest, KeepBody, ResumeBody, RunRequest
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.errors import EngramError, InvalidRequestError
from engram.server.agent_schemas import (
    BranchBody,
    CheckpointBody,
    CompareBody,
    ExecuteBody,
    MemoryKeyBody,
    MemorySearchBody,
    MemoryStoreBody,
    RestorePlace,
)
from engram.server.origins import check_page
from engram.server.wire import (
    Handler,
    answering,
    body_of,
    error_response,
    known_query,
    read_body,
)
from engram.version import __version__

KEEP_ALIVE_S: Final = 15.0
"""After so long without an event a comment is sent, so that no proxy gives a stream up."""

QUERY: Final[Mapping[str, frozenset[str]]] = {
    "tools": frozenset({"tag"}),
    "conversations": frozenset({"limit", "after"}),
    "runs": frozenset({"limit"}),
}
"""What handlers take beside bodies; the others nothing."""

Reply = dict[str, Any]


def agent_router(host: AgentHost) -> APIRouter:
    """The routes, but for the WebSocket."""
    routes = _Routes(host)
    router = APIRouter(tags=["agents"])
    for method, path, handler, schema in (
        ("GET", "health", routes.health, None),
        ("GET", "stats", routes.stats, None),
        ("GET", "tools", routes.tools, None),
        ("GET", "tools/{name}", routes.tool, None),
        ("POST", "tools/execute", routes.execute, ExecuteBody),
        ("POST", "memory/store", routes.memory_store, MemoryStoreBody),
        ("POST", "memory/recall", routes.memory_recall, MemoryKeyBody),
        ("POST", "memory/search", routes.memory_search, MemorySearchBody),
        ("POST", "memory/delete", routes.memory_delete, MemoryKeyBody),
        ("GET", "conversations", routes.conversations, None),
        ("GET", "conversations/{conversation_id}", routes.checkpoints, None),
        ("POST", "conversations/checkpoint", routes.checkpoint, CheckpointBody),
        ("POST", "conversations/restore", routes.restore, RestorePlace),
        ("POST", "conversations/branch", routes.branch, BranchBody),
        ("POST", "conversations/compare", routes.compare, CompareBody),
        ("POST", "explorations", routes.explore, ExploreRequest),
        ("GET", "explorations/{exploration_id}", routes.exploration, None),
        ("DELETE", "explorations/{exploration_id}", routes.drop_exploration, None),
        ("POST", "explorations/{exploration_id}/keep", routes.keep_branch, KeepBody),
        ("GET", "tiers", routes.tiers, None),
        ("POST", "tiers/promote", routes.restore, RestorePlace),
        ("POST", "tiers/demote", routes.demote, RestorePlace),
        ("POST", "runs", routes.create_run, RunRequest),
        ("GET", "runs", routes.runs, None),
        ("GET", "runs/{run_id}", routes.run, None),
        ("DELETE", "runs/{run_id}", routes.remove_run, None),
        ("POST", "runs/{run_id}/cancel", routes.cancel_run, None),
        ("POST", "runs/{run_id}/resume", routes.resume_run, ResumeBody),
    ):
        _add(router, method, path, answering(routes.checked(handler)), handler.__doc__, schema)

    async def stream(request: Request) -> Response:
        return await routes.stream_run(request)

    # FastAPI resolves annotations in the module; a response of its own it passes on.
    stream.__annotations__ = {"request": Request, "return": Response}
    _add(router, "GET", "runs/{run_id}/stream", stream, routes.stream_run.__doc__, None)
    return router


def _add(
    router: APIRouter,
    method: str,
    path: str,
    route: Any,
    about: str | None,
    schema: type[BaseModel] | None,
) -> None:
    router.add_api_route(
        f"/v1/agent/{path}",
        route,
        methods=[method],
        summary=(about or "").strip().splitlines()[0],
        openapi_extra=None if schema is None else body_of(schema),
        operation_id=f"agent_{method.lower()}_{path.replace('/', '_')}",
    )


class _Routes:
    def __init__(self, host: AgentHost) -> None:
        self._host = host

    def checked(self, handler: Handler) -> Handler:
        """A handler that no page of another site reaches which has no key, and no query that
        would be passed over.
        """

        @functools.wraps(handler)
        async def checked(request: Request) -> Reply:
            check_page(request.scope["headers"], keyed=self._host.keyed)
            known_query(request, QUERY.get(handler.__name__, frozenset()))
            return await handler(request)

        return checked

    def _owner(self, request: Request) -> str:
        return self._host.owner_of(request.headers.get("authorization"))

    async def health(self, request: Request) -> Reply:
        """Whether agents are served, and with how many tools."""
        tools = len(self._host.executor.specs())
        return {"success": True, "status": "ok", "version": __version__, "tools": tools}

    async def stats(self, request: Request) -> Reply:
        """Counters of calls, runs and subscribers, and how much is remembered."""
        memories = await self._host.memory.count(self._owner(request))
        return {"success": True, **await self._host.stats(), "memories": memories}

    async def tools(self, request: Request) -> Reply:
        """List the tools, all or those with a tag."""
        specs = self._host.executor.specs(request.query_params.get("tag"))
        return {"success": True, "tools": [spec.model_dump(mode="json") for spec in specs]}

    async def tool(self, request: Request) -> Reply:
        """Describe one tool."""
        spec = self._host.executor.spec(request.path_params["name"])
        return {"success": True, "tool": spec.model_dump(mode="json")}

    async def execute(self, request: Request) -> Reply:
        """Run a tool and answer with its result."""
        body = await read_body(request, ExecuteBody)
        return await self._call(request, body.tool, body.arguments, body.conversation_id)

    async def _call(
        self,
        request: Request,
        tool: str,
        arguments: Mapping[str, Any],
        conversation_id: str | None = None,
    ) -> Reply:
        call_id = f"call-{uuid.uuid4().hex}"
        result = await self._host.execute(
            self._owner(request), tool, arguments, call_id=call_id, conversation_id=conversation_id
        )
        return {
            "success": True,
            "tool": tool,
            "call_id": call_id,
            "result": result.value,
            "output": result.output,
            "elapsed_ms": round(result.elapsed_ms, 3),
        }

    async def _built_in(self, request: Request, tool: str, body: BaseModel) -> Reply:
        return await self._call(request, tool, body.model_dump(exclude_none=True))

    async def memory_store(self, request: Request) -> Reply:
        """Remember a value under a key."""
        body = await read_body(request, MemoryStoreBody)
        stored = await self._host.memory.store(
            self._owner(request),
            body.key,
            body.value,
            category=body.category,
            conversation_id=body.conversation_id,
        )
        return {"success": True, "memory": asdict(stored)}

    async def memory_recall(self, request: Request) -> Reply:
        """Recall what is remembered under a key."""
        body = await read_body(request, MemoryKeyBody)
        found = await self._host.memory.recall(
            self._owner(request), body.key, conversation_id=body.conversation_id
        )
        return {"success": True, "memory": asdict(found)}

    async def memory_search(self, request: Request) -> Reply:
        """Search what is remembered by words and by category."""
        body = await read_body(request, MemorySearchBody)
        found = await self._host.memory.search(
            self._owner(request),
            body.query,
            category=body.category,
            conversation_id=body.conversation_id,
            limit=body.limit,
        )
        return {"success": True, "memories": [asdict(one) for one in found]}

    async def memory_delete(self, request: Request) -> Reply:
        """Forget what is remembered under a key."""
        body = await read_body(request, MemoryKeyBody)
        await self._host.memory.delete(
            self._owner(request), body.key, conversation_id=body.conversation_id
        )
        return {"success": True, "message": f"forgot {body.key}"}

    async def conversations(self, request: Request) -> Reply:
        """List the conversations with snapshots, by id; after=... goes on."""
        context = self._host.service.context
        limit = _number(request, "limit", 100, 1000)
        rows = await context.in_catalog(
            context.catalog.conversations,
            DEFAULT_TENANT,
            limit=limit,
            after=request.query_params.get("after"),
        )
        after = rows[-1].conversation_id if len(rows) == limit else None
        return {"success": True, "conversations": [asdict(row) for row in rows], "after": after}

    async def checkpoints(self, request: Request) -> Reply:
        """List the snapshots of a conversation."""
        name = check_id("conversation_id", request.path_params["conversation_id"])
        return await self._call(request, "checkpoint_list", {"conversation_id": name})

    async def checkpoint(self, request: Request) -> Reply:
        """Save the newest turn of a conversation."""
        body = await read_body(request, CheckpointBody)
        return await self._built_in(request, "checkpoint_save", body)

    async def restore(self, request: Request) -> Reply:
        """Bring a snapshot into memory, verified."""
        body = await read_body(request, RestorePlace)
        return await self._built_in(request, "checkpoint_restore", body)

    async def branch(self, request: Request) -> Reply:
        """Begin a branch at a turn of a conversation."""
        body = await read_body(request, BranchBody)
        return await self._built_in(request, "conversation_branch", body)

    async def compare(self, request: Request) -> Reply:
        """Compare two snapshots."""
        body = await read_body(request, CompareBody)
        return await self._built_in(request, "conversation_compare", body)

    async def tiers(self, request: Request) -> Reply:
        """What VRAM, RAM and disk hold now."""
        return {"success": True, "tiers": await self._host.service.tiers()}

    async def demote(self, request: Request) -> Reply:
        """Let a snapshot leave RAM; it stays on disk."""
        body = await read_body(request, RestorePlace)
        row = await self._host.service.find(tenant=DEFAULT_TENANT, **body.model_dump())
        freed = await self._host.service.demote([row])
        return {"success": True, "snapshot_id": row.snapshot_id, "bytes": freed}

    async def create_run(self, request: Request) -> Reply:
        """Begin an agent run."""
        body = await read_body(request, RunRequest)
        return _shown(await self._host.runs.create(self._owner(request), body))

    async def runs(self, request: Request) -> Reply:
        """List the runs, the newest first."""
        limit = _number(request, "limit", 100, 1000)
        found = await self._host.runs.newest(self._owner(request), limit)
        return {"success": True, "runs": [_summary(run) for run in found]}

    async def run(self, request: Request) -> Reply:
        """Describe a run with its replies and calls."""
        return _shown(await self._host.runs.get(self._owner(request), _run_id(request)))

    async def remove_run(self, request: Request) -> Reply:
        """Forget a run; the snapshots of its conversation stay."""
        run_id = _run_id(request)
        await self._host.runs.remove(self._owner(request), run_id)
        return {"success": True, "message": f"forgot {run_id}"}

    async def cancel_run(self, request: Request) -> Reply:
        """End a run, and the tools it has at work."""
        return _shown(await self._host.runs.cancel(self._owner(request), _run_id(request)))

    async def resume_run(self, request: Request) -> Reply:
        """Go on with a run that was interrupted, cancelled or has failed."""
        body = await read_body(request, ResumeBody)
        run = await self._host.runs.resume(
            self._owner(request), _run_id(request), repeat=body.unknown_calls == "repeat"
        )
        return _shown(run)

    async def explore(self, request: Request) -> Reply:
        """Begin several runs from one turn, each on a branch of its own."""
        body = await read_body(request, ExploreRequest)
        owner = self._owner(request)
        made = await self._host.explorations.create(owner, body)
        return {"success": True, **await self._host.explorations.get(owner, made)}

    async def exploration(self, request: Request) -> Reply:
        """Compare the branches of an exploration."""
        name = _exploration_id(request)
        return {"success": True, **await self._host.explorations.get(self._owner(request), name)}

    async def keep_branch(self, request: Request) -> Reply:
        """Keep one branch of an exploration, and drop the others."""
        body = await read_body(request, KeepBody)
        name = _exploration_id(request)
        kept = await self._host.explorations.keep(self._owner(request), name, body.branch_name)
        return {
            "success": True,
            "kept": shown(kept.snapshot),
            "run_id": kept.run_id,
            "dropped": kept.dropped,
        }

    async def drop_exploration(self, request: Request) -> Reply:
        """Drop all branches of an exploration."""
        name = _exploration_id(request)
        dropped = await self._host.explorations.drop(self._owner(request), name)
        return {"success": True, "dropped": dropped}

    async def stream_run(self, request: Request) -> Response:
        """The events of a run as server-sent events, from the first or past after=NUMBER.

        With tokens=true comes the text of replies while it is written.
        """
        owner, run_id = self._owner(request), _run_id(request)
        try:
            check_page(request.scope["headers"], keyed=self._host.keyed)
            known_query(request, frozenset({"after", "tokens"}))
            last = request.headers.get("last-event-id") or request.query_params.get("after", "0")
            if not (last.isdecimal() and len(last) < 18):
                raise InvalidRequestError("after must be a number", details={"field": "after"})
            tokens = request.query_params.get("tokens", "false")
            if tokens not in ("true", "false"):
                raise InvalidRequestError(
                    "tokens must be true or false", details={"field": "tokens"}
                )
            await self._host.runs.require(owner, run_id)
        except EngramError as error:
            return error_response(error)
        events = self._host.runs.stream(owner, run_id, int(last), tokens=tokens == "true")
        return StreamingResponse(_sent(events), media_type="text/event-stream")


async def _sent(events: AsyncIterator[tuple[int | None, dict[str, Any]]]) -> AsyncIterator[str]:
    coming: asyncio.Future[tuple[int | None, dict[str, Any]]] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
            if not done:
                yield ": nothing new\n\n"
                continue
            try:
                number, event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            # Without a number a client that comes back still names the last one that counts.
            line = "" if number is None else f"id: {number}\n"
            yield f"{line}event: {event['event']}\ndata: {json.dumps(event)}\n\n"
    finally:
        if coming is not None:
            coming.cancel()


def _run_id(request: Request) -> str:
    return check_id("run_id", request.path_params["run_id"])


def _exploration_id(request: Request) -> str:
    return check_id("exploration_id", request.path_params["exploration_id"])


def _number(request: Request, name: str, default: int, most: int) -> int:
    given = request.query_params.get(name, str(default))
    if not (given.isdecimal() and len(given) < 10 and 1 <= int(given) <= most):
        raise InvalidRequestError(
            f"{name} must be a number from 1 to {most}", details={"field": name}
        )
    return int(given)


def _summary(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "conversation_id": run.conversation_id or run.run_id,
        "status": run.status,
        "result": run.result,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
    }


def _shown(run: Run) -> Reply:
    hidden = ("prompt_ids", "output_ids", "rendered")
    steps = [
        {
            **{name: value for name, value in step.reply.items() if name not in hidden},
            "step": step.number,
            "calls": [asdict(call) for call in step.calls],
        }
        for step in run.steps
    ]
    return {"success": True, **_summary(run), "steps": steps}
