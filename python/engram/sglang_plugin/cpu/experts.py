"""Experts on the CPU: what SGLang's torch version of them leaves out.

Stands around `moe_forward_native` of SGLang, which `UnquantizedFusedMoEMethod.forward_cpu` calls:
it knows gated activations alone, where Nemotron-H's experts have a squared ReLU without a gate, and
it drops the factor that its kernels for accelerators apply to the sum of the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


def moe_forward_native(
    upstream: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """The weighted sum of each token's experts, [tokens, dim] in the dtype of `x`.

    Args:
        upstream: SGLang's function.
        layer: its `w13_weight` is [experts, inner (twice that with a gate), dim], its `w2_weight`
            [experts, dim, inner].
        x: [tokens, dim].
        topk_output: the weights and numbers of each token's experts, both [tokens, chosen].
        moe_runner_config: its `routed_scaling_factor` multiplies the sum unless the weights carry
            it already.
    """
    if moe_runner_config.activation == "relu2" and not moe_runner_config.is_gated:
        result = _squared_relu(layer, x, topk_output)
    else:
        result = upstream(layer, x, topk_output, moe_runner_config)
    factor = moe_runner_config.routed_scaling_factor
    if factor is None or layer.should_fuse_routed_scaling_factor_in_topk:
        return result
    return result * factor


def _squared_relu(layer: Any, x: torch.Tensor, topk_output: Any) -> torch.Tensor:
    weights, chosen, _ = topk_output
    if any(
        getattr(layer, name, None) is not None for name in ("w13_weight_bias", "w2_weight_bias")
    ):
        raise NotImplementedError("the CPU has no squared ReLU experts with biases")
    result = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        if expert < 0:  # a place in the batch without a token
            continue
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        inner = functional.relu(functional.linear(x[rows], layer.w13_weight[expert])).square()
        output = functional.linear(inner, layer.w2_weight[expert]).float()
        result.index_add_(0, rows, output * weights[rows, place].float().unsqueeze(1))
    return result.to(x.dtype)
