"""`engram fsck`: is every byte of a store what it should be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from engram.cli.failing import told
from engram.cli.keys import KeyFileOption, key_of, key_of_store
from engram.cli.options import JsonOption, StoreOption, progress
from engram.cli.size import shown
from engram.errors import NotFoundError
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.inspection import is_store
from engram.store.layout import Layout
from engram.store.marker import check_marker
from engram.store.reading import SweepingFileSystem, open_for_reading
from engram.upkeep.check import StoreChecker
from engram.upkeep.exporting import OnBytes, nobody
from engram.upkeep.findings import StoreCheck

RepairOption = Annotated[
    bool,
    typer.Option(
        "--repair", help="Quarantine what is damaged and mend the catalog; no server may run."
    ),
]
SHOWN_SNAPSHOTS = 5


class Meter:
    """Passes on how much was read, once somebody watches."""

    def __init__(self) -> None:
        self.on_bytes: OnBytes = nobody

    def __call__(self, count: int) -> None:
        self.on_bytes(count)


def fsck(
    directory: StoreOption,
    repair: RepairOption = False,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify every file of a store and how they fit together; exit with 1 if one is damaged."""
    root = directory.absolute()
    with told():
        if not root.is_dir() or not is_store(root):
            raise NotFoundError(f"{root} is no snapshot store", hint="name a --snapshot-dir")
        marker = check_marker(Layout(root), FileSystem()).value
        meter = Meter()
        if repair:
            key = key_of_store(root, key_file)
            with DiskStore.open(root, fs=SweepingFileSystem(meter), key=key) as store:
                check = _run(StoreChecker(store, repair=True, marker=marker), meter)
        else:
            store = open_for_reading(root, meter, key=key_of(key_file))
            check = _run(StoreChecker(store, repair=False, marker=marker), meter)
    if as_json:
        typer.echo(json.dumps({"healthy": check.healthy, **asdict(check)}, indent=2))
    else:
        _show(Console(highlight=False, soft_wrap=True), check)
    raise typer.Exit(0 if check.healthy else 1)


def _run(checker: StoreChecker, meter: Meter) -> StoreCheck:
    with progress("verifying", checker.total_bytes) as on_bytes:
        meter.on_bytes = on_bytes
        return checker.run()


def _show(console: Console, check: StoreCheck) -> None:
    user = f", in use by {check.in_use_by}" if check.in_use_by else ""
    console.print(f"[bold]{escape(check.directory)}[/]{escape(user)}")
    console.print(
        f"verified: {check.manifests} manifests, {check.namespaces} namespaces, "
        f"{check.segments} segments, {shown(check.bytes)}"
    )
    for finding in check.problems:
        hurt = _named(finding.snapshots)
        moved = finding.quarantined_to
        where = "" if moved is None or moved in finding.what else f"; it lies in {moved}"
        console.print(
            f"[bold red]damaged {finding.kind.value}:[/] {escape(finding.what + where + hurt)}"
        )
    for held in check.quarantine:
        reason = held.reason or "its note is lost"
        console.print(
            f"in quarantine: {escape(held.path)}, {shown(held.bytes)}: "
            f"{escape(reason + _named(held.snapshots))}"
        )
    _show_leftovers(console, check)
    if check.healthy:
        console.print("[bold green]nothing is damaged[/]")


def _show_leftovers(console: Console, check: StoreCheck) -> None:
    if check.orphans:
        size = sum(orphan.bytes for orphan in check.orphans)
        console.print(
            f"{len(check.orphans)} segments are named by nothing, {shown(size)}: engram gc, or the "
            "running server, removes them"
        )
    if check.temporary_files:
        console.print(
            f"{len(check.temporary_files)} temporary files of a crash; the next start removes them"
        )
    for difference in check.catalog_differences[:SHOWN_SNAPSHOTS]:
        console.print(f"catalog: snapshot {escape(difference.snapshot_id)} {difference.what}")
    rest = len(check.catalog_differences) - SHOWN_SNAPSHOTS
    if rest > 0:
        console.print(f"catalog: {rest} more differ")
    if check.catalog_state == "missing":
        console.print("catalog: there is none; the next start makes it")
    opened = check.catalog_opened
    if opened is not None and opened.rebuilt_because:
        console.print(f"catalog: built anew: {escape(opened.rebuilt_because)}")
    elif opened is not None and check.catalog_differences:
        console.print(
            f"catalog: {opened.added} rows added, {opened.refreshed} renewed, "
            f"{opened.removed} removed"
        )


def _named(snapshots: Sequence[str]) -> str:
    if not snapshots:
        return ""
    more = len(snapshots) - SHOWN_SNAPSHOTS
    names = ", ".join(snapshots[:SHOWN_SNAPSHOTS])
    return f"; hurts {names}" + (f" and {more} more" if more > 0 else "")
