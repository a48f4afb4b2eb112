"""`engram prefix`: beginnings of prompts that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from engram.cli.remote.connection import URL, JsonOption, KeyOption, UrlOption, answer, connected
from engram.cli.remote.connection import console as new_console
from engram.cli.remote.tables import moment, table_of
from engram.cli.size import shown
from engram.client.results import Prefix
from engram.errors import InvalidRequestError

PAGE = 500
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the prefix.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="A system prompt.")]
TextOption = Annotated[str | None, typer.Option("--text", help="The beginning of a text.")]
FileOption = Annotated[
    Path | None,
    typer.Option("--text-file", exists=True, dir_okay=False, help="A file with that text, UTF-8."),
]

app = typer.Typer(help="Beginnings of prompts that are computed once.", no_args_is_help=True)


@app.command()
def add(
    name: NameArgument,
    system: SystemOption = None,
    text: TextOption = None,
    text_file: FileOption = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute a prefix, store it and pin it."""
    with connected(url, api_key, as_json) as client:
        if sum(one is not None for one in (system, text, text_file)) != 1:
            raise InvalidRequestError("give one of --system, --text and --text-file")
        if text_file is not None:
            text = _read(text_file)
        messages = None if system is None else [{"role": "system", "content": system}]
        made = client.create_prefix(name, messages=messages, text=text)
        answer(made, as_json, f"{made.name}: {made.token_count} tokens, {shown(made.bytes)}")


@app.command()
def ls(url: UrlOption = URL, api_key: KeyOption = None, as_json: JsonOption = False) -> None:
    """List the prefixes."""
    with connected(url, api_key, as_json) as client:
        found: list[Prefix] = []
        after = None
        while True:
            page = client.list_prefixes(PAGE, after)
            found += page.prefixes
            after = page.after
            if after is None:
                break
        if as_json:
            answer({"prefixes": [one.model_dump(mode="json") for one in found]}, True)
            return
        table = table_of("prefix", "tokens", "size", "made", "", right=("tokens", "size"))
        for one in found:
            note = "" if one.usable else "of another model"
            cells = (f"{one.token_count:,}", shown(one.bytes), moment(one.created_at), note)
            table.add_row(escape(one.name), *cells)
        new_console().print(table)


@app.command()
def rm(
    name: NameArgument,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a prefix; no conversation loses anything."""
    with connected(url, api_key, as_json) as client:
        gone = client.delete_prefix(name)
        answer(gone, as_json, gone.message)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from None
