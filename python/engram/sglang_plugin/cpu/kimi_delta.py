"""Kimi delta attention (Kimi-Linear) on the CPU: SGLang's prefill call into `delta_rule`.

Stands in for `chunk_kda` of SGLang (Triton there); a decode step goes through
`gated_delta.fused_sigmoid_gating_delta_rule_update`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from engram.sglang_plugin.cpu import delta_rule
from engram.sglang_plugin.cpu.delta_rule import CHUNK, DeltaInputs
from engram.sglang_plugin.cpu.gated_delta import kda_log_decay


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    beta_is_raw: bool = False,
    output_intermediate_states: bool = False,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    **hints: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Prefill: compute every sequence from the state in its slot, and leave the new one there.

    Args:
        q, k: [1, tokens, heads, key_dim], the sequences one after the other.
        v: [1, tokens, heads, value_dim].
        g: [1, tokens, heads, key_dim], log decays; with `A_log` (and `dt_bias`, `lower_bound`) the
            raw values they are made from.
        beta: [1, tokens, heads], strengths; before their sigmoid if `beta_is_raw`.
        initial_state: [slots, heads, value_dim, key_dim].
        initial_state_indices: [sequences], the slot of each.
        cu_seqlens: [sequences + 1], where each sequence starts.
        track_state, track_chunk_idx: [sequences, heads, value_dim, key_dim] float32 and
            [sequences]; into the former goes each sequence's state before that chunk of 64 tokens,
            nothing for a negative number.
        hints: what SGLang worked out for its grid of blocks.

    Returns:
        The outputs, [1, tokens, heads, value_dim] in the dtype of `v`; with
        `output_intermediate_states` also the states before every 64th token of each sequence,
        [1, chunks, heads, value_dim, key_dim] in the dtype of `initial_state`.

    Raises:
        NotImplementedError: for a call that is not SGLang's serving one.
    """
    if initial_state is None or initial_state_indices is None or cu_seqlens is None:
        raise NotImplementedError("the CPU delta rule serves ragged batches with a pool of states")
    unknown = hints.keys() - {"chunk_indices", "chunk_offsets"}
    if unknown or not use_qk_l2norm_in_kernel:
        raise NotImplementedError(f"the CPU delta rule scales q and k itself; unknown: {unknown}")
    raw = g.reshape(*k.shape)[0]
    decay = raw.float() if A_log is None else kda_log_decay(raw, A_log, dt_bias, lower_bound)
    strength = beta[0].float()
    if beta_is_raw:
        strength = torch.sigmoid(strength)
    starts = cu_seqlens.tolist()
    outputs, chunks = delta_rule.scan(
        DeltaInputs(q[0], k[0], v[0], decay, strength),
        initial_state,
        initial_state_indices.tolist(),
        starts,
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
    )
    if track_state is not None and track_chunk_idx is not None:
        first = 0
        for row, (chunk, (start, end)) in enumerate(
            zip(track_chunk_idx.tolist(), pairwise(starts), strict=True)
        ):
            if chunk >= 0:
                track_state[row] = chunks[first + chunk]
            first += -(-(end - start) // CHUNK)
    if output_intermediate_states:
        return outputs.unsqueeze(0), chunks.to(initial_state.dtype).unsqueeze(0)
    return outputs.unsqueeze(0)
