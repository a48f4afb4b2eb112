"""The context gate: how much of the looked-up memory enters each branch of the hidden state."""

from __future__ import annotations

import math

import torch
from torch import nn

from engram.conditional_memory.config import GateTransform

# Below this a square root's slope grows without bound; the demo and V4.1 clamp here.
_SMALLEST = 1e-6


class ContextGate(nn.Module):
    """Value scaled by sigmoid(f(RMSNorm(key) . RMSNorm(hidden) / sqrt(D))), per branch.

    The paper's section 2.3, with the demo's bias and signed square root switchable. Each of the G
    branches has a key projection and norms of its own; the value projection is shared.

    Parameters: ``key_proj`` [G * D, M], ``value_proj`` [D, M], ``key_norm`` and ``query_norm``
    [G, D].
    """

    def __init__(
        self,
        memory_dim: int,
        hidden_dim: int,
        *,
        num_branches: int = 1,
        transform: GateTransform = "signed_sqrt",
        bias: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.num_branches = num_branches
        self.transform = transform
        self.norm_eps = norm_eps
        self.key_proj = nn.Linear(memory_dim, num_branches * hidden_dim, bias=bias)
        self.value_proj = nn.Linear(memory_dim, hidden_dim, bias=bias)
        self.key_norm = nn.Parameter(torch.ones(num_branches, hidden_dim))
        self.query_norm = nn.Parameter(torch.ones(num_branches, hidden_dim))

    def forward(
        self, hidden: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` [B, T, G, D] and ``memory`` [B, T, M] to value [B, T, G, D], gate [B, T, G].

        Computed, and returned, in at least float32: the gate is a difference of large sums.
        """
        memory = memory.to(self.key_proj.weight.dtype)
        key = self.key_proj(memory).unflatten(-1, (self.num_branches, self.hidden_dim))
        normed_key = rms_norm(key, self.key_norm, self.norm_eps)
        normed_query = rms_norm(hidden, self.query_norm, self.norm_eps)
        dot = (normed_key * normed_query).sum(-1) / math.sqrt(self.hidden_dim)
        gate = torch.sigmoid(self._transformed(dot))
        value = self.value_proj(memory).to(gate.dtype)
        return gate.unsqueeze(-1) * value.unsqueeze(-2), gate

    def _transformed(self, dot: torch.Tensor) -> torch.Tensor:
        if self.transform == "identity":
            return dot
        root = dot.abs().clamp_min(_SMALLEST).sqrt()
        return torch.copysign(root, dot) if self.transform == "copysign_sqrt" else root * dot.sign()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, in at least float32.

    ``eps`` is added to the mean square; None takes the machine epsilon of the dtype computed in
    (float32 for a bfloat16 x), as ``torch.nn.RMSNorm`` does.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.to(wide.dtype)
