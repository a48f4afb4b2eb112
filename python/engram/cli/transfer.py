"""`engram export` and `engram import`: snapshots to one portable file and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from engram.catalog.catalog import Catalog
from engram.cli.failing import told
from engram.cli.keys import KeyFileOption, key_of
from engram.cli.options import JsonOption, StoreOption, TenantOption, progress
from engram.cli.size import shown
from engram.core.ids import check_id, check_tenant
from engram.errors import InvalidRequestError, NotFoundError, SnapshotCorruptError
from engram.snapshot.manifest import Manifest
from engram.store.disk import DiskStore
from engram.store.inspection import is_store
from engram.store.reading import ReadOnlyStore, open_for_reading
from engram.upkeep.exporting import plan_export, snapshots_of, write_archive
from engram.upkeep.importing import ArchiveFile, Names, import_archive

SnapshotArgument = Annotated[
    str | None, typer.Argument(metavar="[SNAPSHOT]", help="The id of a snapshot.")
]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="The file to write.")]
ConversationOption = Annotated[
    str | None, typer.Option("--conversation", help="Every snapshot of this conversation.")
]
BranchOption = Annotated[
    str | None, typer.Option("--branch", help="Of the conversation, this branch alone.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="What export has written.")]
AsOption = Annotated[
    str | None,
    typer.Option("--as", help="Import as this conversation; every snapshot gets a new id."),
]
AsSnapshotOption = Annotated[
    str | None, typer.Option("--as-snapshot", help="The id of the one snapshot in the file.")
]
CreateOption = Annotated[bool, typer.Option("--create", help="Make the store if there is none.")]


def export(
    directory: StoreOption,
    output: OutputOption,
    snapshot: SnapshotArgument = None,
    conversation: ConversationOption = None,
    branch: BranchOption = None,
    tenant: TenantOption = "",
    force: ForceOption = False,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write snapshots, with all they stand on, to one file; a server may be using the store."""
    with told():
        store = open_for_reading(directory, key=key_of(key_file))
        manifests = _chosen(store, check_tenant(tenant), snapshot, conversation, branch)
        try:
            archive = plan_export(store, manifests)
            total = sum(segment.header.payload_length for segment in archive.segments)
            with progress("exporting", total) as on_bytes:
                write_archive(output, store, archive, replace=force, on_bytes=on_bytes)
        except SnapshotCorruptError:
            _require_listed(store, manifests)
            raise
    report = {
        "file": str(output),
        "bytes": archive.file_length,
        "segments": len(archive.segments),
        "cut_segments": len(archive.cut),
        "snapshots": [_named(manifest) for manifest in archive.manifests],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo(
            f"{output}: {len(archive.manifests)} snapshots, {len(archive.segments)} segments, "
            f"{shown(archive.file_length)}"
        )


def import_(
    file: FileArgument,
    directory: StoreOption,
    tenant: TenantOption = "",
    as_conversation: AsOption = None,
    as_snapshot: AsSnapshotOption = None,
    create: CreateOption = False,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store the snapshots of a file, verified; no server may be using the store."""
    with told():
        names = Names(
            tenant=check_tenant(tenant),
            conversation_id=_checked("--as", as_conversation),
            snapshot_id=_checked("--as-snapshot", as_snapshot),
        )
        if not create and not (directory.is_dir() and is_store(directory)):
            raise NotFoundError(
                f"{directory} is no snapshot store", hint="name a --snapshot-dir, or say --create"
            )
        # The lock first: what is verified is then stored, and nobody waits for nothing.
        key = key_of(key_file)
        with DiskStore.open(directory, key=key) as store, ArchiveFile(file) as opened:
            total = sum(segment.header.payload_length for segment in opened.archive.segments)
            with progress("verifying", total) as on_bytes:
                opened.verify(on_bytes)
            catalog = Catalog.open(store.catalog_path, store)
            try:
                with progress("importing", total) as on_bytes:
                    done = import_archive(store, catalog, opened, names, on_bytes=on_bytes)
            finally:
                catalog.close()
    if as_json:
        report = {
            "segments": done.segments,
            "bytes": done.bytes,
            "new_segments": done.new_segments,
            "new_bytes": done.new_bytes,
            "snapshots": [_named(manifest) for manifest in done.manifests],
        }
        typer.echo(json.dumps(report, indent=2))
        return
    for manifest in done.manifests:
        typer.echo(
            f"{manifest.snapshot_id}: turn {manifest.turn_number} of branch "
            f"{manifest.branch_name!r} of conversation {manifest.conversation_id!r}"
        )
    typer.echo(f"{done.new_segments} of {done.segments} segments were new, {shown(done.new_bytes)}")


def _chosen(
    store: ReadOnlyStore,
    tenant: str,
    snapshot: str | None,
    conversation: str | None,
    branch: str | None,
) -> list[Manifest]:
    if (snapshot is None) == (conversation is None):
        raise InvalidRequestError("name either a snapshot or a --conversation")
    if branch is not None and conversation is None:
        raise InvalidRequestError("--branch needs a --conversation")
    if snapshot is not None:
        return [store.get_manifest(check_id("SNAPSHOT", snapshot), tenant)]
    conversation = check_id("--conversation", conversation)
    return snapshots_of(store, tenant, conversation, _checked("--branch", branch))


def _require_listed(store: ReadOnlyStore, manifests: list[Manifest]) -> None:
    """Raise `NotFoundError` for a snapshot that the server has removed meanwhile: whoever reads its
    files takes it for damaged."""
    for manifest in manifests:
        try:
            store.get_manifest(manifest.snapshot_id, manifest.tenant)
        except NotFoundError as error:
            raise NotFoundError(
                f"snapshot {manifest.snapshot_id!r} was removed while it was exported",
                hint="export again",
                details=error.details,
            ) from None


def _checked(option: str, value: str | None) -> str | None:
    return None if value is None else check_id(option, value)


def _named(manifest: Manifest) -> dict[str, object]:
    return {
        "snapshot_id": manifest.snapshot_id,
        "conversation_id": manifest.conversation_id,
        "branch_name": manifest.branch_name,
        "turn_number": manifest.turn_number,
        "token_count": manifest.token_count,
        "bytes": manifest.bytes,
        "unique_bytes": manifest.unique_bytes,
    }
