"""Depthwise causal convolution over ragged batches, in plain torch.

Stands in for `causal_conv1d_fn` and `causal_conv1d_update` of SGLang (Triton and CUDA there).
A state is a sequence's last `width - 1` inputs, [dim, width - 1], oldest first.

Every output is one multiply-add a tap in float32, bias first, oldest tap first, in prefill as in
decode. Sequences are computed one after the other: torch's vectorised functions round a value by
its place in the tensor, so a shared tensor would let a sequence's bits depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional

PAD_SLOT_ID = -1


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    query_start_loc: torch.Tensor,
    conv_states: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    seq_lens_cpu: Sequence[int] | None = None,
) -> torch.Tensor:
    """Convolve the concatenated sequences of a prefill and leave their last inputs as states.

    Args:
        x: [dim, tokens], the sequences one after the other; any float dtype.
        weight, bias: [dim, width] and [dim].
        query_start_loc: [sequences + 1], integer; where each sequence starts in `x`.
        conv_states: [slots, dim, width - 1]; read where `has_initial_state`, written for every
            sequence that has tokens.
        cache_indices: [sequences], the slot of each; a sequence in slot `pad_slot_id` is skipped
            (its output is zero). Without it sequence i has slot i.
        has_initial_state: [sequences], bool; without it every sequence starts from zeros.
        activation: "silu" (or "swish", True) or None.
        seq_lens_cpu: not needed here; `query_start_loc` says the same.

    Returns:
        [dim, tokens] in the dtype of `x`.
    """
    del seq_lens_cpu
    width = weight.shape[1]
    _check_state(conv_states, width - 1)
    starts = query_start_loc.tolist()
    slots = list(range(len(starts) - 1)) if cache_indices is None else cache_indices.tolist()
    carry_on = [False] * len(slots) if has_initial_state is None else has_initial_state.tolist()
    tokens = x.t()
    result = torch.zeros_like(tokens)
    nothing = tokens.new_zeros(width - 1, tokens.shape[1])
    for (start, end), slot, carries_on in zip(pairwise(starts), slots, carry_on, strict=True):
        if start == end or slot == pad_slot_id:
            continue
        before = nothing
        if conv_states is not None and carries_on:
            before = conv_states[slot].t().to(x.dtype)
        inputs = torch.cat([before, tokens[start:end]])
        result[start:end] = _apply_taps(inputs, weight, bias, activation)
        if conv_states is not None:
            conv_states[slot] = inputs[inputs.shape[0] - (width - 1) :].t()
    return result.t()


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    pad_slot_id: int = PAD_SLOT_ID,
    intermediate_conv_window: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve the next token of each sequence and shift it into the sequence's state.

    Args:
        x: [batch, dim].
        conv_state: [slots, dim, width - 1], updated in place.
        conv_state_indices: [batch], the slot of each row; rows in slot `pad_slot_id` are skipped
            (their output is zero). Without it row i has slot i.

    Returns:
        [batch, dim] in the dtype of `x`.

    Raises:
        NotImplementedError: for a circular state (`cache_seqlens`) and for several tokens a row
            (speculative decoding), neither of which SGLang's CPU serving uses.
    """
    if cache_seqlens is not None or intermediate_conv_window is not None or x.dim() != 2:
        raise NotImplementedError(
            "the CPU convolution takes one token a sequence and no circular state; "
            "serve without speculative decoding on a machine without an accelerator"
        )
    _check_state(conv_state, weight.shape[1] - 1)
    if conv_state_indices is None:
        index = torch.arange(x.shape[0], device=x.device)
    else:
        index = conv_state_indices.long()
        live = index != pad_slot_id
        if not bool(live.all()):
            result = torch.zeros_like(x)
            result[live] = causal_conv1d_update(
                x[live],
                conv_state,
                weight,
                bias,
                activation,
                conv_state_indices=index[live],
            )
            return result

    # Taps lead: [width, batch, dim], so that each tap is one contiguous operand.
    inputs = torch.cat([conv_state[index].permute(2, 0, 1).to(x.dtype), x.unsqueeze(0)])
    conv_state[index] = inputs[1:].permute(1, 2, 0).to(conv_state.dtype)
    return _apply_taps(inputs, weight, bias, activation)[0].to(x.dtype)


def _apply_taps(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | bool | None,
) -> torch.Tensor:
    """Convolve along the first axis: [n, ..., dim] to [n - width + 1, ..., dim] in float32."""
    if activation not in ("silu", "swish", True, False, None):
        raise ValueError(f"unknown activation {activation!r}; supported: 'silu', 'swish', None")
    width = weight.shape[1]
    count = inputs.shape[0] - width + 1
    values, taps = inputs.float(), weight.float().t().contiguous()
    start = values.new_zeros(()) if bias is None else bias.float()
    total = torch.addcmul(start, values[:count], taps[0])
    for tap in range(1, width):
        total.addcmul_(values[tap : tap + count], taps[tap])
    return functional.silu(total, inplace=True) if activation else total


def _check_state(states: torch.Tensor | None, keep: int) -> None:
    if states is not None and states.shape[-1] != keep:
        raise ValueError(
            f"a convolution of width {keep + 1} keeps {keep} inputs, but the state pool has room "
            f"for {states.shape[-1]}"
        )
