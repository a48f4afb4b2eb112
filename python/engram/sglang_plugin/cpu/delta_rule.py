"""The gated delta rule over ragged batches and for one token, in plain torch.

It is the recurrence of gated delta nets ("Gated Delta Networks", arXiv 2412.06464) and, with a
decay for each channel of the keys instead of one for each head, of Kimi delta attention ("Kimi
Linear", arXiv 2510.26692). With S the state [value_dim, key_dim] of a head, and a token's query q,
key k, value v, log decay g and strength b:

    S = S diag(exp g);  S = S + b (v - S k) k^T;  output = scale S q

A prefill is computed in blocks: what each token of a block writes depends on what those before it
wrote, which is one triangular system; only the states at block ends are passed on one after the
other. Every exponent is of a difference of decays later minus earlier, so none is positive.

Sequences are computed one after the other, so that a sequence's bits do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

# Tokens between the states that SGLang's kernels return from inside a sequence.
CHUNK = 64
# Tokens a block. It divides CHUNK; work inside a block grows with its length and the key's.
_BLOCK = 32
PAD_SLOT_ID = -1


@dataclass(frozen=True)
class DeltaInputs:
    """What the recurrence reads, tokens first; any float dtype, computed in float32.

    `q` and `k` are [tokens, key_heads, key_dim] and scaled to length 1 here, `v` is
    [tokens, heads, value_dim], `log_decay` [tokens, heads, key_dim or 1] (not above 0) and `beta`
    [tokens, heads]. `key_heads` divides `heads`; neighbouring heads share a key.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor


def scan(
    inputs: DeltaInputs,
    states: torch.Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    scale: float,
    write_back: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute every sequence of a prefill from the state in its slot, and leave the new one there.

    Args:
        states: [slots, heads, value_dim, key_dim]; sequence i reads slot `slots[i]`, and writes it
            if `write_back`.
        starts: where each sequence starts, and at the end the number of tokens.
        scale: of the queries.

    Returns:
        The outputs, [tokens, heads, value_dim] in the dtype of `v`; and the states before every
        `CHUNK`-th token of each sequence, sequence after sequence, [chunks, heads, value_dim,
        key_dim] in float32.
    """
    outputs = torch.zeros_like(inputs.v)
    chunks: list[torch.Tensor] = []
    for slot, (start, end) in zip(slots, pairwise(starts), strict=True):
        heads_first = _prepare(inputs, slice(start, end), scale)
        state = states[slot].to(torch.float32, copy=True)  # the slot itself is written below
        for begin in range(0, end - start, _BLOCK):
            if begin % CHUNK == 0:
                chunks.append(state)
            rows = slice(begin, min(begin + _BLOCK, end - start))
            output, state = _block(state, *(part[:, rows] for part in heads_first))
            outputs[start + rows.start : start + rows.stop] = output.transpose(0, 1)
        if write_back:
            states[slot] = state.to(states.dtype)
    kept = torch.stack(chunks) if chunks else states.new_zeros((0, *states.shape[1:])).float()
    return outputs, kept


def step(
    inputs: DeltaInputs, states: torch.Tensor, slots: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Advance the state of each row by one token, in place; `inputs` has one token a row.

    Args:
        states: [slots, heads, value_dim, key_dim].
        slots: [rows], integer; rows in slot `PAD_SLOT_ID` are skipped (their output is zero).

    Returns:
        [rows, heads, value_dim] in the dtype of `v`.
    """
    outputs = torch.zeros_like(inputs.v)
    for row, slot in enumerate(slots.tolist()):
        if slot == PAD_SLOT_ID:
            continue
        q, k, v, log_decay, beta = _prepare(inputs, slice(row, row + 1), scale)
        state = states[slot].float() * torch.exp(log_decay.float())
        written = beta.unsqueeze(2) * (v - torch.matmul(k, state.transpose(1, 2)))
        state = torch.baddbmm(state, written.transpose(1, 2), k)
        outputs[row] = torch.matmul(q, state.transpose(1, 2))[:, 0]
        states[slot] = state.to(states.dtype)
    return outputs


def _prepare(inputs: DeltaInputs, rows: slice, scale: float) -> tuple[torch.Tensor, ...]:
    """Query, key, value, log decay and strength of some tokens, heads first: [heads, tokens, ...].

    In float32 but for the decay, which is float64 as it is summed over tokens.
    """
    repeat = inputs.v.shape[1] // inputs.k.shape[1]

    def keys(part: torch.Tensor) -> torch.Tensor:
        rows_of = part[rows].float().transpose(0, 1)
        norm = torch.rsqrt(rows_of.square().sum(-1, keepdim=True) + 1e-6)
        return (rows_of * norm).repeat_interleave(repeat, 0)

    return (
        keys(inputs.q) * scale,
        keys(inputs.k),
        inputs.v[rows].float().transpose(0, 1),
        inputs.log_decay[rows].double().transpose(0, 1),
        inputs.beta[rows].float().transpose(0, 1),
    )


def _block(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance one sequence by a block: outputs [heads, tokens, value_dim] and the next state."""
    passed = log_decay.cumsum(1)
    since_start = torch.exp(passed).float()
    between = torch.exp((passed.unsqueeze(2) - passed.unsqueeze(1)).clamp(max=0)).float()
    if log_decay.shape[2] == 1:
        decay = between[..., 0]
        overlap = torch.matmul(k, k.transpose(1, 2)) * decay
        reads = torch.matmul(q, k.transpose(1, 2)) * decay
    else:
        decayed = between * k.unsqueeze(1)  # [heads, later, earlier, key_dim]
        overlap = torch.matmul(decayed, k.unsqueeze(3))[..., 0]
        reads = torch.matmul(decayed, q.unsqueeze(3))[..., 0]

    # Token t writes b_t (v_t - what the state before it answers to k_t), and that state holds what
    # the earlier tokens of the block wrote.
    system = beta.unsqueeze(2) * overlap.tril(-1)
    wanted = beta.unsqueeze(2) * (v - torch.matmul(k * since_start, state.transpose(1, 2)))
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)

    output = torch.matmul(q * since_start, state.transpose(1, 2))
    output = torch.baddbmm(output, reads.tril(), written)
    to_end = torch.exp(passed[:, -1:] - passed).float()
    state = state * since_start[:, -1:]
    return output, torch.baddbmm(state, written.transpose(1, 2), k * to_end)
