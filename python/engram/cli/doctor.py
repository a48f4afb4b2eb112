"""`engram doctor`: is this installation, and this store, as it should be."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.cli.store_health import StoreHealth, store_health
from engram.core.settings import Settings

if TYPE_CHECKING:
    from engram.sglang_plugin.report import SeamReport


def doctor(
    snapshot_dir: Annotated[
        Path | None,
        typer.Option(
            help="Store to look at; without it the server's default, if there is one here."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check versions, hooks, kernels and a snapshot store; exit with 1 if something is wrong."""
    with warnings.catch_warnings():
        # SGLang's remarks on hardware that is not here.
        warnings.simplefilter("ignore")
        logging.getLogger("sglang").setLevel(logging.ERROR)
        from engram.sglang_plugin.report import seam_report

        seam = seam_report()
    store = _store(snapshot_dir)
    problems = [*seam.problems, *(store.problems if store else ())]
    if as_json:
        body = asdict(seam) | {
            "store": asdict(store) if store else None,
            "problems": problems,
            "healthy": not problems,
        }
        typer.echo(json.dumps(body, indent=2))
    else:
        _show(Console(highlight=False, soft_wrap=True), seam, store, problems)
    raise typer.Exit(1 if problems else 0)


def _store(snapshot_dir: Path | None) -> StoreHealth | None:
    if snapshot_dir is not None:
        return store_health(snapshot_dir)
    default = Path(Settings().snapshot_dir)
    return store_health(default) if default.is_dir() else None


def _show(
    console: Console, seam: SeamReport, store: StoreHealth | None, problems: list[str]
) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    applied = sum(hook.applied for hook in seam.hooks)
    rows = [
        ("engram", seam.engram),
        ("sglang", f"{seam.sglang} (supported: {seam.sglang_supported})"),
        ("torch", seam.torch),
        ("python", seam.python),
        ("device", seam.device),
        ("page hashing", seam.page_hash),
        ("hooks applied", f"{applied} of {len(seam.hooks)}"),
    ]
    rows += [("", f"{hook.kind} {hook.target}") for hook in seam.hooks]
    rows.append(("CPU kernels", f"{len(seam.kernels)} names replaced"))
    rows += [("", name) for name in seam.kernels]
    rows += _store_rows(store)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    for problem in problems:
        console.print(f"[bold red]problem:[/] {escape(problem)}")
    if not problems:
        console.print("[bold green]all is well[/]")


def _store_rows(store: StoreHealth | None) -> list[tuple[str, str]]:
    if store is None:
        return [("store", "none here; name one with --snapshot-dir")]
    rows = [("store", store.directory)]
    if not store.marker:
        return rows
    free = "unknown" if store.free_bytes is None else f"{store.free_bytes / 1e9:.1f} GB"
    return [
        *rows,
        ("", f"marker {store.marker}; in use by {store.in_use_by or 'no server'}"),
        ("", f"keyring: {store.keyring}"),
        ("", f"{store.snapshots or 0} snapshots of {store.conversations or 0} conversations"),
        (
            "",
            f"{store.segments} segments, {store.segment_bytes / 1e6:.1f} MB; {free} free; "
            f"{store.quarantined} files in quarantine",
        ),
    ]
