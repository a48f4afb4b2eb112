"""Looks into a catalog without changing it: everything is read from a copy."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engram.catalog.catalog import Catalog
from engram.catalog.database import CatalogDamagedError, Database
from engram.catalog.rows import CatalogCounts, OpenReport
from engram.errors import StoreError


def inspect_catalog(path: Path, *, in_use: bool) -> CatalogCounts | str:
    """How much a catalog holds, or why it cannot be used (then the next start rebuilds it)."""
    with copied_catalog(path, in_use=in_use) as catalog:
        return catalog if isinstance(catalog, str) else catalog.counts()


@contextlib.contextmanager
def copied_catalog(path: Path, *, in_use: bool) -> Iterator[Catalog | str]:
    """A copy of a catalog as it is, not brought in line with anything; or why it cannot be used.

    ``in_use`` says that a server has it open: then SQLite makes the copy. Otherwise the files are
    copied, because SQLite would leave files of its own beside a catalog that a crash left behind.
    """
    with tempfile.TemporaryDirectory(prefix="engram-catalog-") as folder:
        copy = Path(folder, path.name)
        try:
            if in_use:
                _backup(path, copy)
            else:
                _copy(path, copy)
            database = Database.open(copy)
        except (OSError, sqlite3.Error, StoreError, CatalogDamagedError) as error:
            yield str(error)
            return
        try:
            yield Catalog(database, OpenReport())
        finally:
            database.close()


def _backup(path: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _copy(path: Path, copy: Path) -> None:
    for suffix in ("", "-wal"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            shutil.copyfile(part, copy.with_name(copy.name + suffix))
