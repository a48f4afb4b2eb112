"""Does the catalog of a store say what its manifests say?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.catalog.catalog import Catalog, move_aside
from engram.catalog.comparison import CatalogDifference, differences
from engram.catalog.inspection import copied_catalog
from engram.catalog.rows import OpenReport
from engram.store.disk import DiskStore


class RebuiltCatalog:
    """The catalog that a store's manifests make, in a folder of its own that goes with it."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="engram-catalog-")
        try:
            self.catalog = Catalog.open(Path(self._folder.name, "catalog.sqlite"), store)
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> RebuiltCatalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.catalog.close()
        self._folder.cleanup()

    def compare(self, found: Catalog) -> list[CatalogDifference]:
        """Where another catalog of the store is wrong."""
        return differences(found, self.catalog, self._store.quarantined_names())

    @contextmanager
    def stored(self, *, in_use: bool) -> Iterator[Catalog | str | None]:
        """A copy of the store's catalog as it is, why it cannot be used, or None without one."""
        path = self._store.catalog_path
        if not path.exists():
            yield None
            return
        with copied_catalog(path, in_use=in_use) as found:
            yield found

    def repair(self) -> OpenReport:
        """Bring the store's catalog in line, building it anew if opening it is not enough."""
        path = self._store.catalog_path
        catalog = Catalog.open(path, self._store)
        try:
            report, wrong = catalog.report, self.compare(catalog)
        finally:
            catalog.close()
        if not wrong:
            return report
        reason = f"{len(wrong)} of its rows are not what the manifests say"
        move_aside(path, self._store, reason)
        catalog = Catalog.open(path, self._store)
        catalog.close()
        catalog.report.rebuilt_because = reason
        return catalog.report
