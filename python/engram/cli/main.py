"""The `engram` command: one subcommand a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from engram.cli import agents, doctor, fsck, gc, keys, mcp, retention, size, transfer
from engram.cli.remote import (
    changing,
    comparing,
    explaining,
    looking,
    naming,
    talking,
    watching,
)
from engram.version import __version__

HELP = "Talk with a server, and look after an Engram installation and its snapshot stores."
SERVER = "A running server"
STORE = "Stores and installations"

app = typer.Typer(
    name="engram",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
SERVER_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": looking.ls,
    "show": looking.show,
    "tree": looking.tree,
    "diff": comparing.diff,
    "explain": explaining.explain,
    "save": changing.save,
    "restore": changing.restore,
    "branch": changing.branch,
    "rm": changing.rm,
    "pin": changing.pin,
    "chat": talking.chat,
    "top": watching.top,
}
STORE_COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": doctor.doctor,
    "export": transfer.export,
    "fsck": fsck.fsck,
    "gc": gc.gc,
    "import": transfer.import_,
    "mcp": mcp.mcp,
    "retention": retention.retention,
    "size": size.size,
}
for panel, commands in ((SERVER, SERVER_COMMANDS), (STORE, STORE_COMMANDS)):
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(naming.app, name="prefix", rich_help_panel=SERVER)
app.add_typer(keys.app, name="key", rich_help_panel=STORE)
app.add_typer(agents.app, name="agents", rich_help_panel=STORE)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(help=HELP)
def engram(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Talk with a server, and look after stores."""


if __name__ == "__main__":
    app()
