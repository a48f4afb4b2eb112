"""`engram ls`, `engram show`, `engram tree`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree as RichTree

from engram.cli.remote.connection import URL, JsonOption, KeyOption, UrlOption, answer, connected
from engram.cli.remote.connection import console as new_console
from engram.cli.remote.places import PlaceArgument, branch_in, snapshot_at
from engram.cli.remote.tables import conversations_table, moment, snapshots_table, spoken
from engram.cli.size import shown
from engram.client import EngramClient
from engram.client.results import ConversationSummary, Snapshot, SnapshotSummary, Tree

PAGE = 500
WhichArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CONVERSATION", help=escape("CONVERSATION[/BRANCH]: its snapshots alone.")
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Show so many. [all]")]
TextOption = Annotated[bool, typer.Option("--text", help="Also its recorded tokens as text.")]


def ls(
    which: WhichArgument = None,
    limit: LimitOption = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List conversations, or the snapshots of one."""
    with connected(url, api_key, as_json) as client:
        if which is None:
            conversations, more = _conversations(client, limit)
            if as_json:
                found = [one.model_dump(mode="json") for one in conversations]
                answer({"conversations": found, "more": more}, True)
                return
            new_console().print(conversations_table(conversations))
        else:
            snapshots, more = _snapshots(client, which, limit)
            if as_json:
                found = [one.model_dump(mode="json") for one in snapshots]
                answer({"snapshots": found, "more": more}, True)
                return
            new_console().print(snapshots_table(snapshots))
        if more:
            new_console().print("there are more; raise --limit")


def show(
    place: PlaceArgument,
    text: TextOption = False,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a snapshot."""
    with connected(url, api_key, as_json) as client:
        snapshot = snapshot_at(client, place)
        words = None
        if text and snapshot.fill_ids:
            (words,) = client.texts([snapshot.fill_ids])
        if as_json:
            report: dict[str, Any] = snapshot.model_dump(mode="json")
            answer(report | ({"text": words} if text else {}), True)
            return
        new_console().print(_described(snapshot))
        if words is not None:
            new_console().print(f"\n{escape(spoken(words))}")


def tree(
    conversation: Annotated[str, typer.Argument(metavar="CONVERSATION", help="A conversation.")],
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the turns and branches of a conversation."""
    with connected(url, api_key, as_json) as client:
        found = client.tree(conversation)
        if as_json:
            answer(found, True)
        else:
            new_console().print(_drawn(found))


def _conversations(
    client: EngramClient, limit: int | None
) -> tuple[list[ConversationSummary], bool]:
    found: list[ConversationSummary] = []
    after = None
    while True:
        page = client.list_conversations(_page(limit, len(found)), after)
        found += page.conversations
        after = page.after
        if after is None or len(found) == limit:
            return found, after is not None


def _snapshots(
    client: EngramClient, which: str, limit: int | None
) -> tuple[list[SnapshotSummary], bool]:
    named = branch_in(which)
    if named.bare:
        # An unknown one is an error, not an empty list.
        client.get_conversation(named.conversation_id)
        branch = None
    else:
        client.find_snapshot(named.conversation_id, None, named.branch_name)
        branch = named.branch_name
    found: list[SnapshotSummary] = []
    after = None
    while True:
        page = client.list_snapshots(named.conversation_id, branch, _page(limit, len(found)), after)
        found += page.snapshots
        after = page.after
        if after is None or len(found) == limit:
            return found, after is not None


def _page(limit: int | None, have: int) -> int:
    return PAGE if limit is None else min(PAGE, limit - have)


def _described(one: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    rows = [
        ("snapshot", one.snapshot_id),
        ("conversation", f"{one.conversation_id}/{one.branch_name}, turn {one.turn_number}"),
        ("goes on from", one.parent_snapshot or "nothing"),
        ("saved", f"{moment(one.created_at)}, {one.durability}"),
        ("tokens", f"{one.token_count:,} covered, {one.recompute_tokens} more recorded"),
        ("size", f"{shown(one.bytes)}, {shown(one.unique_bytes)} of its own"),
        ("tier", one.tier),
        ("model", f"{one.model_name} ({one.layer_config.model_type})"),
        ("namespace", one.namespace),
        ("pinned", "yes" if one.pinned else "no"),
        ("expires", "never" if one.expires_at is None else moment(one.expires_at)),
        ("request", one.rid or "unknown"),
    ]
    if one.user_metadata:
        rows.append(("metadata", str(one.user_metadata)))
    for name, value in (("health", one.health), ("damaged", one.damaged)):
        if value is not None:
            rows.append((name, value))
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _drawn(tree: Tree) -> RichTree:
    """The turns of a branch stand below one another; a branch is indented below its start."""
    drawing = RichTree(f"[bold]{escape(tree.conversation_id)}[/]")
    nodes: dict[str, RichTree] = {}
    columns: dict[str, RichTree] = {}
    branches = {one.snapshot_id: one.branch_name for one in tree.snapshots}
    for one in tree.snapshots:
        parent = one.parent_snapshot
        if parent is None or parent not in nodes:
            column = drawing
        elif branches[parent] == one.branch_name:
            column = columns[parent]
        else:
            column = nodes[parent]
        columns[one.snapshot_id] = column
        nodes[one.snapshot_id] = column.add(_turn(one))
    return drawing


def _turn(one: SnapshotSummary) -> str:
    pinned = " [bold]pinned[/]" if one.pinned else ""
    return (
        f"turn {one.turn_number} [dim]{escape(one.branch_name)}[/] {one.token_count:,} tokens "
        f"[dim]{escape(one.snapshot_id)}[/]{pinned}"
    )
