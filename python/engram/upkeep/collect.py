"""Which segment files nothing names, and their removal from a store at rest."""

from __future__ import annotations

import re
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from engram.catalog.catalog import Catalog
from engram.catalog.rows import UnreferencedSegment
from engram.snapshot.archive import segments_of
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import Shard
from engram.store.base import Store, StoredSegment
from engram.store.disk import DiskStore

GRACE_SECONDS: Final = 3600.0
"""How long a segment may wait for the manifest that names it."""
LISTED_AT_ONCE: Final = 10_000
_DIGEST: Final = re.compile(rb"[0-9a-f]{64}")

SegmentKey = tuple[Shard, str]
"""A segment's place and id."""


@dataclass(frozen=True)
class CollectionPlan:
    """What to do with the segments of a listing: ``remove`` these; the others are ``named``, or
    too ``young``."""

    remove: tuple[StoredSegment, ...]
    named: int
    young: int


def plan_collection(
    found: Iterable[StoredSegment], named: Container[SegmentKey], now: float, grace: float
) -> CollectionPlan:
    """Remove what nothing names and what was written ``grace`` seconds before ``now``, or earlier.

    A file from the future, as a clock that was put back leaves them, is young.
    """
    remove: list[StoredSegment] = []
    young = kept = 0
    for segment in found:
        if now - segment.written_at < grace:
            young += 1
        elif (segment.shard, segment.segment_id) in named:
            kept += 1
        else:
            remove.append(segment)
    return CollectionPlan(tuple(remove), kept, young)


class NamedSegments(Container[SegmentKey]):
    """The segments that something names, as it was when this was made.

    That is a snapshot of the catalog; a manifest that the catalog does not know yet; and what can
    still be read of a manifest that is damaged, or newer: it may be repaired. Blocks: it lists the
    manifests.
    """

    def __init__(self, store: Store, catalog: Catalog | None) -> None:
        """Without a catalog all manifests are read."""
        self._catalog = catalog
        self._named: set[SegmentKey] = set()
        known = {} if catalog is None else catalog.manifest_entries()
        unreadable = []
        for entry in store.list_manifests():
            if entry.name in known and known[entry.name][0] == entry:
                continue
            manifest = store.load_manifest(entry)
            if isinstance(manifest, Manifest):
                self._named.update(segments_of(manifest))
            else:
                unreadable.append(entry.name)
        self._mentioned = mentioned_segments(store, unreadable)

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        shard, segment_id = key
        return (
            key in self._named
            or segment_id in self._mentioned
            or (self._catalog is not None and self._catalog.is_referenced(shard, segment_id))
        )


def mentioned_segments(
    store: Store, names: Iterable[str] = (), *, but: Container[str] = ()
) -> set[str]:
    """Every digest in what is left of the manifests in quarantine, ``but`` for some that had these
    names, and of the stored ones of these ``names``."""
    return {
        digest.decode()
        for remains in store.remains_of_manifests(names, but=but)
        for digest in _DIGEST.findall(remains)
    }


class Sweep:
    """Goes through a store's segments in parts, over and over.  Thread-safe."""

    def __init__(self) -> None:
        self._left: Iterator[StoredSegment] | None = None
        self._lock = threading.Lock()

    def next(self, store: Store, count: int = LISTED_AT_ONCE) -> tuple[list[StoredSegment], bool]:
        """The next ``count`` segments at most, and whether they are the last of a round."""
        with self._lock:
            if self._left is None:
                self._left = store.iter_segments()
            part = list(islice(self._left, count))
            if len(part) < count:
                self._left = None
            return part, self._left is None


@dataclass
class StoreCollection:
    """What a collection removed, or with a dry run would remove."""

    segments: int = 0
    bytes: int = 0
    young: int = 0
    named: int = 0
    rows: int = 0
    directories: int = 0
    temporary_files: int = 0


def survey(
    store: Store, catalog: Catalog | None, now: float, grace: float
) -> Iterator[CollectionPlan]:
    """Plan the collection of a whole store, part after part."""
    named, sweep, last = NamedSegments(store, catalog), Sweep(), False
    while not last:
        part, last = sweep.next(store)
        yield plan_collection(part, named, now, grace)


def collect_store(store: DiskStore, catalog: Catalog, now: float, grace: float) -> StoreCollection:
    """Remove what nothing names from a store that is at rest: the caller holds its lock.

    Opening the store has removed the temporary files. Raises `StoreError`; what was removed until
    then is gone, and nothing else is.
    """
    done = StoreCollection(temporary_files=store.removed_temps)
    for plan in survey(store, catalog, now, grace):
        done.named += plan.named
        done.young += plan.young
        for segment in plan.remove:
            store.delete_segment(segment.shard, segment.segment_id)
            done.segments += 1
            done.bytes += segment.bytes
    done.rows = forget_rows(store, catalog)
    done.directories = store.remove_empty_directories()
    return done


def forget_rows(store: Store, catalog: Catalog, limit: int = LISTED_AT_ONCE) -> int:
    """Drop the catalog's rows of segments that no snapshot names and that have no file any more."""
    rows = catalog.unreferenced_segments()[:limit]
    return catalog.forget_segments(
        row for row in rows if not store.has_segment(row.shard, row.segment_id)
    )


def as_rows(segments: Sequence[StoredSegment]) -> list[UnreferencedSegment]:
    """Segments of a listing as the catalog speaks of them."""
    return [UnreferencedSegment(s.shard, s.segment_id, s.bytes) for s in segments]
