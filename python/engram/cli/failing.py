"""How a command ends that cannot do what it was asked: one line, its hint, status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError

from engram.core.settings import Settings
from engram.errors import EngramError, InvalidRequestError


@contextmanager
def told() -> Iterator[None]:
    """Turn an error of the tree into a line on the standard error and exit status 2."""
    try:
        yield
    except EngramError as error:
        typer.echo(f"engram: error: {error}", err=True)
        raise typer.Exit(2) from None


def settings_from(**given: object) -> Settings:
    """The server's settings with some of them given; None stands for the server's default.

    Raises `InvalidRequestError` naming the flag that is out of bounds.
    """
    try:
        return Settings.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise InvalidRequestError(f"{option}: {problem['msg']}") from None
