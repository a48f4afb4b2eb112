"""Damage to a stored snapshot, for tests of a store that no server has open.

`rewrite_segment` plays the attacker or the faulty computation: bytes change and every digest is
made right again, so that nothing but the model's own output can tell. `flip_byte` and `DAMAGES`
play the disk. `rename_namespace` plays a server of other settings, one setting at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from engram.core.namespace import FieldValue, Namespace
from engram.snapshot.manifest import Manifest, SegmentRef, change_manifest
from engram.snapshot.segment import TOKENS, BufferSpec, SegmentHeader, Shard
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.tiers.payload import views

Edit = Callable[[SegmentHeader, memoryview], None]
"""Changes a payload (writable bytes, laid out as its header says) in place."""


def rewrite_segment(
    root: Path, snapshot_id: str, edit: Edit, buffer: str | None = None
) -> Manifest:
    """Edit the payload of one of a snapshot's segments and make all that names it consistent.

    It is the last one, or the last that has a buffer named ``buffer``. It gets the id that its new
    bytes have, those after it name that, the manifest refers to all and is sealed again, and the
    catalog goes, so that the next server builds it from the manifests. An edit that changes nothing
    leaves every file but the catalog as it was. Only the first rank's chain is edited. No other
    snapshot may name the segment or one after it: it would be left without its file.

    Returns the manifest that is stored now. Raises `StoreBusyError` while a server has the store,
    `KeyError` if no segment has the buffer.
    """
    with DiskStore.open(root) as store:
        manifest = store.get_manifest(snapshot_id)
        chain, shard = list(manifest.segments[0]), shard_of(manifest)
        first = len(chain) - 1 if buffer is None else _last_with(store, manifest, buffer)
        for index in range(first, len(chain)):
            header, payload = read_payload(store, shard, chain[index].segment_id)
            if index == first:
                edit(header, memoryview(payload))
            else:
                header = _planned_again(header, shard, chain[index - 1].segment_id)
            segment_id = store.put_segment(header, memoryview(payload))
            chain[index] = SegmentRef(**{**chain[index].model_dump(), "segment_id": segment_id})
        before = manifest.segments[0]
        if tuple(chain) != before:
            segments = (tuple(chain), *manifest.segments[1:])
            manifest = change_manifest(manifest, segments=segments)
            store.put_manifest(manifest, replace=True)
            for ref in before[first:]:
                store.delete_segment(shard, ref.segment_id)
    remove_catalog(root)
    return manifest


def add_to_value(buffer: str, change: float) -> Edit:
    """An edit that adds to the first value of a named buffer, whatever its dtype."""

    def edit(header: SegmentHeader, payload: memoryview) -> None:
        find_buffer(header, buffer)
        whole = torch.frombuffer(payload, dtype=torch.uint8)
        views(whole, header.buffers)[buffer].view(-1)[0] += change

    return edit


def rename_namespace(root: Path, snapshot_id: str, **changes: FieldValue) -> Manifest:
    """Make a snapshot one of a namespace in which some fields have other values.

    Its files are what a server of that namespace would have written: segments, manifest and the
    namespace's description, all consistent; the next server reads the manifest again. Only the
    first rank's chain is moved, and no other snapshot may name its segments. Raises
    `StoreBusyError` while a server has the store.
    """
    with DiskStore.open(root) as store:
        manifest = store.get_manifest(snapshot_id)
        old = store.get_namespace(manifest.namespace)
        namespace = Namespace({**old.fields, **changes})
        shard = Shard(namespace.id, 0, manifest.world_size)
        chain: list[SegmentRef] = []
        for ref in manifest.segments[0]:
            header, payload = read_payload(store, shard_of(manifest), ref.segment_id)
            renamed = _planned_again(header, shard, chain[-1].segment_id if chain else None)
            segment_id = store.put_segment(renamed, memoryview(payload))
            fields = {"segment_id": segment_id, "bytes": renamed.file_length}
            chain.append(SegmentRef(**{**ref.model_dump(), **fields}))
        changed = change_manifest(manifest, namespace=namespace.id, segments=(tuple(chain),))
        store.put_namespace(namespace)
        store.put_manifest(changed, replace=True)
        for ref in manifest.segments[0]:
            store.delete_segment(shard_of(manifest), ref.segment_id)
    return changed


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rot(path: Path) -> None:
    """`flip_bit` as a disk does it: the file's time and everything else stay."""
    before = path.stat()
    flip_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES: Final[dict[str, Callable[[Path], None]]] = {
    "flipped": flip_bit,
    "rotted": rot,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}
"""What can happen to a file, by name."""


def flip_byte(
    root: Path, manifest: Manifest, buffer: str, *, segment: int = -1, offset: int = 0
) -> Path:
    """Invert one byte of a named buffer in a segment of the first rank's chain.

    ``segment`` counts along the chain, ``offset`` in bytes from the buffer's start. Every digest
    stays. Returns the file.
    """
    shard, segment_id = shard_of(manifest), manifest.segments[0][segment].segment_id
    with DiskStore.open(root, lock=False) as store:
        header, _ = read_payload(store, shard, segment_id)
    path = Layout(root).segment(shard, segment_id)
    position = len(header.prefix) + find_buffer(header, buffer).offset + offset
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0xFF]))
    return path


def read_manifest(root: Path, snapshot_id: str) -> Manifest:
    """A snapshot's manifest, read beside whatever server has the store."""
    with DiskStore.open(root, lock=False) as store:
        return store.get_manifest(snapshot_id)


def remove_catalog(root: Path) -> None:
    """Delete the catalog; the next server builds it from the manifests."""
    catalog = Layout(root).catalog
    for path in catalog.parent.glob(catalog.name + "*"):
        path.unlink()


def shard_of(manifest: Manifest) -> Shard:
    """Where the first rank's segments of a snapshot lie."""
    return Shard(manifest.namespace, 0, manifest.world_size)


def _planned_again(header: SegmentHeader, shard: Shard, parent: str | None) -> SegmentHeader:
    """The header of the same payload in a shard, after a parent."""
    return SegmentHeader.plan(
        shard=shard,
        key=header.key,
        start=header.start,
        end=header.end,
        parent=parent,
        has_state=header.has_state,
        buffers=[(b.name, b.dtype, b.shape) for b in header.buffers if b.name != TOKENS],
    )


def _last_with(store: DiskStore, manifest: Manifest, buffer: str) -> int:
    """Where in the first rank's chain the last segment with that buffer is."""
    found = [
        index
        for index, ref in enumerate(manifest.segments[0])
        for header, _ in (read_payload(store, shard_of(manifest), ref.segment_id),)
        if any(spec.name == buffer for spec in header.buffers)
    ]
    if not found:
        raise KeyError(f"no segment has a buffer {buffer!r}")
    return found[-1]


def find_buffer(header: SegmentHeader, name: str) -> BufferSpec:
    """The buffer of that name. Raises KeyError naming those there are."""
    for spec in header.buffers:
        if spec.name == name:
            return spec
    raise KeyError(f"no buffer {name!r}; there are {[spec.name for spec in header.buffers]}")


def read_payload(
    store: DiskStore, shard: Shard, segment_id: str
) -> tuple[SegmentHeader, bytearray]:
    """A segment's header and its payload, verified."""
    payload = bytearray()

    def into(header: SegmentHeader) -> memoryview:
        payload.extend(bytes(header.payload_length))
        return memoryview(payload)

    return store.read_segment(shard, segment_id, into), payload
