"""Snapshots to one portable file.  Reading only: a server may be using the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engram.core.tokens import TokenArray
from engram.errors import AlreadyExistsError, NotFoundError, SnapshotCorruptError
from engram.snapshot.archive import Archive, plan_archive, segments_of
from engram.snapshot.chain import Link, chain_problem, tokens_problem
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store.base import Store
from engram.store.durable import write_durable
from engram.store.filesystem import FileSystem

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


def plan_export(store: Store, manifests: Sequence[Manifest]) -> Archive:
    """The archive of some snapshots of one tenant.

    Raises `SnapshotCorruptError` if a segment is missing or is not the one a manifest speaks of,
    `NotFoundError` if a namespace is not described, `InvalidRequestError` if it would be too large.
    """
    headers: dict[tuple[Shard, str], SegmentHeader] = {}
    tokens: dict[tuple[Shard, str], TokenArray] = {}
    for manifest in manifests:
        for shard, segment_id in segments_of(manifest):
            if (shard, segment_id) not in headers:
                header, rows = store.read_tokens(shard, segment_id)
                headers[shard, segment_id] = header
                if shard.rank == 0:
                    tokens[shard, segment_id] = rows
        require_whole(manifest, headers, tokens)
    namespaces = [
        store.get_namespace(namespace) for namespace in sorted({m.namespace for m in manifests})
    ]
    archive = plan_archive(
        manifests, namespaces, [(segment_id, header) for (_, segment_id), header in headers.items()]
    )
    # So that one that is too large is refused before a file is begun.
    assert archive.header
    return archive


def require_whole(
    manifest: Manifest,
    headers: dict[tuple[Shard, str], SegmentHeader],
    tokens: dict[tuple[Shard, str], TokenArray],
) -> None:
    """Raise `SnapshotCorruptError` unless a manifest agrees with its segments' headers and tokens.

    Tokens are needed of rank 0 only.
    """
    problem = None
    for rank, chain in enumerate(manifest.segments):
        shard = Shard(manifest.namespace, rank, manifest.world_size)
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
    store: Store, archive: Archive, on_bytes: OnBytes = nobody
) -> Iterator[memoryview | bytes]:
    """The bytes of an archive, in pieces of bounded size, each valid until the next.

    They are whole when the iterator has ended: it raises `SegmentCorruptError` for a segment that
    is damaged, and whoever collects the bytes must then throw them away.
    """
    yield archive.header
    position = 0
    for segment in archive.segments:
        yield bytes(segment.offset - position)
        for piece in store.iter_payload(segment.header.shard, segment.segment_id):
            yield piece
            on_bytes(len(piece))
        position = segment.end


def write_archive(
    path: Path,
    store: Store,
    archive: Archive,
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
