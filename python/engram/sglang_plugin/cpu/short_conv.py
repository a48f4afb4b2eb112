"""Which way LFM2-MoE's short convolutions go on the CPU.

Stands in for `can_dispatch_fused_lfm_short_conv` of SGLang: its fused kernels are for CUDA, and the
other way is `causal_conv`, as in the dense LFM2.
"""

from __future__ import annotations

import torch


def can_dispatch_fused_lfm_short_conv(
    b: torch.Tensor,
    c: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
) -> bool:
    """Return False, whatever the shapes are."""
    del b, c, x, weight, bias, state
    return False
