"""`engram gc`: remove segment files that no snapshot names."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from engram.catalog.catalog import Catalog
from engram.catalog.inspection import copied_catalog
from engram.cli.failing import told
from engram.cli.keys import KeyFileOption, key_of, key_of_store
from engram.cli.options import JsonOption, StoreOption
from engram.cli.size import shown
from engram.errors import NotFoundError
from engram.store.disk import DiskStore
from engram.store.inspection import is_store, lock_holder
from engram.store.keys import Key
from engram.store.reading import open_for_reading
from engram.upkeep.collect import GRACE_SECONDS, StoreCollection, collect_store, survey

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Change nothing; a server may be using the store.")
]
GraceOption = Annotated[
    float, typer.Option("--grace", min=0, help="Seconds for which a file that is new stays.")
]


def gc(
    directory: StoreOption,
    dry_run: DryRunOption = False,
    grace: GraceOption = GRACE_SECONDS,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what no snapshot names; a running server does the same by itself."""
    with told():
        if dry_run:
            done = _dry(directory, grace, key_of(key_file))
        else:
            done = _collect(directory, grace, key_file)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(done)}, indent=2))
        return
    verb = "would go" if dry_run else "removed"
    typer.echo(f"{done.segments} segments {verb}, {shown(done.bytes)} in all")
    typer.echo(f"{done.named} segments are in use, {done.young} are newer than {grace:g} s")
    if not dry_run:
        typer.echo(
            f"{done.temporary_files} temporary files, {done.rows} rows of the catalog and "
            f"{done.directories} empty directories removed"
        )


def _collect(directory: Path, grace: float, key_file: Path | None) -> StoreCollection:
    root = directory.absolute()
    if not root.is_dir() or not is_store(root):
        raise NotFoundError(f"{root} is no snapshot store", hint="name a --snapshot-dir")
    key = key_of_store(root, key_file)
    with DiskStore.open(root, key=key) as store, _opened(store) as catalog:
        return collect_store(store, catalog, time.time(), grace)


@contextmanager
def _opened(store: DiskStore) -> Iterator[Catalog]:
    catalog = Catalog.open(store.catalog_path, store)
    catalog.check()
    if not catalog.checked:
        # Found damaged only now: opening it once more builds it anew.
        catalog.close()
        catalog = Catalog.open(store.catalog_path, store)
        catalog.check()
    try:
        yield catalog
    finally:
        catalog.close()


def _dry(directory: Path, grace: float, key: Key | None) -> StoreCollection:
    store = open_for_reading(directory, key=key)
    done = StoreCollection()
    in_use = lock_holder(store.root) is not None
    with copied_catalog(store.catalog_path, in_use=in_use) as catalog:
        known = None if isinstance(catalog, str) else catalog
        for plan in survey(store, known, time.time(), grace):
            done.named += plan.named
            done.young += plan.young
            done.segments += len(plan.remove)
            done.bytes += sum(segment.bytes for segment in plan.remove)
    return done
