"""`engram diff`: where two snapshots part, what each goes on with, and what they share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from engram.cli.remote.connection import URL, JsonOption, KeyOption, UrlOption, answer, connected
from engram.cli.remote.connection import console as new_console
from engram.cli.remote.places import SHAPE_HELP, snapshot_at
from engram.cli.remote.tables import spoken
from engram.cli.size import shown
from engram.client.results import Comparison, Snapshot
from engram.errors import SnapshotCorruptError

ContextOption = Annotated[
    int, typer.Option("--context", min=0, help="Tokens shown before the place where they part.")
]
OneArgument = Annotated[str, typer.Argument(metavar="A", help=SHAPE_HELP)]
OtherArgument = Annotated[str, typer.Argument(metavar="B", help="The same.")]


def diff(
    one: OneArgument,
    other: OtherArgument,
    context: ContextOption = 20,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where two snapshots part, their texts side by side, and the bytes they share."""
    with connected(url, api_key, as_json) as client:
        both = [snapshot_at(client, place) for place in (one, other)]
        tokens = [_tokens(snapshot) for snapshot in both]
        found = client.compare(both[0].snapshot_id, both[1].snapshot_id)
        common = found.common_tokens
        before, *own = client.texts(
            [tokens[0][max(0, common - context) : common], *(ids[common:] for ids in tokens)]
        )
        if as_json:
            answer(_report(found, tokens, before, own), True)
            return
        _show(found, tokens, before, own, cut=common > context)


def _tokens(snapshot: Snapshot) -> list[int]:
    if snapshot.fill_ids is None:
        raise SnapshotCorruptError(
            f"the tokens of {snapshot.snapshot_id!r} cannot be read: {snapshot.damaged}",
            hint="engram fsck says more",
        )
    return snapshot.fill_ids


def _report(
    found: Comparison, tokens: list[list[int]], before: str, own: list[str]
) -> dict[str, Any]:
    return {
        "common_tokens": found.common_tokens,
        "common_end": before,
        "shared_bytes": found.shared_bytes,
        "snapshots": [
            {
                "snapshot_id": one.snapshot_id,
                "conversation_id": one.conversation_id,
                "branch_name": one.branch_name,
                "turn_number": one.turn_number,
                "bytes": one.bytes,
                "tokens": len(ids),
                "own_tokens": len(ids) - found.common_tokens,
                "own_text": text,
            }
            for one, ids, text in zip(found.snapshots, tokens, own, strict=True)
        ],
    }


def _show(
    found: Comparison, tokens: list[list[int]], before: str, own: list[str], cut: bool
) -> None:
    console = new_console()
    common = found.common_tokens
    if all(len(ids) == common for ids in tokens):
        console.print(f"both have the same {common:,} tokens")
    else:
        console.print(f"the first {common:,} tokens are the same, up to:")
        console.print(escape(("..." if cut else "") + spoken(before)), style="dim")
        table = Table(show_lines=True)
        for one in found.snapshots:
            place = f"{one.conversation_id}/{one.branch_name}@{one.turn_number}"
            table.add_column(escape(place), overflow="fold", ratio=1)
        table.add_row(*(escape(spoken(text)) or "[dim](nothing more)[/]" for text in own))
        table.add_row(*(f"{len(ids) - common:,} tokens of its own" for ids in tokens))
        console.print(table)
    sizes = " and ".join(shown(one.bytes) for one in found.snapshots)
    console.print(f"{shown(found.shared_bytes)} of {sizes} are shared")
