"""A table in a module's own parameters: for training, and for tables that fit the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from engram.conditional_memory.tables.base import MemoryTable, check_ids
from engram.conditional_memory.tables.rows import RowFormat, decode_fp8, encode_fp8
from engram.errors import InvalidRequestError


class TorchTable(nn.Module, MemoryTable):
    """``weight`` [rows, dim], a parameter; fp8 rows are buffers ``weight`` and ``scale`` instead.

    With ``sparse`` its gradient is a sparse tensor with the rows of the batch alone.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        rows: int,
        dim: int,
        row_format: RowFormat | str = RowFormat.FP32,
        *,
        init_std: float = 1.0,
        sparse: bool = False,
        weight: torch.Tensor | None = None,
    ) -> None:
        """``weight`` [rows, dim], where given, is taken instead of random numbers.

        Raises `InvalidRequestError` if it has another shape.
        """
        super().__init__()
        if weight is not None and weight.shape != (rows, dim):
            raise InvalidRequestError(
                f"weight must be {(rows, dim)}, not {tuple(weight.shape)}",
                hint="give the table the rows and dim of its weight",
            )
        self.rows = rows
        self.dim = dim
        self.format = RowFormat.parse(row_format)
        self.sparse = sparse
        values = torch.empty(rows, dim).normal_(std=init_std) if weight is None else weight
        if self.format is RowFormat.FP8:
            numbers, exponents = encode_fp8(values)
            self.register_buffer("weight", numbers)
            self.register_buffer("scale", exponents)
        elif weight is not None and weight.dtype == torch.float64:
            self.weight = nn.Parameter(weight)
        else:
            self.weight = nn.Parameter(values.to(self.format.output_dtype))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.format is RowFormat.FP8 else self.weight.dtype

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        if not ids.is_cuda:
            check_ids(ids.detach().reshape(-1).to(torch.int64).numpy(), self.rows)
        ids = ids.to(self.weight.device)
        if self.format is not RowFormat.FP8:
            return F.embedding(ids, self.weight, sparse=self.sparse)
        flat = ids.reshape(-1)
        # Indexed as bytes: few operations exist for the fp8 dtypes themselves.
        numbers = self.weight.view(torch.uint8)[flat].view(torch.float8_e4m3fn)
        return decode_fp8(numbers, self.scale[flat]).reshape(*ids.shape, self.dim)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> TorchTable:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            # A model cast to another dtype keeps its fp8 rows: their bytes are the format.
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        keeps = self.format is RowFormat.FP8
        super()._apply(moved if keeps else fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.dim}, {self.format.value}"
