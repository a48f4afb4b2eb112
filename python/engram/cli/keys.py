"""`engram key`: make a key for encryption at rest, and put a store under another one.

Commands that read a store's segments take `KeyFileOption` and give it to `key_of`; those that
change a store and store nothing in it, to `key_of_store`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram.cli.failing import told
from engram.store.filesystem import FileSystem
from engram.store.keyring import rotate, sealed_by
from engram.store.keys import Key, find_key, new_key, read_key_file, write_key_file
from engram.store.layout import Layout

KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file", help="Key of an encrypted store; without it ENGRAM_SNAPSHOT_KEY, if set."
    ),
]

app = typer.Typer(help="Keys for encryption at rest.", no_args_is_help=True)


def key_of(key_file: Path | None) -> Key | None:
    """The key an operator has given in a file or in the environment; None where there is none.

    Raises `EncryptionKeyError`.
    """
    return find_key(key_file)


def key_of_store(root: Path, key_file: Path | None) -> Key | None:
    """`key_of`, for a command that only looks after a store: None for one that is in the clear.

    Opened with a key, that one would be encrypted from then on, which nothing takes back.
    Raises as `key_of` and `sealed_by`.
    """
    key = key_of(key_file)
    return key if sealed_by(Layout(root), FileSystem()) is not None else None


@app.command("new")
def new(file: Annotated[Path, typer.Argument(help="Where to write it; must not exist.")]) -> None:
    """Make a key, in a file that its owner alone can read."""
    with told():
        key = new_key()
        write_key_file(file, key)
    typer.echo(f"key {key.fingerprint} is in {file}; keep a copy: without it nothing can be read")


@app.command("show")
def show(file: Annotated[Path, typer.Argument(help="A key file.")]) -> None:
    """Print the fingerprint of a key: what errors and `engram doctor` call it by."""
    with told():
        typer.echo(read_key_file(file).fingerprint)


@app.command("rotate")
def rotate_key(
    directory: Annotated[Path, typer.Option("--dir", help="A store: --snapshot-dir.")],
    old: Annotated[Path, typer.Option("--old", help="File of the key it has.")],
    new: Annotated[Path, typer.Option("--new", help="File of the key it gets.")],
) -> None:
    """Put a store under another key; no segment is rewritten. No server may use it meanwhile."""
    with told():
        new_key = read_key_file(new)
        keyring = rotate(directory, read_key_file(old), new_key)
    typer.echo(
        f"{directory} is under key {new_key.fingerprint} now ({len(keyring)} data keys); "
        "the old key opens older copies of its keyring only"
    )
