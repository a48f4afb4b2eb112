"""The MCP server: the same tools, with conversations and snapshots as resources.

| resource | holds |
|---|---|
| `engram://conversations` | the conversations that have snapshots |
| `engram://conversations/{id}` | the snapshots of one |
| `engram://snapshots/{id}` | one snapshot |
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from dataclasses import asdict
from typing import Any, Final

import pydantic_core
from mcp import types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp.types import INVALID_PARAMS

from engram.agents.built_in import shown
from engram.agents.host import AgentHost
from engram.agents.tool import ToolSpec
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.errors import EngramError, NotFoundError
from engram.version import __version__

logger = logging.getLogger(__name__)

SCHEME: Final = "engram://"
MAX_BODY_BYTES: Final = 4 << 20
MAX_SESSIONS: Final = 1_000
LISTED: Final = 1_000
CONVERSATION_META: Final = "engram/conversation_id"
"""Of a call's `_meta`: the conversation the call belongs to."""

Context = ServerRequestContext[Any, Any]


def session_manager(host: AgentHost) -> StreamableHTTPSessionManager:
    """The MCP server as an ASGI app over streamable HTTP; run once, beside the web server."""
    return StreamableHTTPSessionManager(
        app=mcp_server(host),
        max_request_body_size=MAX_BODY_BYTES,
        max_sessions=MAX_SESSIONS,
        stateless=True,
    )


def mcp_server(host: AgentHost) -> Server[Any]:
    """The server, over no transport yet."""
    handlers = _Handlers(host)
    return Server(
        "engram",
        version=__version__,
        instructions="Tools of an Engram server: memory, checkpoints, branches, and its "
        "operator's own. Conversations and snapshots are resources.",
        on_list_tools=handlers.list_tools,
        on_call_tool=handlers.call_tool,
        on_list_resources=handlers.list_resources,
        on_list_resource_templates=handlers.list_templates,
        on_read_resource=handlers.read_resource,
    )


class _Handlers:
    def __init__(self, host: AgentHost) -> None:
        self._host = host

    def _owner(self, context: Context) -> str:
        request = context.request
        header = None if request is None else request.headers.get("authorization")
        return self._host.owner_of(header)

    async def list_tools(self, context: Context, params: Any) -> types.ListToolsResult:
        specs = self._host.executor.specs()
        return types.ListToolsResult(tools=[as_mcp_tool(spec) for spec in specs])

    async def call_tool(
        self, context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        meta: dict[str, Any] = dict(context.meta or {})
        progress = _Progress(context)
        try:
            conversation = meta.get(CONVERSATION_META)
            if conversation is not None:
                conversation = check_id(CONVERSATION_META, conversation)
            result = await self._host.execute(
                self._owner(context),
                params.name,
                params.arguments or {},
                call_id=f"call-{uuid.uuid4().hex}",
                conversation_id=conversation,
                on_progress=progress.report,
            )
        except NotFoundError as error:
            if error.details.get("tool") == params.name:
                raise MCPError(INVALID_PARAMS, str(error)) from None
            return _failed(error)
        except EngramError as error:
            return _failed(error)
        finally:
            await progress.close()
        text = pydantic_core.to_json(result.value).decode()
        if isinstance(result.value, str):
            text = result.value
        structured = result.value if isinstance(result.value, dict) else {"result": result.value}
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)], structured_content=structured
        )

    async def list_resources(self, context: Context, params: Any) -> types.ListResourcesResult:
        service = self._host.service.context
        after = None if params is None else params.cursor
        rows = await service.in_catalog(
            service.catalog.conversations, DEFAULT_TENANT, limit=LISTED, after=after
        )
        found = [
            types.Resource(
                uri=f"{SCHEME}conversations/{row.conversation_id}",
                name=row.conversation_id,
                description=f"{row.snapshots} snapshots on {row.branches} branches",
                mime_type="application/json",
            )
            for row in rows
        ]
        if after is None:
            found.insert(
                0,
                types.Resource(
                    uri=f"{SCHEME}conversations",
                    name="conversations",
                    description="The conversations that have snapshots",
                    mime_type="application/json",
                ),
            )
        more = rows[-1].conversation_id if len(rows) == LISTED else None
        return types.ListResourcesResult(resources=found, next_cursor=more)

    async def list_templates(
        self, context: Context, params: Any
    ) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(
            resource_templates=[
                types.ResourceTemplate(
                    uri_template=f"{SCHEME}{kind}s/{{id}}", name=kind, mime_type="application/json"
                )
                for kind in ("conversation", "snapshot")
            ]
        )

    async def read_resource(
        self, context: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        try:
            value = await self._read(str(params.uri))
        except EngramError as error:
            raise MCPError(INVALID_PARAMS, str(error)) from None
        content = types.TextResourceContents(
            uri=params.uri, mime_type="application/json", text=json.dumps(value)
        )
        return types.ReadResourceResult(contents=[content])

    async def _read(self, uri: str) -> Any:
        service = self._host.service
        kind, _, name = uri.removeprefix(SCHEME).partition("/")
        if not uri.startswith(SCHEME) or kind not in ("conversations", "snapshots"):
            raise NotFoundError(f"no resource {uri[:200]!r}")
        if kind == "snapshots":
            row = await service.get(DEFAULT_TENANT, check_id("snapshot_id", name))
            return shown(row)
        if name:
            name = check_id("conversation_id", name)
            return [shown(row) for row in await service.list(DEFAULT_TENANT, name)]
        rows = await service.context.in_catalog(
            service.context.catalog.conversations, DEFAULT_TENANT, limit=LISTED
        )
        return [asdict(row) for row in rows]


class _Progress:
    """Passes reports of progress on, in order; of those that wait only the newest."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._newest: tuple[float, str] | None = None
        self._task: asyncio.Task[None] | None = None

    def report(self, fraction: float, message: str) -> None:
        self._newest = (fraction, message)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task})
            error = self._task.exception()
            if error is not None:
                logger.info("Engram: an MCP client did not take reports of progress: %s", error)

    async def _send(self) -> None:
        while self._newest is not None:
            (fraction, message), self._newest = self._newest, None
            await self._context.session.report_progress(fraction, 1.0, message or None)


def as_mcp_tool(spec: ToolSpec) -> types.Tool:
    """A tool in the form of the protocol."""
    return types.Tool(
        name=spec.name,
        description=spec.description,
        input_schema=spec.parameters,
        annotations=types.ToolAnnotations(idempotent_hint=spec.idempotent),
    )


def _failed(error: EngramError) -> types.CallToolResult:
    """A call that failed, in words the model can act on."""
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=str(error))],
        structured_content=error.to_dict(),
        is_error=True,
    )
