"""The recurrences that the kernels compute, one token at a time in float64, and random inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

Tensors = dict[str, Any]


def starts_of(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def convolve(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, dim] with a state [dim, width - 1] to outputs [tokens, dim] and the next state."""
    state = state.double()
    outputs = []
    for token in tokens.double():
        window = torch.cat([state, token.unsqueeze(1)], dim=1)
        value = (window * weight.double()).sum(1)
        value = value if bias is None else value + bias.double()
        outputs.append(functional.silu(value) if activation else value)
        state = window[:, 1:]
    return torch.stack(outputs) if outputs else tokens.double(), state


def recur(
    state: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: state [heads, head_dim, state_dim], x [heads, head_dim], step [heads],
    A [heads], B and C [groups, state_dim] to the output [heads, head_dim] and the next state.
    """
    repeat = x.shape[0] // B.shape[0]
    B, C = B.double().repeat_interleave(repeat, 0), C.double().repeat_interleave(repeat, 0)
    decay = torch.exp(step * A.double())
    state = state * decay[:, None, None]
    state = state + (step[:, None] * x.double())[:, :, None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1), state


def time_steps(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    step = dt.double() if bias is None else dt.double() + bias.double()
    return functional.softplus(step) if softplus else step.clamp(min=0)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    lengths: list[int],
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dt_softplus: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs [tokens, heads, head_dim] and, for each sequence, its state before the first token
    and after each one, [length + 1, heads, head_dim, state_dim].
    """
    heads, head_dim = x.shape[2:]
    steps = time_steps(dt[0], dt_bias, dt_softplus)
    outputs = torch.zeros(x.shape[1], heads, head_dim, dtype=torch.float64)
    histories = []
    for seq, (start, end) in enumerate(pairwise(starts_of(lengths))):
        state = torch.zeros(heads, head_dim, B.shape[3], dtype=torch.float64)
        if initial_states is not None:
            state = initial_states[seq].double()
        history = [state]
        for t in range(start, end):
            y, state = recur(state, x[0, t], steps[t], A, B[0, t], C[0, t])
            if D is not None:
                y = y + D.double().view(heads, -1) * x[0, t].double()
            if z is not None:
                y = y * functional.silu(z[0, t].double())
            outputs[t] = y
            history.append(state)
        histories.append(torch.stack(history))
    return outputs, histories


def scan_inputs(
    seed: int,
    lengths: list[int],
    *,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 6,
    state_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    initial: bool = True,
    gated: bool = False,
    wide_D: bool = False,
) -> Tensors:
    """Random arguments of a scan; decays between almost nothing and almost everything a token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = sum(lengths)
    return {
        "x": normal(1, tokens, heads, head_dim).to(dtype),
        "dt": normal(1, tokens, heads).to(dtype),
        "A": -torch.rand(heads, generator=generator) * 16 - 0.1,
        "B": normal(1, tokens, groups, state_dim).to(dtype),
        "C": normal(1, tokens, groups, state_dim).to(dtype),
        "D": normal(heads, head_dim) if wide_D else normal(heads),
        "z": normal(1, tokens, heads, head_dim).to(dtype) if gated else None,
        "dt_bias": torch.rand(heads, generator=generator) * 6 - 6,
        "initial_states": normal(len(lengths), heads, head_dim, state_dim) if initial else None,
        "dt_softplus": True,
    }


def delta(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the delta rule: state [heads, value_dim, key_dim], q and k [key_heads, key_dim],
    v [heads, value_dim], log_decay [heads, key_dim or 1], beta [heads] to output and next state.
    """
    repeat = v.shape[0] // k.shape[0]
    q, k = (part.double().repeat_interleave(repeat, 0) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    state = state * torch.exp(log_decay.double())[:, None, :]
    known = (state * k[:, None, :]).sum(-1)
    state = state + (beta.double()[:, None] * (v.double() - known))[:, :, None] * k[:, None, :]
    return (state * (scale * q)[:, None, :]).sum(-1), state
