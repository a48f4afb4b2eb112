"""The norm with a gate that delta nets end with, in plain torch.

Stands in for `FusedRMSNormGated.forward` and `RMSNorm.forward` of SGLang's flash-linear-attention
modules (Triton there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def fused_rms_norm_gated_forward(
    self: Any,
    x: torch.Tensor,
    g: torch.Tensor,
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> torch.Tensor:
    """`FusedRMSNormGated.forward`: norm(x) * weight * gate(g), over the last axis of both.

    Raises:
        NotImplementedError: with a residual, which none of the served models has there.
    """
    if residual is not None or prenorm or residual_in_fp32:
        raise NotImplementedError("the CPU norm with a gate takes no residual")
    return _norm_gated(x, g, self.weight, self.eps, self.activation).to(x.dtype)


def rms_norm_gated_forward(
    self: Any, x: torch.Tensor, z: torch.Tensor | None = None
) -> torch.Tensor:
    """`RMSNorm.forward` with a gate `z` after the norm.

    Raises:
        NotImplementedError: for norms by group, and a gate that comes before the norm.
    """
    if z is None or not self.norm_before_gate or self.group_size not in (None, x.shape[-1]):
        raise NotImplementedError("the CPU norm with a gate has one group, and the gate after it")
    return _norm_gated(x, z, self.weight, self.eps, self.activation).to(x.dtype)


def _norm_gated(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float, activation: str
) -> torch.Tensor:
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.float()
    gate = gate.float().reshape(value.shape)
    return value * (torch.sigmoid(gate) if activation == "sigmoid" else functional.silu(gate))
