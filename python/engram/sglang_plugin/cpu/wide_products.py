"""Matrix products whose result is wider than what they multiply, on the CPU.

torch has `torch.mm(a, b, out_dtype=...)` for CUDA alone; `NemotronHMoE._forward_core_normal` scores
its experts with it. This gives the operator a kernel for the CPU.
"""

from __future__ import annotations

import torch

_OPERATOR = "mm.dtype"
_library: list[torch.library.Library] = []  # a registration lasts as long as its library


def mm_dtype(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """The product of [n, k] and [k, m] in `out_dtype`, computed in that as well."""
    return torch.mm(a.to(out_dtype), b.to(out_dtype))


def register() -> str:
    """Register the kernel in this process; may be called again. Returns the operator's name."""
    if not _library and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"aten::{_OPERATOR}", "CPU"
    ):
        library = torch.library.Library("aten", "IMPL")
        library.impl(_OPERATOR, mm_dtype, "CPU")
        _library.append(library)
    return f"torch.ops.aten.{_OPERATOR}"
