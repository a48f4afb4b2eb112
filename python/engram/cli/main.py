"""The `engram` command: one subcommand a module."""

from __future__ import annotations

from typing import Annotated

import typer

from engram.cli import doctor, fsck, gc, keys, mcp, retention, size, transfer
from engram.version import __version__

app = typer.Typer(
    name="engram",
    help="Look after an Engram installation and its snapshot stores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor.doctor)
app.command("export")(transfer.export)
app.command("fsck")(fsck.fsck)
app.command("gc")(gc.gc)
app.command("import")(transfer.import_)
app.command("mcp")(mcp.mcp)
app.command("retention")(retention.retention)
app.command("size")(size.size)
app.add_typer(keys.app, name="key")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def engram(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look after an Engram installation and its snapshot stores."""


if __name__ == "__main__":
    app()
