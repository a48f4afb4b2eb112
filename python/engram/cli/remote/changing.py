"""`engram save`, `engram restore`, `engram branch`, `engram rm`, `engram pin`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from engram.cli.remote.connection import (
    URL,
    JsonOption,
    KeyOption,
    UrlOption,
    answer,
    connected,
)
from engram.cli.remote.places import SHAPE_HELP, PlaceArgument, branch_in, parse, snapshot_at
from engram.cli.size import shown
from engram.errors import InvalidRequestError

TurnArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CONVERSATION",
        help=escape("CONVERSATION[/BRANCH][@TURN]; without a turn the newest."),
    ),
]
RidOption = Annotated[str | None, typer.Option("--rid", help="A finished request, by its id.")]
IdOption = Annotated[str | None, typer.Option("--id", help="Name of the snapshot. [made]")]
AsyncOption = Annotated[
    bool, typer.Option("--async", help="Do not wait until the snapshot is durable.")
]
NameArgument = Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the new branch.")]
NewOption = Annotated[
    str | None, typer.Option("--conversation", help="Start this new conversation instead.")
]
PlacesArgument = Annotated[list[str], typer.Argument(metavar="ID...", help=SHAPE_HELP)]
RecursiveOption = Annotated[
    bool, typer.Option("-r", "--recursive", help="Whole conversations, with all their branches.")
]
YesOption = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
OffOption = Annotated[bool, typer.Option("--off", help="Undo it.")]
VramOption = Annotated[
    bool, typer.Option("--vram", help="Keep the branch's newest state in VRAM instead.")
]


def save(
    place: TurnArgument = None,
    rid: RidOption = None,
    snapshot_id: IdOption = None,
    wait_not: AsyncOption = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a turn durable."""
    with connected(url, api_key, as_json) as client:
        named = None if place is None else parse(place)
        if named is None and rid is None:
            raise InvalidRequestError("name a conversation or a --rid")
        if named is not None and rid is not None and named.turn is not None:
            raise InvalidRequestError("a request becomes the next turn: leave @TURN out")
        saved = client.save(
            named.conversation_id if named else None,
            rid=rid,
            snapshot_id=snapshot_id,
            turn_number=named.turn if named else None,
            branch_name=None if named is None or named.bare else named.branch_name,
            durability="async" if wait_not else None,
        )
        answer(saved, as_json, f"{saved.snapshot_id}: {saved.message}")


def restore(
    place: PlaceArgument,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a snapshot into memory, verified, for the next turn."""
    with connected(url, api_key, as_json) as client:
        one = snapshot_at(client, place)
        done = client.restore(
            one.conversation_id, turn_number=one.turn_number, branch_name=one.branch_name
        )
        line = f"{done.message}, now in {done.tier}; {shown(done.bytes)} verified"
        answer(done, as_json, line)


def branch(
    place: PlaceArgument,
    name: NameArgument = None,
    conversation: NewOption = None,
    snapshot_id: IdOption = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a branch at a snapshot, or a new conversation; no state is copied."""
    with connected(url, api_key, as_json) as client:
        if name is None and conversation is None:
            raise InvalidRequestError("give the NAME of a branch, or a --conversation")
        made = client.branch(
            snapshot_at(client, place).snapshot_id,
            branch_name=name,
            conversation_id=conversation,
            new_snapshot_id=snapshot_id,
        )
        line = f"{made.snapshot_id}: {made.conversation_id}/{made.branch_name} starts at turn "
        answer(made, as_json, f"{line}{made.turn_number}")


def rm(
    places: PlacesArgument,
    recursive: RecursiveOption = False,
    yes: YesOption = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete snapshots, or with -r whole conversations."""
    with connected(url, api_key, as_json) as client:
        conversations, snapshots = [], []
        for place in places:
            if recursive:
                named = branch_in(place)
                if not named.bare:
                    raise InvalidRequestError(f"{place!r}: -r deletes whole conversations")
                conversations.append(client.get_conversation(named.conversation_id))
            elif parse(place).bare:
                # Never by chance the newest turn of a conversation that is called so.
                snapshots.append(client.get_snapshot(place))
            else:
                snapshots.append(snapshot_at(client, place))
        count = len(snapshots) + sum(one.snapshots for one in conversations)
        if not (yes or _confirmed(count)):
            raise typer.Exit(1)
        gone = [client.delete_snapshot(one.snapshot_id).snapshot_id for one in snapshots]
        emptied = [client.delete_conversation(one.conversation_id) for one in conversations]
        report = {
            "snapshots": gone,
            "conversations": [one.model_dump(mode="json") for one in emptied],
        }
        answer(report, as_json, f"deleted {len(gone) + sum(one.snapshots for one in emptied)}")


def pin(
    place: PlaceArgument,
    off: OffOption = False,
    vram: VramOption = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exempt a snapshot from retention, or keep a branch in VRAM."""
    with connected(url, api_key, as_json) as client:
        if not vram:
            changed = client.update_snapshot(snapshot_at(client, place).snapshot_id, pinned=not off)
            what = "is pinned" if changed.pinned else "is not pinned"
            answer(changed, as_json, f"{changed.snapshot_id} {what}")
            return
        named = branch_in(place)
        if off:
            gone = client.unpin(named.conversation_id, named.branch_name)
            answer(gone, as_json, gone.message)
        else:
            kept = client.pin(named.conversation_id, named.branch_name)
            answer(kept, as_json, kept.message)


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise InvalidRequestError("nobody is there to ask", hint="say --yes")
    return typer.confirm(f"Delete {count} snapshots?", err=True)
