"""What a check of a store found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engram.catalog.comparison import CatalogDifference
from engram.catalog.rows import OpenReport


class Kind(str, Enum):
    """What is damaged."""

    MARKER = "marker"
    MANIFEST = "manifest"
    NAMESPACE = "namespace"
    SEGMENT = "segment"
    SNAPSHOT = "snapshot"
    CATALOG = "catalog"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, and the ids of the snapshots that suffer from it.

    ``quarantined_to`` is where the file lies now, None if it was not moved.
    """

    kind: Kind
    what: str
    file: str
    snapshots: tuple[str, ...] = ()
    quarantined_to: str | None = None


@dataclass(frozen=True)
class Held:
    """A file in quarantine. ``snapshots`` suffer from it: it was theirs, and nothing whole is in
    its place."""

    path: str
    file: str
    reason: str
    bytes: int
    quarantined_at: float | None
    snapshots: tuple[str, ...]


@dataclass(frozen=True)
class Orphan:
    """A whole segment that nothing names, older than the grace period of a collection."""

    file: str
    bytes: int


@dataclass
class StoreCheck:
    """Everything a check has to say of a store. Sizes are bytes.

    ``problems`` is what is damaged. Orphans, temporary files and a catalog that lags behind its
    manifests are what a crash leaves: no damage, and the next start or collection sees to them.
    ``catalog_state`` is "intact", "differs", "missing" or "damaged"; ``catalog_opened`` what a
    repair did about it.
    """

    directory: str
    in_use_by: str | None = None
    repaired: bool = False
    marker: str = ""
    manifests: int = 0
    namespaces: int = 0
    segments: int = 0
    bytes: int = 0
    problems: list[Finding] = field(default_factory=list)
    quarantine: list[Held] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    temporary_files: list[str] = field(default_factory=list)
    removed_temps: int = 0
    catalog_state: str = ""
    catalog_differences: list[CatalogDifference] = field(default_factory=list)
    catalog_opened: OpenReport | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems
