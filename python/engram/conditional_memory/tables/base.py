"""The contract of a table, and what tables of raw rows share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from engram.conditional_memory.hashing import NgramHashLayout
from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError

Bytes = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
Table = TypeVar("Table", bound="MemoryTable")
Stored = TypeVar("Stored", bound="StoredTable")


class MemoryTable(ABC):
    """Rows of ``dim`` numbers, looked up by id.

    Every implementation gives the same numbers for the same rows, whatever order, shape or
    repetition ids come in. `gather` may be called from several threads at once, `close` only when
    no gather runs, and again without effect. An id outside 0 .. rows - 1 is an
    `InvalidRequestError` (on a CPU).
    """

    rows: int
    dim: int

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that `gather` returns: float32, or bfloat16 for bf16 and fp8 rows."""

    @abstractmethod
    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids``, integers of any shape, to [*ids.shape, dim]."""

    def lookup(
        self, layout: NgramHashLayout, window: torch.Tensor, layer_id: int | None = None
    ) -> torch.Tensor:
        """Rows of the n-grams in ``window`` (see `NgramHashLayout.window`): [B, T, C * dim]."""
        return self.gather(layout.hash_window(window, layer_id)).flatten(-2)

    def close(self) -> None:
        """Free what the table holds; it cannot be used afterwards."""
        return

    def __enter__(self: Table) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class RowSource(Protocol):
    """Where raw rows come from: a home, or a cache in front of one."""

    def read(self, ids: Int64Array) -> Bytes:
        """``ids`` int64 [n], checked, to bytes [n, row_bytes]."""


@dataclass
class GatherStatistics:
    """Counted since the table was opened: rows asked for, and rows read after deduplication."""

    requested: int = 0
    read: int = 0

    @property
    def dedup_ratio(self) -> float:
        """Rows asked for, for each that was read."""
        return self.requested / self.read if self.read else 1.0


class StoredTable(MemoryTable):
    """A table of raw rows: reads each distinct row of a batch once, then decodes and repeats it.

    ``deduplicate`` pays where a read costs more than sorting an id: on disk and behind a cache. A
    deep copy is the same table.
    """

    def __init__(self, rows: int, dim: int, row_format: RowFormat, *, deduplicate: bool) -> None:
        if rows < 1 or dim < 1:
            raise InvalidRequestError(
                f"a table has at least one row and one column, not {rows} x {dim}"
            )
        self.rows = rows
        self.dim = dim
        self.format = row_format
        self.row_bytes = row_format.row_bytes(dim)
        self.deduplicate = deduplicate
        self.statistics = GatherStatistics()
        self._open = True

    @property
    def dtype(self) -> torch.dtype:
        return self.format.output_dtype

    @abstractmethod
    def read(self, ids: Int64Array) -> Bytes:
        """``ids`` int64 [n], all of them rows, to bytes [n, row_bytes]."""

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        self._check_open()
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.dim, dtype=self.dtype)
        flat = ids.detach().cpu().to(torch.int64).reshape(-1).numpy()
        check_ids(flat, self.rows)
        if self.deduplicate:
            wanted, inverse = np.unique(flat, return_inverse=True)
            rows = self.format.decode(self.read(wanted), self.dim)
            values = rows.index_select(0, torch.from_numpy(inverse))
        else:
            wanted = flat
            values = self.format.decode(self.read(flat), self.dim)
        self.statistics.requested += flat.size
        self.statistics.read += wanted.size
        return values.reshape(*ids.shape, self.dim)

    def __deepcopy__(self: Stored, memo: dict[int, object]) -> Stored:
        # A copy of a module shares it: it may be larger than memory, and its files have one owner.
        return self

    def close(self) -> None:
        self._open = False

    def _check_open(self) -> None:
        # The memory is gone, and a file's number may be another file's by now.
        if not self._open:
            raise InvalidRequestError(
                "the table is closed", hint="close a table after its last gather, or open it again"
            )


def check_ids(ids: Int64Array, rows: int) -> None:
    """Raise `InvalidRequestError` unless all ``ids`` are rows of a table."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InvalidRequestError(
            f"row {wrong} is outside the table of {rows} rows",
            hint="the table and the hash layout must come from one config",
        )
