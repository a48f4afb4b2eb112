"""What names a snapshot on the command line: its id, or CONVERSATION[/BRANCH][@TURN].

Neither "/" nor "@" can be in an id, so that nothing is meant by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape

from engram.client import EngramClient
from engram.client.results import Snapshot
from engram.core.ids import DEFAULT_BRANCH, check_id
from engram.errors import InvalidRequestError, NotFoundError

SHAPE = "SNAPSHOT or CONVERSATION[/BRANCH][@TURN]"
SHAPE_HELP = escape(SHAPE)
PlaceArgument = Annotated[
    str, typer.Argument(metavar="ID", help=f"{SHAPE_HELP}; without a turn the newest.")
]
BranchArgument = Annotated[
    str, typer.Argument(metavar="CONVERSATION", help=escape("CONVERSATION[/BRANCH]"))
]


@dataclass(frozen=True)
class Named:
    """What was written: `bare` if it may be the id of a snapshot as well."""

    conversation_id: str
    branch_name: str
    turn: int | None
    bare: bool

    def __str__(self) -> str:
        turn = "" if self.turn is None else f"@{self.turn}"
        return f"{self.conversation_id}/{self.branch_name}{turn}"


def parse(text: str) -> Named:
    """Read a place.  `InvalidRequestError` for anything else."""
    rest, at, number = text.partition("@")
    conversation, slash, branch = rest.partition("/")
    if at and not (number.isascii() and number.isdecimal() and 0 < len(number) < 19):
        raise InvalidRequestError(f"{text!r}: behind @ stands the number of a turn", hint=SHAPE)
    return Named(
        check_id("the conversation", conversation),
        check_id("the branch", branch) if slash else DEFAULT_BRANCH,
        int(number) if at else None,
        bare=not (at or slash),
    )


def branch_in(text: str) -> Named:
    """Read a place without a turn."""
    named = parse(text)
    if named.turn is not None:
        raise InvalidRequestError(f"{text!r}: a turn means nothing here")
    return named


def snapshot_at(client: EngramClient, text: str) -> Snapshot:
    """The snapshot that is meant: of that id, or of a conversation's turn."""
    named = parse(text)
    if named.bare:
        try:
            return client.get_snapshot(named.conversation_id)
        except NotFoundError:
            pass
        try:
            return client.find_snapshot(named.conversation_id)
        except NotFoundError as error:
            raise NotFoundError(
                f"neither a snapshot nor a saved conversation {named.conversation_id!r}",
                hint=error.hint or "engram ls shows what there is",
            ) from None
    return client.find_snapshot(named.conversation_id, named.turn, named.branch_name)
