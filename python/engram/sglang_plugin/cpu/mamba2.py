"""The Mamba-2 scan over ragged batches in its chunked, state-space dual form, in plain torch.

Stands in for `mamba_chunk_scan_combined` of SGLang (Triton there). The form is that of section 6 of
"Transformers are SSMs" (Dao and Gu, arXiv 2405.21060): inside a block of tokens the recurrence is a
masked matrix product, and only the states at block ends are passed on one after the other.

Blocks are laid from each sequence's own first token, where SGLang's kernel lays one grid over the
flattened batch. A sequence's result therefore does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

# Tokens a block: work inside a block grows with its length, work between blocks shrinks. 64 was
# the fastest of 32, 64, 128 and 256 on two x86 cores.
_BLOCK = 64


@dataclass(frozen=True)
class _Inputs:
    """What the recurrence reads, in float32 except `log_decay` (float64), tokens first.

    `x` is [tokens, heads, head_dim], `step` and `log_decay` (= step * A) are [tokens, heads],
    `B` and `C` are [tokens, groups, state_dim].
    """

    x: torch.Tensor
    step: torch.Tensor
    log_decay: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    out: torch.Tensor | None = None,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
    return_track_states: bool = False,
    track_seq_idx: torch.Tensor | None = None,
    track_end_locs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scan every sequence of a prefill; write the outputs into `out` and return states.

    Only the combination of flags that `MambaMixer2.forward` uses is served: a ragged batch
    (`return_varlen_states`) with `return_track_states`.

    Args:
        x, z: [1, tokens, heads, head_dim], the sequences one after the other.
        dt: [1, tokens, heads]; `dt_bias` [heads], then softplus, then `dt_limit` apply to it.
        A: [heads]. D: [heads] or [heads, head_dim].
        B, C: [1, tokens, groups, state_dim]; `groups` divides `heads`.
        chunk_size: tokens between the states that are returned from inside a sequence.
        initial_states: [sequences, heads, head_dim, state_dim], or None for zeros.
        cu_seqlens: [sequences + 1], where each sequence starts.
        seq_idx, chunk_indices, chunk_offsets: not needed; they say the same as `cu_seqlens`.
        out: like x, any float dtype.
        state_dtype: dtype of the returned states; that of `C` if None.
        track_seq_idx, track_end_locs: [n] each; a sequence and a flat position whole chunks after
            its start, before which the state is wanted.

    Returns:
        The states before every `chunk_size`-th flat position, [1, ceil(tokens / chunk_size),
        heads, head_dim, state_dim] (NaN where that position is not whole chunks after its
        sequence's start: SGLang asks for those by `track_end_locs`); the states after each
        sequence's last token, [sequences, heads, head_dim, state_dim]; the tracked states,
        [1, n, heads, head_dim, state_dim], or None where none is asked for.
    """
    del seq_idx, chunk_indices, chunk_offsets
    if not (return_varlen_states and return_track_states) or cu_seqlens is None or out is None:
        raise NotImplementedError(
            "the CPU scan serves ragged batches with tracked states, as SGLang's Mamba-2 mixer "
            "calls it: cu_seqlens, out, return_varlen_states=True and return_track_states=True"
        )
    if return_final_states or return_intermediate_states:
        raise NotImplementedError("the CPU scan returns grid, final and tracked states only")

    heads, head_dim = x.shape[2:]
    shape = (heads, head_dim, B.shape[3])
    dtype = state_dtype or C.dtype
    starts = cu_seqlens.tolist()
    step = _time_steps(dt[0], dt_bias, dt_softplus, dt_limit)
    inputs = _Inputs(x[0].float(), step, step.double() * A.double(), B[0].float(), C[0].float())
    if initial_states is None:
        states = inputs.x.new_zeros(len(starts) - 1, *shape)
    else:
        states = initial_states.float()

    grid = inputs.x.new_full(
        (math.ceil(x.shape[1] / chunk_size), *shape), float("nan"), dtype=dtype
    )
    tracked = None
    wanted: dict[tuple[int, int], int] = {}
    if track_seq_idx is not None and track_end_locs is not None and track_end_locs.numel() > 0:
        tracked = grid.new_empty(track_end_locs.numel(), *shape)
        pairs = zip(track_seq_idx.tolist(), track_end_locs.tolist(), strict=True)
        wanted = {(seq, end - starts[seq]): row for row, (seq, end) in enumerate(pairs)}

    def keep(seq: int, done: int, state: torch.Tensor) -> None:
        """Keep a sequence's state after `done` tokens, a multiple of `chunk_size`."""
        position = starts[seq] + done
        if position % chunk_size == 0 and position < starts[seq + 1]:
            grid[position // chunk_size] = state
        row = wanted.pop((seq, done), None)
        if row is not None and tracked is not None:
            tracked[row] = state

    y = torch.empty_like(inputs.x)
    final = _scan(inputs, starts, states, y, chunk_size, keep)
    if wanted:
        raise ValueError(
            f"tracked positions must be whole chunks of {chunk_size} tokens inside their sequence; "
            f"got (sequence, tokens after its start): {sorted(wanted)}"
        )
    if D is not None:
        y.addcmul_(inputs.x, D.float().view(heads, -1))
    if z is not None:
        y.mul_(functional.silu(z[0].float()))
    out[0].copy_(y)
    return (
        grid.unsqueeze(0),
        final.to(dtype),
        None if tracked is None else tracked.unsqueeze(0),
    )


def _time_steps(
    dt: torch.Tensor,
    bias: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    """Return the step sizes, [tokens, heads] in float32."""
    step = dt.float()
    if bias is not None:
        step = step + bias.float()
    if softplus:
        step = functional.softplus(step)
    return step.clamp(*limit)


def _scan(
    inputs: _Inputs,
    starts: list[int],
    states: torch.Tensor,
    y: torch.Tensor,
    chunk_size: int,
    keep: Callable[[int, int, torch.Tensor], None],
) -> torch.Tensor:
    """Run all sequences block by block, side by side; fill `y` and return the final states.

    The longest come first, so that those not yet done are always the leading rows.
    """
    block = math.gcd(chunk_size, _BLOCK)
    lengths = [end - start for start, end in pairwise(starts)]
    order = sorted(range(len(lengths)), key=lambda seq: -lengths[seq])
    state = states[order]
    first = torch.tensor([starts[seq] for seq in order]).unsqueeze(1)
    last = first + torch.tensor([lengths[seq] - 1 for seq in order]).unsqueeze(1)
    for done in range(0, max(lengths, default=0), block):
        active = sum(length > done for length in lengths)
        if done % chunk_size == 0:
            for row in range(active):
                keep(order[row], done, state[row])
        rows = first[:active] + torch.arange(done, done + block)
        inside = rows <= last[:active]
        # A block past a sequence's end is filled up with its own last token at step size 0, which
        # leaves the state as it is. (Another sequence's tokens might carry NaN into this one.)
        rows = torch.minimum(rows, last[:active])
        part = _Inputs(
            inputs.x[rows],
            inputs.step[rows] * inside.unsqueeze(-1),
            inputs.log_decay[rows] * inside.unsqueeze(-1),
            inputs.B[rows],
            inputs.C[rows],
        )
        outputs, state[:active] = _advance(part, state[:active])
        y[rows[inside]] = outputs[inside]
    final = torch.empty_like(state)
    final[order] = state
    for seq, length in enumerate(lengths):
        if length % chunk_size == 0:
            keep(seq, length, final[seq])
    return final


def _advance(part: _Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one block of every sequence: tensors of `part` lead with [sequences, block].

    Returns the outputs, [sequences, block, heads, head_dim], and the states after the block. The
    decay from token j to token i is exp(total[i] - total[j]) with totals in float64: in float32 a
    long block's totals leave few digits for the difference of neighbours.
    """
    batch, block, heads, head_dim = part.x.shape
    groups, state_dim = part.B.shape[2:]
    B, C = part.B.transpose(1, 2), part.C.transpose(1, 2)
    total = part.log_decay.cumsum(1)
    x = part.x * part.step.unsqueeze(-1)

    by_head = total.transpose(1, 2)
    decay = (by_head.unsqueeze(3) - by_head.unsqueeze(2)).float()
    future = torch.ones(block, block, dtype=torch.bool).triu_(1)
    decay.masked_fill_(future, float("-inf")).exp_()
    scores = torch.matmul(C, B.transpose(2, 3))
    decay.view(batch, groups, -1, block, block).mul_(scores.unsqueeze(2))
    inside = torch.matmul(decay, x.transpose(1, 2)).transpose(1, 2)

    before = state.view(batch, groups, -1, state_dim)
    carried = torch.matmul(C, before.transpose(2, 3)).view(batch, groups, block, -1, head_dim)
    carried = carried.transpose(1, 2).reshape(batch, block, heads, head_dim)
    outputs = inside + carried * total.exp().float().unsqueeze(-1)

    x = x * (total[:, -1:] - total).exp().float().unsqueeze(-1)
    added = torch.matmul(x.view(batch, block, groups, -1).permute(0, 2, 3, 1), B)
    after = state * total[:, -1].exp().float().view(batch, heads, 1, 1)
    return outputs, after.add_(added.view_as(after))
