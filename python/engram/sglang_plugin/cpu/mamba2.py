"""The Mamba-2 scan over ragged batches in its chunked, state-space dual form, in plain torch.

Stands in for `mamba_chunk_scan_combined` of SGLang (Triton there). The form is that of section 6 of
"Transformers are SSMs" (Dao and Gu, arXiv 2405.21060): inside a block of tokens the recurrence is a
masked matrix product, and only the states at block ends are passed on one after the other.

Blocks are laid from each sequence's own first token, where SGLang's kernel lays one grid over the
flattened batch. A sequence's result therefore does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
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

    def rows(self, rows: slice) -> _Inputs:
        return _Inputs(
            self.x[rows], self.step[rows], self.log_decay[rows], self.B[rows], self.C[rows]
        )


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

    starts = cu_seqlens.tolist()
    if initial_states is None:
        states = x.new_zeros(len(starts) - 1, *x.shape[2:], B.shape[3], dtype=torch.float32)
    else:
        states = initial_states.float()
    kept = _KeptStates(starts, chunk_size, states[:1].to(state_dtype or C.dtype))
    if track_seq_idx is not None and track_end_locs is not None and track_end_locs.numel() > 0:
        kept.ask(track_seq_idx.tolist(), track_end_locs.tolist())

    # One sequence after the other: products and vectorised functions round by the shape of their
    # batch and the place in it, so a shared tensor would let a sequence's bits depend on the rest.
    final = []
    for seq, (start, end) in enumerate(pairwise(starts)):
        rows = slice(start, end)
        step = _time_steps(dt[0, rows], dt_bias, dt_softplus, dt_limit)
        inputs = _Inputs(
            x[0, rows].float(),
            step,
            step.double() * A.double(),
            B[0, rows].float(),
            C[0, rows].float(),
        )
        y, state = _scan(inputs, seq, states[seq], kept)
        if D is not None:
            y.addcmul_(inputs.x, D.float().view(D.shape[0], -1))
        if z is not None:
            y.mul_(functional.silu(z[0, rows].float()))
        out[0, rows] = y
        final.append(state)
    return kept.grid.unsqueeze(0), torch.stack(final).to(kept.grid.dtype), kept.tracked


class _KeptStates:
    """The states that are returned from inside the sequences, kept as the scan passes them.

    `grid` is [ceil(tokens / chunk_size), ...], `tracked` is [1, n, ...] or None where no state was
    asked for; both are shaped and typed like a row of `like`.
    """

    def __init__(self, starts: list[int], chunk_size: int, like: torch.Tensor) -> None:
        self.chunk_size = chunk_size
        self.grid = like.new_full(
            (math.ceil(starts[-1] / chunk_size), *like.shape[1:]), float("nan")
        )
        self.tracked: torch.Tensor | None = None
        self._starts = starts
        self._row: dict[tuple[int, int], int] = {}  # of (sequence, tokens after its start)

    def ask(self, sequences: list[int], positions: list[int]) -> None:
        """Ask for a sequence's state before each flat position, whole chunks after its start."""
        for row, (seq, position) in enumerate(zip(sequences, positions, strict=True)):
            done = position - self._starts[seq]
            if done % self.chunk_size or not 0 <= done <= self._starts[seq + 1] - self._starts[seq]:
                raise ValueError(
                    f"a tracked position must be whole chunks of {self.chunk_size} tokens into its "
                    f"sequence, and inside it; got {done} tokens into sequence {seq}"
                )
            self._row[seq, done] = row
        self.tracked = self.grid.new_empty(1, len(positions), *self.grid.shape[1:])

    def keep(self, seq: int, done: int, state: torch.Tensor) -> None:
        """Take a sequence's state after `done` tokens, a multiple of the chunk size."""
        position = self._starts[seq] + done
        if position % self.chunk_size == 0 and position < self._starts[seq + 1]:
            self.grid[position // self.chunk_size] = state
        row = self._row.get((seq, done))
        if row is not None and self.tracked is not None:
            self.tracked[0, row] = state


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
    inputs: _Inputs, seq: int, state: torch.Tensor, kept: _KeptStates
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run sequence `seq` block by block; return its outputs and its final state."""
    block, length = math.gcd(kept.chunk_size, _BLOCK), inputs.x.shape[0]
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    for begin in range(0, length, block):
        if begin % kept.chunk_size == 0:
            kept.keep(seq, begin, state)
        rows = slice(begin, min(begin + block, length))
        y[rows], state = _advance(inputs.rows(rows), state)
    if length % kept.chunk_size == 0:
        kept.keep(seq, length, state)
    return y, state


def _advance(part: _Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one block from `state`, [heads, head_dim, state_dim].

    Returns the outputs, [block, heads, head_dim], and the state after the block. The decay from
    token j to token i is exp(total[i] - total[j]) with totals in float64: in float32 a long block's
    totals leave few digits for the difference of neighbours.
    """
    block, heads, head_dim = part.x.shape
    groups, state_dim = part.B.shape[1:]
    # Copies, so that a product's operands lie in memory alike wherever the sequence lies in the
    # batch: the bits may depend on their alignment.
    B, C, state = part.B.transpose(0, 1).clone(), part.C.transpose(0, 1).clone(), state.clone()
    total = part.log_decay.cumsum(0)
    x = part.x * part.step.unsqueeze(-1)

    by_head = total.t()
    decay = (by_head.unsqueeze(2) - by_head.unsqueeze(1)).float()
    future = torch.ones(block, block, dtype=torch.bool).triu_(1)
    decay.masked_fill_(future, float("-inf")).exp_()
    scores = torch.matmul(C, B.transpose(1, 2))
    decay.view(groups, -1, block, block).mul_(scores.unsqueeze(1))
    outputs = torch.matmul(decay, x.transpose(0, 1)).transpose(0, 1)

    before = state.view(groups, -1, state_dim)
    carried = torch.matmul(C, before.transpose(1, 2)).view(groups, block, -1, head_dim)
    carried = carried.transpose(0, 1).reshape(block, heads, head_dim)
    outputs = outputs + carried * total.exp().float().unsqueeze(-1)

    x.mul_((total[-1:] - total).exp().float().unsqueeze(-1))
    added = torch.matmul(x.view(block, groups, -1).permute(1, 2, 0), B)
    state.mul_(total[-1].exp().float().view(heads, 1, 1))
    return outputs, state.add_(added.view_as(state))
