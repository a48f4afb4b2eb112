"""Gates on the outputs of attention and of shared experts (Qwen3-Next, Qwen3.5), in plain torch.

Stands in for the functions of the same names in SGLang's `elementwise` module (Triton there).
"""

from __future__ import annotations

import torch


def fused_sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """`attn_output * sigmoid(gate)`; the gate may be [tokens, heads, head_dim] to a flat output.

    Raises:
        NotImplementedError: with `quant`, which is for accelerators.
    """
    if quant:
        raise NotImplementedError("the CPU gate does not quantise its result")
    gated = attn_output.float() * torch.sigmoid(gate.float().reshape(attn_output.shape))
    return attn_output.copy_(gated) if inplace else gated.to(attn_output.dtype)


def sigmoid_gate_mul_broadcast(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(gate)` for x [tokens, dim] and gate [tokens, 1]."""
    return (x.float() * torch.sigmoid(gate.float())).to(x.dtype)


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """The shared expert's output [tokens, dim] times a gate that the hidden states set."""
    gate = torch.matmul(hidden_states.float(), gate_weight.float().reshape(-1, 1))
    return (shared_output.float() * torch.sigmoid(gate)).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Add that to the output of the other experts, in place."""
    final_hidden_states.add_(fused_gate_sigmoid_mul(hidden_states, gate_weight, shared_output))
