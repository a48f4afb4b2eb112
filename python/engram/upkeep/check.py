"""Is every file of a store what it should be, and does all fit together?"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Final

from engram.catalog.catalog import Catalog
from engram.core.tokens import TOKEN_BYTES, TokenArray
from engram.errors import EngramError, NotFoundError, SegmentCorruptError, StoreError
from engram.snapshot.archive import segments_of
from engram.snapshot.chain import Link, chain_problem, tokens_problem
from engram.snapshot.manifest import Manifest
from engram.store.base import StoredSegment
from engram.store.disk import DiskStore
from engram.store.inspection import abandoned_temps, lock_holder
from engram.store.layout import MANIFEST_SUFFIX, SEGMENT_SUFFIX, Layout, is_digest
from engram.upkeep.catalogs import RebuiltCatalog
from engram.upkeep.collect import (
    GRACE_SECONDS,
    SegmentKey,
    mentioned_segments,
    plan_collection,
)
from engram.upkeep.findings import Finding, Held, Kind, Orphan, StoreCheck

MAX_TOKEN_BYTES: Final = 64 << 20
"""Of segments' tokens that are remembered from one chain to the next."""


class StoreChecker:
    """One check of one store.

    With a store opened for reading it changes nothing and a server may be at work: what has gone
    when it is looked for again was deleted, and is no damage. With a store opened for use, and so
    locked, damaged files are quarantined as they are found, and the catalog is repaired.
    """

    def __init__(self, store: DiskStore, *, repair: bool, marker: str) -> None:
        """``marker`` is what there was when the store was opened, which rebuilds it."""
        self._store = store
        self._layout = Layout(store.root)
        self._repair = repair
        self._links: dict[SegmentKey, Link] = {}
        self._bad: dict[SegmentKey, Finding] = {}
        self._absent: dict[SegmentKey, Finding] = {}
        self._hurt: dict[SegmentKey, list[str]] = {}
        self._named: set[SegmentKey] = set()
        self._tokens = _Tokens(store)
        self._undescribed: dict[str, list[str]] = {}
        self._orphans: list[StoredSegment] = []
        # Before the segments: whatever these manifests name has been written by now.
        self._entries = store.list_manifests()
        self._found = list(store.iter_segments())
        self.check = StoreCheck(
            str(store.root), repaired=repair, marker=marker, removed_temps=store.removed_temps
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the segments that will be read."""
        return sum(segment.bytes for segment in self._found)

    def run(self) -> StoreCheck:
        """Look at everything. Raises `StoreError` for what stops the check itself."""
        check = self.check
        if not self._repair:
            check.in_use_by = lock_holder(self._store.root)
        if check.marker != "intact":
            self._problem(Kind.MARKER, f"the store's marker is {check.marker}", self._layout.marker)
        check.temporary_files = [str(path) for path in abandoned_temps(self._store.root)]
        for segment in self._found:
            self._verify(segment)
        self._check_namespaces()
        for entry in self._entries:
            self._check_manifest(entry.name)
        self._tell_of_segments()
        self._orphans = self._unnamed()
        self._check_catalog()
        check.orphans = [
            Orphan(str(self._layout.segment(s.shard, s.segment_id)), s.bytes) for s in self._orphans
        ]
        return check

    def _problem(self, kind: Kind, what: str, file: Path, snapshots: tuple[str, ...] = ()) -> None:
        moved = None
        if self._repair and not file.exists():
            moved = self._store.find_quarantined(file.name)
        self.check.problems.append(
            Finding(kind, what, str(file), snapshots, None if moved is None else str(moved))
        )

    # ---- segments ----

    def _verify(self, segment: StoredSegment) -> None:
        key = segment.shard, segment.segment_id
        try:
            header = self._store.verify_segment(*key)
        except EngramError as error:
            path = self._layout.segment(*key)
            gone = not path.exists() and self._store.find_quarantined(path.name) is None
            if not (isinstance(error, SegmentCorruptError) and gone):
                self._bad[key] = self._bad_segment(path, error)
            return
        self._links[key] = Link.of(header)
        self.check.segments += 1
        self.check.bytes += segment.bytes

    def _bad_segment(self, path: Path, error: EngramError) -> Finding:
        moved = error.details.get("quarantined_to")
        return Finding(
            Kind.SEGMENT,
            error.message,
            str(path),
            quarantined_to=moved if isinstance(moved, str) else None,
        )

    def _tell_of_segments(self) -> None:
        # What is not there is no damage if whoever named it is gone too.
        absent = {key: found for key, found in self._absent.items() if key in self._hurt}
        for key, finding in {**self._bad, **absent}.items():
            hurt = tuple(self._hurt.get(key, ()))
            self.check.problems.append(replace(finding, snapshots=hurt))

    def _unnamed(self) -> list[StoredSegment]:
        """Whole segments that no manifest names, as far as those can be read."""
        mentioned = mentioned_segments(self._store)
        named = self._named | {
            (s.shard, s.segment_id) for s in self._found if s.segment_id in mentioned
        }
        whole = [s for s in self._found if (s.shard, s.segment_id) in self._links]
        return list(plan_collection(whole, named, time.time(), GRACE_SECONDS).remove)

    # ---- records ----

    def _check_namespaces(self) -> None:
        folder = self._layout.namespaces
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            name = path.name.removesuffix(MANIFEST_SUFFIX)
            if not (path.name.endswith(MANIFEST_SUFFIX) and is_digest(name)):
                continue
            try:
                self._store.get_namespace(name)
                self.check.namespaces += 1
            except (NotFoundError, StoreError) as error:
                self._problem(Kind.NAMESPACE, error.message, path)

    def _check_manifest(self, name: str) -> None:
        path = self._layout.manifest(name)
        entry = self._store.manifest_entry(name)
        if entry is None:
            return  # deleted meanwhile
        try:
            manifest = self._store.load_manifest(entry)
        except StoreError as error:
            self._problem(Kind.MANIFEST, error.message, path)
            return
        if not isinstance(manifest, Manifest):
            if path.exists() or manifest.quarantined_to is not None:
                self._problem(Kind.MANIFEST, f"manifest {path}: {manifest.reason}", path)
            return
        self.check.manifests += 1
        keys = segments_of(manifest)
        missing = [key for key in keys if not self._has(key)]
        if missing and self._store.manifest_entry(name) is None:
            return  # deleted, and its segments with it
        self._named.update(keys)
        for key in missing:
            self._hurt.setdefault(key, []).append(manifest.snapshot_id)
        if not self._layout.namespace(manifest.namespace).exists():
            self._undescribed.setdefault(manifest.namespace, []).append(manifest.snapshot_id)
        if not missing:
            self._check_chains(manifest, path)

    def _has(self, key: SegmentKey) -> bool:
        """Whether a segment is there and whole; if not, why is known afterwards."""
        if not any(key in known for known in (self._links, self._bad, self._absent)):
            # Written after the segments were listed, or gone.
            try:
                self._links[key] = Link.of(self._store.verify_segment(*key))
            except EngramError as error:
                self._absent[key] = self._bad_segment(self._layout.segment(*key), error)
        return key in self._links

    def _check_chains(self, manifest: Manifest, path: Path) -> None:
        problem = None
        shards = list(manifest.shards())
        for shard, chain in shards:
            links = [self._links[shard, ref.segment_id] for ref in chain]
            problem = problem or chain_problem(chain, links)
        if problem is None:
            try:
                first, chain = shards[0]
                rows = [self._tokens.of((first, ref.segment_id)) for ref in chain]
            except EngramError as error:
                if not path.exists():
                    return  # deleted meanwhile
                problem = error.message
            else:
                problem = tokens_problem(manifest, rows)
        if problem is not None:
            what = f"snapshot {manifest.snapshot_id!r}: {problem}"
            self._problem(Kind.SNAPSHOT, what, path, (manifest.snapshot_id,))

    # ---- catalog and quarantine ----

    def _check_catalog(self) -> None:
        for namespace, snapshots in self._undescribed.items():
            path = self._layout.namespace(namespace)
            if str(path) not in self._told():
                what = f"namespace {namespace} is not described; its server does that when it saves"
                self._problem(Kind.NAMESPACE, what, path, tuple(snapshots))
        ids: dict[str, str] = {}
        try:
            ids = self._compare_catalog()
        except StoreError as error:
            if self._repair:
                raise
            self._problem(Kind.CATALOG, error.message, self._store.catalog_path)
        self._tell_of_manifests(ids)
        self._tell_of_quarantine(ids)

    def _compare_catalog(self) -> dict[str, str]:
        """Look at the catalog, and repair it; the snapshot ids it has by names of manifests."""
        check = self.check
        with RebuiltCatalog(self._store) as rebuilt:
            for damaged in rebuilt.catalog.report.damaged:
                # Damage was found before; what is new are two manifests of one turn.
                path = self._layout.manifest(damaged.name)
                here = path.exists() or damaged.quarantined_to is not None
                if here and str(path) not in self._told():
                    self._problem(Kind.MANIFEST, f"manifest {path}: {damaged.reason}", path)
            with rebuilt.stored(in_use=check.in_use_by is not None) as found:
                ids = self._look_at_catalog(found, rebuilt)
            if self._repair:
                check.catalog_opened = rebuilt.repair()
        return ids

    def _look_at_catalog(
        self, found: Catalog | str | None, rebuilt: RebuiltCatalog
    ) -> dict[str, str]:
        check = self.check
        if isinstance(found, Catalog):
            check.catalog_differences = rebuilt.compare(found)
            check.catalog_state = "differs" if check.catalog_differences else "intact"
            # Of a damaged manifest it may be the catalog alone that knows what it names.
            referenced = found.is_referenced
            self._orphans = [s for s in self._orphans if not referenced(s.shard, s.segment_id)]
            return {name: entry[1] for name, entry in found.manifest_entries().items()}
        check.catalog_state = "missing"
        if found is not None:
            check.catalog_state = "damaged"
            what = f"the catalog is damaged ({found}); the next start rebuilds it"
            self._problem(Kind.CATALOG, what, self._store.catalog_path)
        return {}

    def _tell_of_manifests(self, ids: dict[str, str]) -> None:
        """Whose the damaged manifests are, which only the catalog knows."""
        for number, finding in enumerate(self.check.problems):
            name = Path(finding.file).name
            if finding.kind is Kind.MANIFEST and name in ids:
                self.check.problems[number] = replace(finding, snapshots=(ids[name],))

    def _tell_of_quarantine(self, ids: dict[str, str]) -> None:
        """What lies in quarantine.  A manifest there is a snapshot that cannot be used."""
        told = self._told()
        whole = {segment_id for _, segment_id in self._links}
        hurt: dict[str, list[str]] = {}
        for (_, segment_id), snapshots in self._hurt.items():
            hurt.setdefault(segment_id, []).extend(snapshots)
        for held in self._store.quarantined():
            segment_id = held.name.removesuffix(SEGMENT_SUFFIX)
            victims = [] if segment_id in whole else hurt.get(segment_id, [])
            if held.name in ids and not self._layout.manifest(held.name).exists():
                victims = [ids[held.name]]
            self.check.quarantine.append(
                Held(
                    str(held.path),
                    held.file,
                    held.reason,
                    held.bytes,
                    held.quarantined_at,
                    tuple(victims),
                )
            )
            if victims and held.name in ids and held.file not in told:
                told.add(held.file)
                self.check.problems.append(
                    Finding(
                        Kind.MANIFEST,
                        f"the manifest of snapshot {victims[0]!r} lies in quarantine: "
                        f"{held.reason}",
                        held.file,
                        tuple(victims),
                        str(held.path),
                    )
                )

    def _told(self) -> set[str]:
        """The files of which something has been said."""
        return {finding.file for finding in self.check.problems}


class _Tokens:
    """Tokens of segments that were verified, the last used of them in memory."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._kept: OrderedDict[SegmentKey, TokenArray] = OrderedDict()
        self._bytes = 0

    def of(self, key: SegmentKey) -> TokenArray:
        """The tokens of a segment; none of a state."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tokens = self._store.read_tokens(*key)[1]
        self._kept[key] = tokens
        self._bytes += len(tokens) * TOKEN_BYTES
        while self._bytes > MAX_TOKEN_BYTES and len(self._kept) > 1:
            self._bytes -= len(self._kept.popitem(last=False)[1]) * TOKEN_BYTES
        return tokens
