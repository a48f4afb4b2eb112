"""A table in host memory: huge pages, and pinned where there is a GPU to copy to."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from engram.conditional_memory import kernel
from engram.conditional_memory.hashing import NgramHashLayout
from engram.conditional_memory.tables.base import Bytes, Int64Array, StoredTable, check_ids
from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError, UnsupportedError

_HUGE_PAGE = 2 << 20


class HostTable(StoredTable):
    """Rows in anonymous memory of this process; zeros until written.

    Random reads of a large table miss the TLB at every row; 2 MiB pages make that rare, so the
    memory asks for them (``huge_pages``). ``pinned`` locks it for a GPU; None: if there is one.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        row_format: RowFormat | str = RowFormat.FP32,
        *,
        huge_pages: bool = True,
        pinned: bool | None = None,
        deduplicate: bool = False,
        threads: int = 1,
    ) -> None:
        super().__init__(rows, dim, RowFormat.parse(row_format), deduplicate=deduplicate)
        self.threads = threads
        size = -(-rows * self.row_bytes // _HUGE_PAGE) * _HUGE_PAGE
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        flat = np.frombuffer(self._memory, dtype=np.uint8, count=rows * self.row_bytes)
        self.data: Bytes = flat.reshape(rows, self.row_bytes)
        """uint8 [rows, row_bytes]."""
        self._pinned = torch.cuda.is_available() if pinned is None else pinned
        if self._pinned:
            _register(self.data.ctypes.data, size)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Set rows from ``start`` on to ``values`` [n, dim]. Raises `InvalidRequestError`."""
        if values.dim() != 2 or values.shape[1] != self.dim:
            raise InvalidRequestError(f"rows must be [n, {self.dim}], not {tuple(values.shape)}")
        self.write_raw(start, self.format.encode(values))

    def write_raw(self, start: int, raw: Bytes) -> None:
        """Set rows from ``start`` on to their bytes, uint8 [n, row_bytes].

        Raises `InvalidRequestError`.
        """
        self._check_open()
        if raw.ndim != 2 or raw.shape[1] != self.row_bytes or raw.dtype != np.uint8:
            raise InvalidRequestError(
                f"rows must be uint8 [n, {self.row_bytes}], not {raw.dtype} {raw.shape}",
                hint="RowFormat.encode makes them from numbers",
            )
        if not 0 <= start <= self.rows - len(raw):
            raise InvalidRequestError(
                f"rows {start} to {start + len(raw)} are outside the table of {self.rows} rows"
            )
        self.data[start : start + len(raw)] = raw

    def fill(self, blocks: Iterator[Bytes]) -> None:
        """Write all rows from consecutive blocks of bytes, as `DiskTable.blocks` gives them.

        Raises `InvalidRequestError` if they are more or fewer than the rows.
        """
        start = 0
        for block in blocks:
            self.write_raw(start, block)
            start += len(block)
        if start != self.rows:
            raise InvalidRequestError(
                f"the blocks had {start} rows, the table has {self.rows}",
                hint="fill it from a table of the same rows",
            )

    def read(self, ids: Int64Array) -> Bytes:
        native = kernel.load()
        if native is not None:
            return native.gather(self.data, ids, threads=self.threads)
        rows = torch.from_numpy(self.data).index_select(0, torch.from_numpy(ids))
        return np.asarray(rows.numpy())

    def lookup(
        self, layout: NgramHashLayout, window: torch.Tensor, layer_id: int | None = None
    ) -> torch.Tensor:
        self._check_open()
        native = kernel.load()
        if native is None or self.deduplicate or window.is_cuda:
            return super().lookup(layout, window, layer_id)
        # Hashed and gathered in one pass: the ids never leave the cache.
        plan = layout.plan(layer_id)
        check_ids(np.array([plan.rows - 1]), self.rows)  # the kernel does not look
        raw = native.hash_gather(window, plan, self.data, threads=self.threads)
        self.statistics.requested += len(raw)
        self.statistics.read += len(raw)
        values = self.format.decode(raw, self.dim)
        batch, length = window.shape[0], window.shape[1] - plan.max_n + 1
        return values.reshape(batch, length, plan.columns * self.dim)

    def close(self) -> None:
        if self._open and self._pinned:
            _cudart().cudaHostUnregister(self.data.ctypes.data)
        super().close()
        # numpy exports the buffer; the memory goes when the last array does.
        self.data = np.empty((0, self.row_bytes), dtype=np.uint8)


def _register(address: int, size: int) -> None:
    if not torch.cuda.is_available():
        raise UnsupportedError("pinned memory needs a GPU", hint="leave pinned at None")
    torch.cuda.check_error(_cudart().cudaHostRegister(address, size, 0))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
