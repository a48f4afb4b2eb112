"""Snapshots to one portable file.  Reading only: a server may be using the store.

A file of the store may hold more than the snapshots use: another conversation began with the same
tokens and was stored first. An archive is cut to what its own snapshots cover; what stands on a
segment that was cut names another parent, and so is another segment too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engram.core.tokens import TokenArray
from engram.errors import AlreadyExistsError, NotFoundError, SnapshotCorruptError
from engram.snapshot.archive import Archive, ArchivedSegment, plan_archive, segments_of
from engram.snapshot.chain import Link, chain_problem, tokens_problem
from engram.snapshot.cutting import Cut
from engram.snapshot.manifest import Manifest, SegmentRef, change_manifest
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store.base import Store
from engram.store.durable import write_durable
from engram.store.filesystem import FileSystem
from engram.upkeep.collect import SegmentKey

OnBytes = Callable[[int], None]
"""Told how many bytes have been dealt with since it was last called."""


def nobody(count: int) -> None:
    """An `OnBytes` for when nobody watches."""


def snapshots_of(
    store: Store, tenant: str, conversation_id: str, branch_name: str | None = None
) -> list[Manifest]:
    """The snapshots of a conversation, or of one of its branches, oldest first.

    A damaged manifest is passed over. Raises `NotFoundError` if there is none.
    """
    found = [
        manifest
        for manifest in store.iter_manifests()
        if isinstance(manifest, Manifest)
        and (manifest.tenant, manifest.conversation_id) == (tenant, conversation_id)
        and branch_name in (None, manifest.branch_name)
    ]
    if not found:
        branch = "" if branch_name is None else f", branch {branch_name!r}"
        raise NotFoundError(
            f"no snapshot of conversation {conversation_id!r}{branch} in this store",
            hint="give its --tenant, if it has one",
            details={"conversation_id": conversation_id},
        )
    return sorted(found, key=lambda m: (m.created_at, m.branch_name, m.turn_number))


@dataclass(frozen=True)
class Export(Archive):
    """An archive of a store's snapshots; ``cut`` has those of its segments that are not stored."""

    cut: Mapping[SegmentKey, Cut] = field(default_factory=dict)


def plan_export(store: Store, manifests: Sequence[Manifest]) -> Export:
    """The archive of some snapshots of one tenant, and of nothing that they do not cover.

    Segments that must be cut, and what stands on them, are read to their end, for their new ids.
    Raises `SnapshotCorruptError` if a segment is missing or is not the one a manifest speaks of,
    `NotFoundError` if a namespace is not described, `InvalidRequestError` if it would be too large.
    """
    headers: dict[SegmentKey, SegmentHeader] = {}
    tokens: dict[SegmentKey, TokenArray] = {}
    for manifest in manifests:
        for shard, segment_id in segments_of(manifest):
            if (shard, segment_id) not in headers:
                header, rows = store.read_tokens(shard, segment_id)
                headers[shard, segment_id] = header
                if shard.rank == 0:
                    tokens[shard, segment_id] = rows
        require_whole(manifest, headers, tokens)
    ids, cuts = _cuts(store, manifests, headers)
    segments: dict[SegmentKey, SegmentHeader] = {}
    for shard, segment_id in headers:
        key = shard, ids.get((shard, segment_id), segment_id)
        # What two conversations began with alike may have been stored by each; cut, it is one.
        segments[key] = cuts[key].header if key in cuts else headers[key]
    namespaces = [
        store.get_namespace(namespace) for namespace in sorted({m.namespace for m in manifests})
    ]
    archive = plan_archive(
        [_cut_manifest(manifest, ids, segments) for manifest in manifests],
        namespaces,
        [(segment_id, header) for (_, segment_id), header in segments.items()],
    )
    # So that one that is too large is refused before a file is begun.
    export = Export(archive.manifests, archive.namespaces, archive.segments, cuts)
    assert export.header
    return export


