"""`engram agents`: look after what agents keep in a store that no server uses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from engram.agents.database import AGENT_FILE, AgentDatabase
from engram.agents.owners import HandedOn, hand_on, owner_of_key
from engram.cli.failing import told
from engram.cli.options import StoreOption
from engram.errors import InvalidRequestError, NotFoundError
from engram.store.layout import Layout
from engram.store.lock import StoreLock

app = typer.Typer(help="What agents remember, and their runs.", no_args_is_help=True)


@app.callback()
def agents() -> None:
    """Keep typer from making the only command the whole group."""


@app.command("rekey")
def rekey(
    directory: StoreOption,
    old: Annotated[
        Path | None,
        typer.Option("--old", help="File with the API key it had; none if it had no key."),
    ] = None,
    new: Annotated[
        Path | None,
        typer.Option("--new", help="File with the API key it gets; none if it gets no key."),
    ] = None,
) -> None:
    """Give the memories and runs of one API key to another. No server may use the store.

    The admin API key where the server has one: it is what agents are asked for then.
    """
    with told():
        owners = [owner_of_key(_key_in(file)) for file in (old, new)]
        root = directory.absolute()
        path = root / AGENT_FILE
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist", hint="name a --snapshot-dir with agents")
        lock = StoreLock.acquire(Layout(root).lock)
        try:
            done = asyncio.run(_hand_on(path, *owners))
        finally:
            lock.release()
    typer.echo(f"{done.memories} memories and {done.runs} runs belong to the new key now")


async def _hand_on(path: Path, old: str, new: str) -> HandedOn:
    database = AgentDatabase(path)
    try:
        return await hand_on(database, old, new)
    finally:
        database.close()


def _key_in(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{file} cannot be read: {error}") from None
    if not key:
        raise InvalidRequestError(f"{file} is empty", hint="it has to hold an API key")
    return key
