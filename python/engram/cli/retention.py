"""`engram retention --dry-run`: what a policy would remove from a store. It changes nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.cli.failing import settings_from, told
from engram.cli.size import shown
from engram.errors import UnsupportedError
from engram.retention import Keep, RetentionPlan, RetentionPolicy, plan
from engram.retention.inventory import snapshots_of
from engram.snapshot.manifest import Manifest
from engram.store.reading import ReadOnlyStore, open_for_reading

DirectoryOption = Annotated[Path, typer.Option("--dir", help="A store: --snapshot-dir.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan; needed.")]
CountOption = Annotated[
    int | None,
    typer.Option("--snapshot-retention-count", help="Snapshots kept for each branch."),
]
NamedOption = Annotated[
    bool | None,
    typer.Option(
        "--snapshot-keep-named-branches/--no-snapshot-keep-named-branches",
        help="Exempt branches other than main.",
    ),
]
ColdOption = Annotated[
    float | None,
    typer.Option("--conversation-cold-retention", help="Seconds until a conversation goes."),
]
WarmOption = Annotated[
    float | None,
    typer.Option(
        "--conversation-warm-timeout", help="Seconds until it is half as likely to go on."
    ),
]
QuotaOption = Annotated[
    float | None, typer.Option("--snapshot-disk-quota-gb", help="Size the store may have.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def retention(
    directory: DirectoryOption,
    dry_run: DryRunOption = False,
    snapshot_retention_count: CountOption = None,
    snapshot_keep_named_branches: NamedOption = None,
    conversation_cold_retention: ColdOption = None,
    conversation_warm_timeout: WarmOption = None,
    snapshot_disk_quota_gb: QuotaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what retention would remove from a store, and why. Defaults are the server's."""
    with told():
        if not dry_run:
            raise UnsupportedError(
                "only --dry-run exists: this command removes nothing",
                hint="removing is the work of the server that uses the store; see its flags",
            )
        policy = RetentionPolicy.of(
            settings_from(
                snapshot_retention_count=snapshot_retention_count,
                snapshot_keep_named_branches=snapshot_keep_named_branches,
                conversation_cold_retention=conversation_cold_retention,
                conversation_warm_timeout=conversation_warm_timeout,
                snapshot_disk_quota_gb=snapshot_disk_quota_gb,
            )
        )
        unreadable: list[str] = []
        manifests = _readable(open_for_reading(directory, segments=False), unreadable)
        decided = plan(snapshots_of(manifests), policy, time.time())
    if as_json:
        typer.echo(json.dumps(_report(decided, unreadable), indent=2))
    else:
        _show(Console(highlight=False, soft_wrap=True), decided, unreadable)


def _readable(store: ReadOnlyStore, unreadable: list[str]) -> Iterator[Manifest]:
    """The manifests of a store, one after another; the names of those that cannot be used are
    appended."""
    for manifest in store.iter_manifests():
        if isinstance(manifest, Manifest):
            yield manifest
        elif store.manifest_entry(manifest.name) is not None:
            unreadable.append(manifest.name)
        # else it was deleted since it was listed


def _report(decided: RetentionPlan, unreadable: list[str]) -> dict[str, object]:
    return {
        "remove": [
            {
                "tenant": removal.snapshot.tenant,
                "conversation_id": removal.snapshot.conversation_id,
                "branch_name": removal.snapshot.branch_name,
                "turn_number": removal.snapshot.turn_number,
                "snapshot_id": removal.snapshot.snapshot_id,
                "reason": removal.reason.value,
                "text": removal.text,
                "freed_bytes": removal.freed_bytes,
            }
            for removal in decided.removals
        ],
        "keep": {reason.value: count for reason, count in _kept(decided).items()},
        "bytes_before": decided.bytes_before,
        "bytes_after": decided.bytes_after,
        "over_quota": decided.over_quota,
        "unreadable": unreadable,
    }


def _kept(decided: RetentionPlan) -> dict[Keep, int]:
    counts = Counter(kept.reason for kept in decided.kept)
    return {reason: counts[reason] for reason in Keep if counts[reason]}


def _show(console: Console, decided: RetentionPlan, unreadable: list[str]) -> None:
    if decided.removals:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("conversation", "branch", "turn", "reason"):
            table.add_column(heading, no_wrap=True)
        table.add_column("frees", justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for removal in decided.removals:
            snapshot = removal.snapshot
            table.add_row(
                escape(snapshot.conversation_id),
                escape(snapshot.branch_name),
                str(snapshot.turn_number),
                removal.reason.value,
                shown(removal.freed_bytes),
                escape(removal.text),
            )
        console.print(table)
    console.print(
        f"{len(decided.removals)} snapshots would go, {len(decided.kept)} stay; "
        f"{shown(decided.freed_bytes)} of {shown(decided.bytes_before)} become free"
    )
    for reason, count in _kept(decided).items():
        console.print(f"  {count} stay: {reason.value}")
    if decided.over_quota:
        console.print(
            f"[bold red]problem:[/] {shown(decided.over_quota)} over the quota stay: everything "
            "left is exempt; raise the quota, or shorten --conversation-cold-retention"
        )
    for name in unreadable:
        console.print(f"[bold red]problem:[/] manifest {escape(name)} cannot be read; not planned")
