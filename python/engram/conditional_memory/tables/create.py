"""Writing a table to disk, shard by shard; stopped halfway it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from engram.conditional_memory.tables.base import Bytes
from engram.conditional_memory.tables.format import (
    HEADER,
    TableHeader,
    digest_path,
    shard_path,
)
from engram.errors import AlreadyExistsError, InvalidRequestError
from engram.store.durable import unlink_durable, write_durable
from engram.store.filesystem import FileSystem

Fill = Callable[[int, int], Bytes | None]
"""``fill(start, end)`` gives the bytes [end - start, row_bytes] of rows; None: they are zero."""

Progress = Callable[[int, int], None]
"""``progress(done, rows)`` is called after every block."""

_BLOCK_BYTES: Final = 8 << 20
_DEFAULT_SHARD_BYTES: Final = 4 << 30


def create(
    folder: Path,
    rows: int,
    dim: int,
    dtype: str,
    fill: Fill,
    *,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a table. `DiskTable.create` has the contract."""
    if (folder / HEADER).exists():
        raise AlreadyExistsError(f"{folder} holds a table already", hint="choose another folder")
    draft = TableHeader(rows, dim, dtype, max(1, shard_rows or rows), ())
    if shard_rows is None:
        shard_rows = min(rows, max(1, _DEFAULT_SHARD_BYTES // draft.row_bytes))
        draft = TableHeader(rows, dim, dtype, shard_rows, ())
    fs = FileSystem()
    folder.mkdir(parents=True, exist_ok=True)
    _resume(folder, draft, fs)
    digests = []
    for shard in range(draft.shards):
        marker = digest_path(folder, shard)
        if not marker.exists():
            digest = _write_shard(folder, draft, shard, fill, progress, fs)
            # After the shard itself is durable: a digest promises that it is.
            write_durable(marker, [digest.encode()], needed=len(digest), fs=fs)
        elif progress is not None:
            progress(draft.shard_range(shard)[1], rows)
        digests.append(marker.read_text())
    header = TableHeader(rows, dim, dtype, draft.shard_rows, tuple(digests)).encode()
    write_durable(folder / HEADER, [header], needed=len(header), fs=fs)
    for shard in range(draft.shards):
        unlink_durable(digest_path(folder, shard), fs)
    unlink_durable(folder / _PLAN, fs)


_PLAN: Final = "unfinished.json"


def _resume(folder: Path, draft: TableHeader, fs: FileSystem) -> None:
    """Make sure that what an earlier call left belongs to the same table."""
    plan = folder / _PLAN
    encoded = draft.encode()
    if not plan.exists():
        write_durable(plan, [encoded], needed=len(encoded), fs=fs)
    elif plan.read_bytes() != encoded:
        raise InvalidRequestError(
            f"{folder} holds the beginning of another table",
            hint="give the same rows, dim, dtype and shard_rows, or another folder",
        )


def _write_shard(
    folder: Path,
    header: TableHeader,
    shard: int,
    fill: Fill,
    progress: Progress | None,
    fs: FileSystem,
) -> str:
    hasher = blake3()

    def parts() -> Iterator[memoryview]:
        for block in _blocks(header, shard, fill, progress):
            hasher.update(block)
            yield block

    size = header.shard_bytes(shard)
    write_durable(shard_path(folder, shard), parts(), needed=size, fs=fs)
    return hasher.hexdigest()


def _blocks(
    header: TableHeader, shard: int, fill: Fill, progress: Progress | None
) -> Iterator[memoryview]:
    """The bytes of a shard's file, in pieces."""
    first, last = header.shard_range(shard)
    step = max(1, _BLOCK_BYTES // header.row_bytes)
    for start in range(first, last, step):
        end = min(start + step, last)
        raw = fill(start, end)
        wanted = (end - start, header.row_bytes)
        if raw is None:
            raw = np.zeros(wanted, dtype=np.uint8)
        if raw.shape != wanted or raw.dtype != np.uint8:
            raise InvalidRequestError(
                f"rows {start} to {end} must come as uint8 {wanted}, not {raw.dtype} {raw.shape}",
                hint="RowFormat.encode makes them from numbers",
            )
        yield np.ascontiguousarray(raw).data.cast("B")
        if progress is not None:
            progress(end, header.rows)
    padding = header.shard_bytes(shard) - (last - first) * header.row_bytes
    yield memoryview(bytes(padding))
