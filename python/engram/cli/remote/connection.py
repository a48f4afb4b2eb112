"""The server that a command talks to, and how commands that talk to one end.

| exit status | when |
|---|---|
| 0 | it was done |
| 1 | the server refused it, or it could not be done |
| 2 | the command line is wrong |
| 3 | the server gave no answer |
| 4 | no such conversation, branch, turn, snapshot or request |
| 130 | Ctrl-C |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from engram.client import EngramClient
from engram.client.transport import DEFAULT_URL
from engram.errors import EngramError, InvalidRequestError, NotFoundError, ServerUnreachableError

UrlOption = Annotated[str, typer.Option("--url", envvar="ENGRAM_URL", help="The server's address.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="ENGRAM_API_KEY",
        show_envvar=True,
        help="Its API key, or its admin API key if it has one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
URL: Final = DEFAULT_URL

REFUSED: Final = 1
MISUSED: Final = 2
UNREACHABLE: Final = 3
NOT_FOUND: Final = 4
INTERRUPTED: Final = 130


@contextmanager
def connected(url: str, api_key: str | None, as_json: bool) -> Iterator[EngramClient]:
    """A client; what goes wrong within ends the command with a line, or as JSON, on stderr."""
    try:
        with EngramClient(url, api_key=api_key) as client:
            yield client
    except EngramError as error:
        if as_json:
            typer.echo(json.dumps(error.to_dict(), indent=2), err=True)
        else:
            typer.echo(f"engram: error: {error}", err=True)
        raise typer.Exit(status_of(error)) from None
    except KeyboardInterrupt:
        typer.echo(err=True)
        raise typer.Exit(INTERRUPTED) from None


def status_of(error: EngramError) -> int:
    """The exit status of a command that ended with this error."""
    if isinstance(error, ServerUnreachableError):
        return UNREACHABLE
    if isinstance(error, NotFoundError):
        return NOT_FOUND
    # What the server finds wrong has its status; what this side finds wrong was misused.
    if isinstance(error, InvalidRequestError) and "status" not in error.details:
        return MISUSED
    return REFUSED


def answer(report: Any, as_json: bool, line: str = "") -> None:
    """Print a result as JSON, or in one line for people."""
    if as_json:
        data = report.model_dump(mode="json") if isinstance(report, BaseModel) else report
        typer.echo(json.dumps(data, indent=2))
    elif line:
        console().print(escape(line))


def console() -> Console:
    """Where results go."""
    return Console(highlight=False, soft_wrap=True)
