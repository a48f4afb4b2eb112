"""The short convolution behind the gate: a few earlier memories, mixed channel by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engram.conditional_memory.gate import rms_norm


class ShortConv(nn.Module):
    """SiLU of a depthwise causal convolution of the RMS-normed values (paper, section 2.3).

    Parameters: ``weight`` [G * D, K], oldest tap first, and ``norm`` [G, D].

    With ``zero_init`` the output starts at zero, so that a memory added to a trained model leaves
    it as it was; then ``norm`` gets a gradient only after the first step.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        num_branches: int = 1,
        kernel_size: int = 4,
        dilation: int = 1,
        norm_eps: float = 1e-5,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.zeros(num_branches * hidden_dim, kernel_size))
        if not zero_init:
            # The range of torch.nn.Conv1d with one input channel a group.
            nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)
        self.norm = nn.Parameter(torch.ones(num_branches, hidden_dim))

    @property
    def context(self) -> int:
        """Earlier tokens that an output depends on."""
        return (self.weight.shape[1] - 1) * self.dilation

    def start(self, batch_size: int) -> torch.Tensor:
        """What stands before the first token: zeros [B, G * D, context]."""
        return self.norm.new_zeros(batch_size, self.weight.shape[0], self.context)

    def normed(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [B, T, G, D] as the convolution takes it: [B, G * D, T]."""
        return rms_norm(value, self.norm, self.norm_eps).flatten(-2).transpose(1, 2)

    def forward(self, value: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
        """``value`` [B, T, G, D] to the same shape.

        ``window`` [B, G * D, context + T], where given, is the normed input with what came before
        it; ``value`` then only lends its shape.
        """
        if value.shape[1] == 0:
            return value
        if window is None:
            window = F.pad(self.normed(value), (self.context, 0))
        weight = self.weight.to(window.dtype).unsqueeze(1)
        mixed = F.conv1d(window, weight, groups=weight.shape[0], dilation=self.dilation)
        return F.silu(mixed).transpose(1, 2).reshape(value.shape)
