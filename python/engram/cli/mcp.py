"""`engram mcp`: the tools of a running server for MCP clients that start a process."""

from __future__ import annotations

from typing import Annotated

import typer


def mcp(
    url: Annotated[
        str, typer.Option("--url", help="Address of the running server.")
    ] = "http://localhost:30000",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="ENGRAM_API_KEY", help="The server's API key, if it has one."
        ),
    ] = None,
) -> None:
    """Serve a running server's tools over MCP on the standard input and output."""
    import asyncio

    from engram.agents.mcp_bridge import serve_stdio

    try:
        asyncio.run(serve_stdio(url, api_key))
    except Exception as error:
        reason: BaseException = error
        # What fails inside a task group comes wrapped.
        while inner := getattr(reason, "exceptions", None):
            reason = inner[0]
        hint = "is it a server with --enable-agent-tools, and is --api-key its key?"
        typer.echo(f"engram: error: {url}: {type(reason).__name__}: {reason} ({hint})", err=True)
        raise typer.Exit(2) from None
