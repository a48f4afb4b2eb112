"""The functions of `engram_kernel` over torch tensors and `HashPlan`. Imported if installed."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

import engram_kernel
from engram.conditional_memory.hash_plan import HashPlan

ABI_VERSION = 1

Bytes = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


class NativeKernel:
    """Hash and gather on a CPU, outside the GIL."""

    def __init__(self) -> None:
        # Filling a plan's C structure takes longer than hashing one token.
        self._plans: WeakKeyDictionary[HashPlan, dict[bool, engram_kernel.Plan]]
        self._plans = WeakKeyDictionary()

    def hash_window(
        self,
        window: torch.Tensor,
        plan: HashPlan,
        offsets: bool,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``window`` int64 [B, max_n - 1 + T] to [B, T, C] of ``dtype`` int64 or int32."""
        narrow = np.int32 if dtype == torch.int32 else np.int64
        native = self._native(plan, offsets)
        target = None if out is None else out.numpy()
        return torch.from_numpy(engram_kernel.hash_window(native, window.numpy(), narrow, target))

    def gather(
        self, table: Bytes, ids: Int64Array, *, threads: int, out: Bytes | None = None
    ) -> Bytes:
        """Rows of ``table`` [rows, row_bytes], into ``out`` if given; ``ids`` are not checked."""
        return np.asarray(engram_kernel.gather(table, ids, threads, out))

    def hash_gather(
        self, window: torch.Tensor, plan: HashPlan, table: Bytes, *, threads: int
    ) -> Bytes:
        """`hash_window` and `gather` at once: [B * T * C, row_bytes]."""
        native = self._native(plan, True)
        return np.asarray(engram_kernel.hash_gather(native, window.numpy(), table, threads))

    def read_rows(
        self, files: npt.NDArray[np.int32], offsets: Int64Array, row_bytes: int, *, threads: int
    ) -> Bytes:
        """Rows at byte ``offsets`` of open ``files``. Raises OSError."""
        return np.asarray(engram_kernel.read_rows(files, offsets, row_bytes, threads))

    def _native(self, plan: HashPlan, offsets: bool) -> engram_kernel.Plan:
        plans = self._plans.setdefault(plan, {})
        if offsets in plans:
            return plans[offsets]
        made = engram_kernel.Plan(
            polynomial=plan.polynomial,
            min_n=plan.min_n,
            max_n=plan.max_n,
            heads=plan.moduli.shape[1],
            pad=plan.pad,
            blocks=plan.blocks,
            multipliers=plan.multipliers,
            moduli=plan.moduli.ravel(),
            sizes=plan.sizes,
            offsets=plan.offsets if offsets else np.zeros_like(plan.offsets),
        )
        return plans.setdefault(offsets, made)
