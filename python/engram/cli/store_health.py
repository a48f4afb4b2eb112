"""The health of a snapshot store, read without changing it; a server may be using it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram.catalog.inspection import inspect_catalog
from engram.errors import EngramError
from engram.store.inspection import inspect_store, is_store
from engram.store.layout import Layout


@dataclass(frozen=True)
class StoreHealth:
    """What `engram doctor` says about a store; sizes are bytes.

    ``snapshots`` and ``conversations`` are the catalog's counts, None where it has none yet.
    ``in_use_by`` is the server that holds the store. ``problems`` is empty when all is well.
    """

    directory: str
    marker: str = ""
    keyring: str = "none"
    in_use_by: str | None = None
    snapshots: int | None = None
    conversations: int | None = None
    manifests: int = 0
    segments: int = 0
    segment_bytes: int = 0
    quarantined: int = 0
    free_bytes: int | None = None
    problems: tuple[str, ...] = ()


def store_health(directory: Path) -> StoreHealth:
    """Look at the store in a directory."""
    root = directory.absolute()
    if not root.is_dir() or not is_store(root):
        return StoreHealth(str(root), problems=(f"{root} is no snapshot store",))
    try:
        found = inspect_store(root)
    except (EngramError, OSError) as error:
        return StoreHealth(str(root), problems=(f"{root} cannot be read: {error}",))
    problems = []
    if found.marker == "newer format":
        problems.append("the store was written by a newer Engram; this one cannot serve it")
    elif found.marker != "intact":
        problems.append(f"the store's marker is {found.marker}; the next start rebuilds it")
    if found.keyring_damaged:
        problems.append(found.keyring)
    problems += [
        f"manifest {name} is damaged; the next start quarantines it"
        for name in found.damaged_manifests
    ]
    problems += [
        f"manifest {name} names a segment that is not there; its snapshot cannot be restored"
        for name in found.incomplete
    ]
    if found.quarantined:
        problems.append(
            f"{found.quarantined} damaged files in {root / 'quarantine'}; the note beside each "
            "says what was wrong; remove them when they are of no more use"
        )
    snapshots = conversations = None
    catalog = Layout(root).catalog
    if catalog.exists():
        counts = inspect_catalog(catalog, in_use=found.holder is not None)
        if isinstance(counts, str):
            problems.append(f"the catalog is damaged ({counts}); the next start rebuilds it")
        else:
            snapshots, conversations = counts.snapshots, counts.conversations
    return StoreHealth(
        directory=str(root),
        marker=found.marker,
        keyring=found.keyring,
        in_use_by=found.holder,
        snapshots=snapshots,
        conversations=conversations,
        manifests=found.manifests,
        segments=found.segments,
        segment_bytes=found.segment_bytes,
        quarantined=found.quarantined,
        free_bytes=found.free_bytes,
        problems=tuple(problems),
    )
