"""`engram top`: what the tiers hold, live."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engram.cli.remote.connection import URL, JsonOption, KeyOption, UrlOption, connected
from engram.cli.remote.connection import console as new_console
from engram.cli.remote.tables import moment, spoken, table_of
from engram.cli.size import shown
from engram.client import EngramClient
from engram.client.results import Tiers

IntervalOption = Annotated[
    float, typer.Option("--interval", min=0.1, help="Seconds from one look to the next.")
]
CountOption = Annotated[
    int | None, typer.Option("--count", min=1, help="Look so often. [for ever]")
]


def top(
    interval: IntervalOption = 1.0,
    count: CountOption = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what VRAM, RAM and disk hold, again and again; Ctrl-C ends it.

    With --json, one JSON object a line.
    """
    with connected(url, api_key, as_json) as client:
        if as_json:
            for _ in _looks(interval, count):
                typer.echo(json.dumps(_report(client)))
            return
        console = new_console()
        if not console.is_terminal:
            for _ in _looks(interval, count):
                console.print(_drawn(client))
            return
        with Live(console=console, auto_refresh=False) as live:
            for _ in _looks(interval, count):
                live.update(_drawn(client), refresh=True)


def _looks(interval: float, count: int | None) -> Any:
    done = 0
    while True:
        yield done
        done += 1
        if done == count:
            return
        time.sleep(interval)


def _report(client: EngramClient) -> dict[str, Any]:
    health = client.health()
    return {
        "at": time.time(),
        "tiers": client.tiers().model_dump(mode="json"),
        "service": health["service"],
        "queues": health["queues"],
    }


def _drawn(client: EngramClient) -> Group:
    tiers, health = client.tiers(), client.health()
    service, queues = health["service"], health["queues"]
    lines = [
        f"saves {service['saves']} ({service['save_failures']} failed), "
        f"restores {service['restores']} ({service['restore_failures']} failed), "
        f"corrupt {service['corrupt']}",
        f"now: {queues['saves_running']} saves running, {queues['saves_waiting']} waiting, "
        f"{queues['automatic_saves_waiting']} automatic, {queues['requests_held']} requests held",
    ]
    pins = [f"{one.conversation_id}/{one.branch_name}" for one in tiers.vram.pins]
    if pins:
        lines.append("pinned in VRAM: " + ", ".join(pins))
    lines += [f"failed: {what}" for what in service["last_failures"][-3:]]
    header = Text(f"{client.url}  {moment(time.time())}", style="bold")
    return Group(header, _table(tiers), Text(spoken("\n".join(lines))))


def _table(tiers: Tiers) -> Table:
    table = table_of("tier", "used", "of", "full", "holds", right=("used", "of", "full"))
    vram, ram, disk = tiers.vram, tiers.ram, tiers.disk
    rows = [
        ("vram", vram.bytes, vram.capacity_bytes, f"{vram.tokens:,} tokens, {vram.states} states"),
        ("ram", ram.bytes, ram.capacity_bytes,
         f"{ram.segments} segments, {ram.conversations} conversations"),
        ("disk", disk.bytes, disk.capacity_bytes,
         f"{disk.snapshots} snapshots, {disk.conversations} conversations"),
    ]  # fmt: skip
    for name, used, capacity, holds in rows:
        full = f"{used / capacity:.0%}" if capacity else ""
        table.add_row(name, shown(used), shown(capacity) if capacity else "no quota", full, holds)
    return table
