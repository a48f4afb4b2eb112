"""How snapshots, sizes and times are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from rich.markup import escape
from rich.table import Table

from engram.cli.size import shown
from engram.client.results import ConversationSummary, SnapshotSummary

CONTROLS: Final = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def moment(seconds: float) -> str:
    """Local time; `seconds` since the epoch."""
    try:
        found = datetime.fromtimestamp(seconds).astimezone()
    except (ValueError, OverflowError, OSError):
        return "after the year 9999"  # what the server takes is more than a calendar has
    return found.strftime("%Y-%m-%d %H:%M:%S")


def spoken(text: str) -> str:
    """What a model or a user has said, as it may be shown: at a terminal no character of it moves
    the cursor, changes colours or does anything else but stand there."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def table_of(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        # Folded, not cut: an id that lost its end names nothing.
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def conversations_table(conversations: Iterable[ConversationSummary]) -> Table:
    """Conversations, one a row."""
    right = ("turns", "branches", "snapshots", "size")
    table = table_of("conversation", "turns", "branches", "snapshots", "size", "saved", right=right)
    for one in conversations:
        table.add_row(
            escape(one.conversation_id),
            str(one.newest_turn),
            str(one.branches),
            str(one.snapshots),
            shown(one.bytes),
            moment(one.updated_at),
        )
    return table


def snapshots_table(snapshots: Iterable[SnapshotSummary]) -> Table:
    """Snapshots, one a row."""
    right = ("turn", "tokens", "size", "of its own")
    columns = ("snapshot", "branch", "turn", "tokens", "size", "of its own", "saved", "")
    table = table_of(*columns, right=right)
    for one in snapshots:
        table.add_row(
            escape(one.snapshot_id),
            escape(one.branch_name),
            str(one.turn_number),
            f"{one.token_count:,}",
            shown(one.bytes),
            shown(one.unique_bytes),
            moment(one.created_at),
            "pinned" if one.pinned else "",
        )
    return table
