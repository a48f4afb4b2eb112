"""Writing a table to disk, shard by shard; stopped halfway it goes on where it was."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from engram.errors import AlreadyExistsError, InvalidRequestError, StoreBusyError
from engram.store.durable import store_error, unlink_durable, write_durable
from engram.store.filesystem import FileSystem
from engram.store.lock import lock_directory

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
    draft = TableHeader(rows, dim, dtype, rows if shard_rows is None else shard_rows, ())
    if shard_rows is None:
        shard_rows = min(rows, max(1, _DEFAULT_SHARD_BYTES // draft.row_bytes))
        draft = TableHeader(rows, dim, dtype, shard_rows, ())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error("make", folder, error) from error
    with _alone(folder):
        _create(folder, draft, fill, progress, FileSystem())


def _create(
    folder: Path, draft: TableHeader, fill: Fill, progress: Progress | None, fs: FileSystem
) -> None:
    if (folder / HEADER).exists():
        raise AlreadyExistsError(f"{folder} holds a table already", hint="choose another folder")
    _resume(folder, draft, fs)
    digests = []
    for shard in range(draft.shards):
        marker = digest_path(folder, shard)
        if not _finished(folder, draft, shard):
            digest = _write_shard(folder, draft, shard, fill, progress, fs)
            # After the shard itself is durable: a digest promises that it is.
            write_durable(marker, [digest.encode()], needed=len(digest), fs=fs)
        elif progress is not None:
            progress(draft.shard_range(shard)[1], draft.rows)
        digests.append(marker.read_text())
    header = replace(draft, digests=tuple(digests)).encode()
    write_durable(folder / HEADER, [header], needed=len(header), fs=fs)
    for shard in range(draft.shards):
        unlink_durable(digest_path(folder, shard), fs)
    unlink_durable(folder / _PLAN, fs)


_PLAN: Final = "unfinished.json"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two calls at once would each put their shards beside the other's digests."""
    try:
        held = lock_directory(folder, fcntl.LOCK_EX)
    except BlockingIOError:
        raise StoreBusyError(
            f"another call writes a table into {folder}", hint="wait for it, or use another folder"
        ) from None
    except OSError as error:
        raise store_error("open", folder, error) from error
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _finished(folder: Path, draft: TableHeader, shard: int) -> bool:
    """Whether an earlier call wrote the whole shard, and nothing cut it since."""
    try:
        whole = shard_path(folder, shard).stat().st_size == draft.shard_bytes(shard)
        return whole and len(digest_path(folder, shard).read_bytes()) == blake3.digest_size * 2
    except FileNotFoundError:
        return False


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
