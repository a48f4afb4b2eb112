"""A table on disk, larger than memory if need be; `tables/format.py` has the byte layout."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from engram.conditional_memory import kernel
from engram.conditional_memory.tables import create as writing
from engram.conditional_memory.tables.base import Bytes, Int64Array, RowSource, StoredTable
from engram.conditional_memory.tables.cache import CacheStatistics, HotRowCache
from engram.conditional_memory.tables.create import Fill, Progress
from engram.conditional_memory.tables.format import PAGE, TableHeader, shard_path
from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError, SegmentCorruptError, StoreError

Reads = Literal["mmap", "direct"]

_BLOCK_BYTES: Final = 8 << 20


class DiskTable(StoredTable):
    """Rows in files, each distinct row of a batch read once.

    ``reads`` says how:

    - `mmap`: through the page cache. The kernel keeps what it likes, up to all free memory. A shard
      that is cut while it is open ends the process (SIGBUS); direct reads raise `StoreError`.
    - `direct`: past the page cache (O_DIRECT), in reads of 4 KiB or more. Memory is what
      ``cache_bytes`` allows and not more; ``threads`` reads are under way at once.

    ``cache_bytes`` keeps hot rows in a `HotRowCache`; 0: none. Opening checks the size of every
    shard; `verify` reads them all and checks the digests.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        reads: Reads = "mmap",
        cache_bytes: int = 0,
        threads: int = 8,
    ) -> None:
        if reads not in get_args(Reads):
            raise InvalidRequestError(
                f"unknown way to read {reads!r}", hint=f"there are: {', '.join(get_args(Reads))}"
            )
        self.folder = Path(folder)
        self.header = TableHeader.read(self.folder)
        super().__init__(
            self.header.rows, self.header.dim, self.header.row_format, deduplicate=True
        )
        self._files = _open_shards(self.folder, self.header, direct=reads == "direct")
        source: RowSource
        if reads == "direct":
            source = _DirectReads(self.header, self._files, threads)
        else:
            source = _MappedReads(self.header, self._files)
        self._source = source
        self._cache: HotRowCache | None = None
        if cache_bytes:
            try:
                self._cache = HotRowCache(source, self.row_bytes, cache_bytes)
            except InvalidRequestError:
                self.close()
                raise

    @classmethod
    def create(
        cls,
        folder: Path | str,
        rows: int,
        dim: int,
        dtype: RowFormat | str,
        fill: Fill,
        *,
        shard_rows: int | None = None,
        progress: Progress | bool | None = None,
        **options: object,
    ) -> DiskTable:
        """Write a table durably and open it with ``options`` of the constructor.

        ``fill(start, end)`` gives uint8 [end - start, row_bytes], or None for zeros; it is called
        in ascending order and never for more than about 8 MiB. Stopped halfway, the same call goes
        on with the first shard that is not finished, so more shards (``shard_rows`` rows each;
        None: 4 GiB) lose less. ``progress``: True draws a bar, a function gets (done, rows).

        Raises:
            AlreadyExistsError: the folder holds a finished table.
            StoreBusyError: another call writes into the folder.
            InvalidRequestError: it holds the beginning of another, or ``fill`` gives other shapes.
            StoreError: the disk failed or is full.
        """
        target = Path(folder)
        name = RowFormat.parse(dtype).value
        if progress is True:
            with _bar(rows) as draw:
                writing.create(target, rows, dim, name, fill, shard_rows=shard_rows, progress=draw)
        else:
            writing.create(
                target, rows, dim, name, fill, shard_rows=shard_rows, progress=progress or None
            )
        return cls(target, **options)  # type: ignore[arg-type]

    @property
    def cache_statistics(self) -> CacheStatistics | None:
        """Hits and misses of the cache; None without one."""
        return self._cache.statistics if self._cache is not None else None

    def read(self, ids: Int64Array) -> Bytes:
        try:
            return (self._cache or self._source).read(ids)
        except OSError as error:
            raise StoreError(
                f"cannot read rows of {self.folder}: {error.strerror or error}",
                hint="check the disk; DiskTable.verify names damaged shards",
            ) from error

    def blocks(self, block_bytes: int = _BLOCK_BYTES) -> Iterator[Bytes]:
        """All rows in order, as bytes [n, row_bytes]; past the cache."""
        self._check_open()
        step = max(1, block_bytes // self.row_bytes)
        for start in range(0, self.rows, step):
            yield self._source.read(np.arange(start, min(start + step, self.rows)))

    def verify(self) -> None:
        """Read every shard.

        Raises `SegmentCorruptError` naming the first that is damaged, or `StoreError` if one cannot
        be read.
        """
        for shard, wanted in enumerate(self.header.digests):
            path = shard_path(self.folder, shard)
            try:
                found = blake3(max_threads=2).update_mmap(path).hexdigest()
            except OSError as error:
                raise StoreError(
                    f"cannot read {path}: {error.strerror or error}", hint="check the disk"
                ) from error
            if found != wanted:
                raise SegmentCorruptError(
                    f"{path} is damaged: its digest is not the one in table.json",
                    hint="make the table again from its source",
                )

    def close(self) -> None:
        super().close()
        for file in self._files:
            os.close(file)
        self._files = []
        if isinstance(self._source, _MappedReads):
            self._source.close()


class _MappedReads:
    """Reads through one mapping a shard."""

    def __init__(self, header: TableHeader, files: list[int]) -> None:
        self._header = header
        self.maps: list[Bytes] = []
        for shard, file in enumerate(files):
            memory = mmap.mmap(file, 0, prot=mmap.PROT_READ)
            # Neighbours of a row are no likelier to be needed than any other.
            memory.madvise(mmap.MADV_RANDOM)
            start, end = header.shard_range(shard)
            flat = np.frombuffer(memory, np.uint8, (end - start) * header.row_bytes)
            self.maps.append(flat.reshape(-1, header.row_bytes))

    def read(self, ids: Int64Array) -> Bytes:
        if len(self.maps) == 1:
            return _take(self.maps[0], ids)
        out = np.empty((len(ids), self._header.row_bytes), dtype=np.uint8)
        shards = ids // self._header.shard_rows
        for shard in np.unique(shards).tolist():
            here = shards == shard
            out[here] = _take(self.maps[shard], ids[here] - shard * self._header.shard_rows)
        return out

    def close(self) -> None:
        self.maps = []


class _DirectReads:
    """Reads past the page cache. ``ids`` that ascend let one read serve neighbours."""

    def __init__(self, header: TableHeader, files: list[int], threads: int) -> None:
        self._header = header
        self._files = np.array(files, dtype=np.int32)
        self._threads = threads

    def read(self, ids: Int64Array) -> Bytes:
        files = self._files[ids // self._header.shard_rows]
        offsets = ids % self._header.shard_rows * self._header.row_bytes
        native = kernel.load()
        if native is not None:
            return native.read_rows(files, offsets, self._header.row_bytes, threads=self._threads)
        return self._read_one_by_one(files, offsets)

    def _read_one_by_one(self, files: npt.NDArray[np.int32], offsets: Int64Array) -> Bytes:
        size = self._header.row_bytes
        out = np.empty((len(offsets), size), dtype=np.uint8)
        # Anonymous memory begins at a page, as O_DIRECT demands.
        memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE)
        buffer = np.frombuffer(memory, np.uint8)
        for row, file in enumerate(files.tolist()):
            skip = int(offsets[row]) % PAGE
            start = int(offsets[row]) - skip
            got = os.preadv(file, [buffer[: -(-(skip + size) // PAGE) * PAGE].data], start)
            if got < skip + size:
                raise OSError(errno.ENODATA, f"a shard ends at byte {start + got}")
            out[row] = buffer[skip : skip + size]
        return out


def _take(rows: Bytes, ids: Int64Array) -> Bytes:
    native = kernel.load()
    return native.gather(rows, ids, threads=1) if native is not None else rows[ids]


def _open_shards(folder: Path, header: TableHeader, *, direct: bool) -> list[int]:
    files: list[int] = []
    try:
        for shard in range(header.shards):
            path = shard_path(folder, shard)
            files.append(os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)))
            found, wanted = os.fstat(files[-1]).st_size, header.shard_bytes(shard)
            if found != wanted:
                raise SegmentCorruptError(
                    f"{path} has {found} bytes, not {wanted}", hint="make the table again"
                )
    except OSError as error:
        _close_all(files)
        raise StoreError(
            f"cannot open {error.filename}: {error.strerror}",
            hint="the file is missing, or its file system has no direct reads: use reads='mmap'",
        ) from error
    except SegmentCorruptError:
        _close_all(files)
        raise
    return files


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


@contextmanager
def _bar(rows: int) -> Iterator[Progress]:
    """A progress bar in the terminal; the function draws it."""
    from rich.progress import Progress as Bar

    with Bar() as bar:
        task = bar.add_task("writing table", total=rows)
        yield lambda done, _: bar.update(task, completed=done)