def _cuts(
    store: Store, manifests: Sequence[Manifest], headers: Mapping[SegmentKey, SegmentHeader]
) -> tuple[dict[SegmentKey, str], dict[SegmentKey, Cut]]:
    """The new ids of segments that are not archived as they are stored, and those by their new
    ids.

    `headers` has a segment's parent before it, as chains have.
    """
    furthest: dict[SegmentKey, SegmentRef] = {}
    for shard, chain in (part for manifest in manifests for part in manifest.shards()):
        for ref in chain:
            other = furthest.setdefault((shard, ref.segment_id), ref)
            if other.end < ref.end:
                furthest[shard, ref.segment_id] = ref
    ids: dict[SegmentKey, str] = {}
    cuts: dict[SegmentKey, Cut] = {}
    for (shard, segment_id), header in headers.items():
        ref, parent = furthest[shard, segment_id], header.parent
        if parent is not None:
            parent = ids.get((shard, parent), parent)
        if (ref.end, parent) == (header.end, header.parent):
            continue
        cut = Cut.at(segment_id, header, end=ref.end, key=ref.key, parent=parent)
        new_id = cut.segment_id(store.iter_payload(shard, segment_id))
        ids[shard, segment_id] = new_id
        if (shard, new_id) not in headers:
            cuts[shard, new_id] = cut
    return ids, cuts


def _cut_manifest(
    manifest: Manifest,
    ids: Mapping[SegmentKey, str],
    segments: Mapping[SegmentKey, SegmentHeader],
) -> Manifest:
    """A manifest that names the segments of the archive."""
    chains = [
        [_cut_ref(shard, ref, ids, segments) for ref in chain] for shard, chain in manifest.shards()
    ]
    total = sum(ref.bytes for chain in chains for ref in chain)
    return change_manifest(
        manifest,
        segments=[[ref.model_dump() for ref in chain] for chain in chains],
        bytes=total,
        unique_bytes=min(manifest.unique_bytes, total),
    )


def _cut_ref(
    shard: Shard,
    ref: SegmentRef,
    ids: Mapping[SegmentKey, str],
    segments: Mapping[SegmentKey, SegmentHeader],
) -> SegmentRef:
    new_id = ids.get((shard, ref.segment_id))
    if new_id is None:
        return ref
    length = segments[shard, new_id].file_length
    return ref.model_copy(update={"segment_id": new_id, "bytes": length})


def require_whole(
    manifest: Manifest,
    headers: dict[tuple[Shard, str], SegmentHeader],
    tokens: dict[tuple[Shard, str], TokenArray],
) -> None:
    """Raise `SnapshotCorruptError` unless a manifest agrees with its segments' headers and tokens.

    Tokens are needed of rank 0 only.
    """
    problem = None
    for shard, chain in manifest.shards():
        links = [Link.of(headers[shard, ref.segment_id]) for ref in chain]
        problem = problem or chain_problem(chain, links)
    first = Shard(manifest.namespace, 0, manifest.world_size)
    problem = problem or tokens_problem(
        manifest, [tokens[first, ref.segment_id] for ref in manifest.segments[0]]
    )
    if problem:
        raise SnapshotCorruptError(
            f"snapshot {manifest.snapshot_id!r} cannot be used: {problem}",
            hint="take another snapshot",
            details={"snapshot_id": manifest.snapshot_id},
        )


def archive_parts(
    store: Store, archive: Export, on_bytes: OnBytes = nobody
) -> Iterator[memoryview | bytes]:
    """The bytes of an archive, in pieces of bounded size, each valid until the next.

    They are whole when the iterator has ended: it raises `SegmentCorruptError` for a segment that
    is damaged, and whoever collects the bytes must then throw them away.
    """
    yield archive.header
    position = 0
    for segment in archive.segments:
        yield bytes(segment.offset - position)
        for piece in _payload(store, archive, segment):
            yield piece
            on_bytes(len(piece))
        position = segment.end


def _payload(
    store: Store, archive: Export, segment: ArchivedSegment
) -> Iterator[memoryview | bytes]:
    shard, cut = segment.header.shard, archive.cut.get((segment.header.shard, segment.segment_id))
    if cut is None:
        return store.iter_payload(shard, segment.segment_id)
    # The source's digest is checked once more: the same bytes give the same cut.
    return cut.payload(store.iter_payload(shard, cut.source))


def write_archive(
    path: Path,
    store: Store,
    archive: Export,
    *,
    replace: bool = False,
    on_bytes: OnBytes = nobody,
    fs: FileSystem | None = None,
) -> None:
    """Write an archive as a file, which is there whole and durable, or not at all.

    Raises `AlreadyExistsError` if it is there, unless ``replace``; `SegmentCorruptError`;
    `StoreFullError` or `StoreError` for what the device refuses.
    """
    if path.exists() and not replace:
        raise AlreadyExistsError(
            f"{path} exists already", hint="name another file, or say --force", details={}
        )
    write_durable(
        path,
        archive_parts(store, archive, on_bytes),
        needed=archive.file_length,
        fs=fs or FileSystem(),
    )
