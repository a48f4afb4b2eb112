"""What a listing of stored manifests yields; shared by the stores and the catalog."""

from __future__ import annotations

from dataclasses import dataclass

from engram.core.canonical import blake3_hex


@dataclass(frozen=True)
class ManifestEntry:
    """One stored manifest file. ``stamp`` changes whenever the file is written again."""

    name: str
    stamp: str


@dataclass(frozen=True)
class DamagedManifest:
    """A stored manifest that cannot be used. ``quarantined_to`` is None if it stayed in place."""

    name: str
    reason: str
    quarantined_to: str | None


def manifest_name(snapshot_id: str, tenant: str) -> str:
    """The file name of a manifest: a digest, because ids are never paths.

    "/" occurs in no id, so that two pairs never give one name.
    """
    return blake3_hex(f"{tenant}/{snapshot_id}".encode()) + ".json"
