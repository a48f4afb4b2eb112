"""What the catalog needs of the store whose manifests it indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from engram.snapshot.listing import DamagedManifest, ManifestEntry
from engram.snapshot.manifest import Manifest


class ManifestSource(Protocol):
    """A manifest store, and a place for damaged files."""

    def manifest_names(self) -> set[str]: ...

    def manifest_entry(self, name: str) -> ManifestEntry | None: ...

    def list_manifests(self) -> list[ManifestEntry]: ...

    def load_manifest(self, entry: ManifestEntry) -> Manifest | DamagedManifest: ...

    def quarantine_manifest(self, entry: ManifestEntry, reason: str) -> Path | None: ...

    def quarantined_names(self) -> frozenset[str]: ...

    def quarantine_file(self, path: Path, reason: str) -> Path | None: ...
