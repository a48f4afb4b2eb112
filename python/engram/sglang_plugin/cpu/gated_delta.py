"""Gated delta nets (Qwen3-Next, Qwen3.5) on the CPU: SGLang's calls into `delta_rule`.

Stands in for `chunk_gated_delta_rule`, `fused_sigmoid_gating_delta_rule_update` and
`fused_gdn_gating` of SGLang (Triton there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from engram.sglang_plugin.cpu import delta_rule
from engram.sglang_plugin.cpu.delta_rule import DeltaInputs


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decays and strengths of tokens, both [1, tokens, heads] in float32.

    `a` and `b` are [tokens, heads], `A_log` and `dt_bias` [heads]; `beta` and `threshold` are those
    of the softplus.
    """
    log_decay = _log_decay(A_log, a, dt_bias, beta, threshold)
    return log_decay.unsqueeze(0), torch.sigmoid(b.float()).unsqueeze(0)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Prefill: compute every sequence from the state in its slot, and leave the new one there.

    Args:
        q, k: [1, tokens, key_heads, key_dim], the sequences one after the other.
        v: [1, tokens, heads, value_dim].
        g, beta: [1, tokens, heads], log decays and strengths.
        scale: of the queries; `key_dim ** -0.5` if None.
        initial_state: [slots, heads, value_dim, key_dim].
        initial_state_indices: [sequences], the slot of each.
        cu_seqlens: [sequences + 1], where each sequence starts.
        inplace_update: whether the new states are written.

    Returns:
        The outputs, [1, tokens, heads, value_dim] in the dtype of `v`; None; the states before
        every 64th token of each sequence, [1, chunks, heads, value_dim, key_dim] in the dtype of
        `initial_state`.

    Raises:
        NotImplementedError: for a call that is not SGLang's serving one.
    """
    if initial_state is None or initial_state_indices is None or cu_seqlens is None:
        raise NotImplementedError("the CPU delta rule serves ragged batches with a pool of states")
    if head_first or not use_qk_l2norm_in_kernel:
        raise NotImplementedError("the CPU delta rule takes tokens first and scales q and k itself")
    inputs = DeltaInputs(q[0], k[0], v[0], g[0].unsqueeze(2), beta[0])
    outputs, chunks = delta_rule.scan(
        inputs,
        initial_state,
        initial_state_indices.tolist(),
        cu_seqlens.tolist(),
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        write_back=inplace_update,
    )
    return outputs.unsqueeze(0), None, chunks.to(initial_state.dtype).unsqueeze(0)


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    **speculative: Any,
) -> torch.Tensor:
    """Decode: advance each row's state by one token.

    Args:
        A_log, dt_bias: [heads], and with `is_kda` [heads * key_dim] for the latter; any shape.
        a, b: [rows, heads] in any shape, the raw decay and strength; with `is_kda` `a` has
            `key_dim` values a head.
        q, k: [1, rows, key_heads, key_dim]. v: [1, rows, heads, value_dim].
        initial_state_source: [slots, heads, value_dim, key_dim], changed in place.
        initial_state_indices: [rows], the slot of each; a negative one is skipped.
        cu_seqlens: [rows + 1]; there is one token a row.
        is_kda, lower_bound: the decay is Kimi's, `lower_bound` the bound of its safe gate.
        speculative: the remaining keywords of SGLang's function, for speculative decoding.

    Returns:
        [1, rows, heads, value_dim] in the dtype of `v`.

    Raises:
        NotImplementedError: for several tokens a row or any keyword of speculative decoding.
    """
    used = [name for name, value in speculative.items() if value is not None and value is not False]
    rows, heads = v.shape[1:3]
    if used or (cu_seqlens is not None and len(cu_seqlens) != rows + 1):
        raise NotImplementedError(
            "the CPU delta rule takes one token a sequence"
            f"{' (not ' + ', '.join(used) + ')' if used else ''}; serve without speculative "
            "decoding on a machine without an accelerator"
        )
    if not use_qk_l2norm_in_kernel:
        raise NotImplementedError("the CPU delta rule scales q and k itself")
    if is_kda:
        decay = kda_log_decay(
            a.reshape(rows, heads, -1), A_log, dt_bias, lower_bound, softplus_beta,
            softplus_threshold,
        )  # fmt: skip
    else:
        raw = a.reshape(rows, heads)
        decay = _log_decay(A_log, raw, dt_bias, softplus_beta, softplus_threshold).unsqueeze(2)
    strength = torch.sigmoid(b.reshape(rows, heads).float())
    return delta_rule.step(
        DeltaInputs(q[0], k[0], v[0], decay, strength),
        initial_state_source,
        initial_state_indices,
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
    ).unsqueeze(0)


def kda_log_decay(
    raw: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> torch.Tensor:
    """Kimi's log decays, one a channel of the keys, [tokens, heads, key_dim] in float32.

    `raw` has that shape; `A_log` has one value a head and `dt_bias` one a channel, in any shape.
    With a `lower_bound` (the safe gate) no decay is below it.
    """
    heads, channels = raw.shape[1:]
    value = raw.float()
    if dt_bias is not None:
        value = value + dt_bias.float().reshape(heads, channels)
    rate = A_log.float().exp().reshape(heads, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * value)
    return -rate * functional.softplus(value, beta, threshold)


def _log_decay(
    A_log: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor, beta: float, threshold: float
) -> torch.Tensor:
    step = functional.softplus(a.float() + dt_bias.float(), beta, threshold)
    return -A_log.float().exp() * step
