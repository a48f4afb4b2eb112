"""Takes apart what the two input projections of a gated delta net give, in plain torch.

Stands in for `fused_qkvzba_split_reshape_cat` (Qwen3-Next, whose projections lie key head by key
head) and `fused_qkvzba_split_reshape_cat_contiguous` (Qwen3.5) of SGLang (Triton there).
"""

from __future__ import annotations

import torch

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""[q | k | v] flat, [tokens, channels]; z [tokens, heads, value_dim]; b and a [tokens, heads]."""


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> Parts:
    """Each key head has its q, k, and the v, z, b and a of its value heads side by side."""
    tokens, own = mixed_qkvz.shape[0], num_heads_v // num_heads_qk
    sizes = [head_qk, head_qk, own * head_v, own * head_v]
    q, k, v, z = mixed_qkvz.view(tokens, num_heads_qk, -1).split(sizes, dim=2)
    b, a = mixed_ba.view(tokens, num_heads_qk, -1).split(own, dim=2)
    mixed_qkv = torch.cat([part.reshape(tokens, -1) for part in (q, k, v)], dim=1)
    return (
        mixed_qkv,
        z.reshape(tokens, num_heads_v, head_v),
        b.reshape(tokens, num_heads_v),
        a.reshape(tokens, num_heads_v),
    )


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> Parts:
    """All q, then all k, v and z; all b, then all a."""
    tokens, own = mixed_qkvz.shape[0], num_heads_v * head_v
    mixed_qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + own, own], dim=1)
    b, a = mixed_ba.split(num_heads_v, dim=1)
    # The convolution and the rule want them without what lay between.
    return (
        mixed_qkv.contiguous(),
        z.reshape(tokens, num_heads_v, head_v),
        b.contiguous(),
        a.contiguous(),
    )
