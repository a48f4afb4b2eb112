"""MCP over the standard input and output, for clients that start a process: a running server's
tools and resources, passed through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx2
from mcp import Client, types
from mcp.client.streamable_http import streamable_http_client
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from engram.version import __version__

T = TypeVar("T")

TIMEOUT = httpx2.Timeout(30.0, read=900.0)


async def serve_stdio(url: str, api_key: str | None) -> None:
    """Serve until the standard input ends.

    `url` is the server's address, such as ``http://localhost:30000``.  Raises what the client of
    the `mcp` package raises where there is no server.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=TIMEOUT) as http:
        transport = streamable_http_client(url.rstrip("/") + "/mcp", http_client=http)
        async with Client(transport) as client:
            server = bridge(client)
            async with stdio_server() as (reads, writes):
                await server.run(reads, writes, server.create_initialization_options())


def bridge(client: Client) -> Server[Any]:
    """A server that asks another one for everything."""

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> Any:
        return await client.call_tool(
            params.name,
            params.arguments,
            progress_callback=context.session.report_progress,
            meta=_own(context.meta),
        )

    def passed(ask: Callable[..., Awaitable[T]]) -> Callable[[Any, Any], Awaitable[T]]:
        async def handler(context: Any, params: Any) -> T:
            cursor = None if params is None else params.cursor
            return await ask(cursor=cursor)

        return handler

    async def read_resource(context: Any, params: types.ReadResourceRequestParams) -> Any:
        return await client.read_resource(params.uri)

    return Server(
        "engram",
        version=__version__,
        on_list_tools=passed(client.list_tools),
        on_call_tool=call_tool,
        on_list_resources=passed(client.list_resources),
        on_list_resource_templates=passed(client.list_resource_templates),
        on_read_resource=read_resource,
    )


def _own(meta: Any) -> Any:
    """What a client says of a call, without what belongs to the connection it came over."""
    kept = {name: value for name, value in dict(meta or {}).items() if name.startswith("engram/")}
    return kept or None
