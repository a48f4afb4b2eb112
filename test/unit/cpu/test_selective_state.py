"""A decode step against the recurrence in float64, and against the prefill of one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engram.sglang_plugin.cpu.mamba2 import mamba_chunk_scan_combined
from engram.sglang_plugin.cpu.selective_state import PAD_SLOT_ID, selective_state_update
from unit.cpu import reference

SEEDS = st.integers(0, 2**32 - 1)
SLOTS, HEADS, HEAD_DIM, STATE_DIM = 7, 4, 6, 8
DISTINCT_SLOTS = st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=6).filter(
    lambda slots: len({slot for slot in slots if slot >= 0}) == sum(slot >= 0 for slot in slots)
)


def step_inputs(seed: int, batch: int, groups: int, dtype: torch.dtype, gated: bool) -> Any:
    """The arguments as the Mamba-2 mixer hands them in: one value a head, expanded."""
    scan = reference.scan_inputs(seed, [batch], groups=groups, dtype=dtype, gated=gated)
    return scan, {
        "x": scan["x"][0],
        "dt": scan["dt"][0][:, :, None].expand(-1, -1, HEAD_DIM),
        "A": scan["A"][:, None, None].expand(-1, HEAD_DIM, STATE_DIM),
        "B": scan["B"][0],
        "C": scan["C"][0],
        "D": scan["D"][:, None].expand(-1, HEAD_DIM),
        "z": scan["z"][0] if gated else None,
        "dt_bias": scan["dt_bias"][:, None].expand(-1, HEAD_DIM),
        "dt_softplus": True,
    }


@given(seed=SEEDS, slots=DISTINCT_SLOTS, groups=st.sampled_from([1, 2, 4]), gated=st.booleans())
@settings(max_examples=60)
def test_a_step_equals_the_recurrence(
    seed: int, slots: list[int], groups: int, gated: bool
) -> None:
    scan, step = step_inputs(seed, len(slots), groups, torch.float32, gated)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(SLOTS, HEADS, HEAD_DIM, STATE_DIM, generator=generator)
    before = states.clone()
    out = torch.full_like(step["x"], float("nan"))
    selective_state_update(
        states, **step, state_batch_indices=torch.tensor(slots, dtype=torch.int32), out=out
    )
    steps = reference.time_steps(scan["dt"][0], scan["dt_bias"], True)
    for row, slot in enumerate(slots):
        if slot == PAD_SLOT_ID:
            assert (out[row] == 0).all()
            continue
        y, after = reference.recur(
            before[slot].double(),
            step["x"][row],
            steps[row],
            scan["A"],
            step["B"][row],
            step["C"][row],
        )
        y = y + scan["D"].double()[:, None] * step["x"][row].double()
        if gated:
            y = y * functional.silu(step["z"][row].double())
        torch.testing.assert_close(out[row].double(), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[slot].double(), after, rtol=1e-5, atol=1e-5)
    for slot in set(range(SLOTS)) - set(slots):
        assert torch.equal(states[slot], before[slot])


@given(seed=SEEDS)
@settings(max_examples=20)
def test_a_step_with_full_matrices_equals_one_with_expanded_ones(seed: int) -> None:
    """Mamba-1 has a decay of its own for each channel and state; nothing is expanded there."""
    _, step = step_inputs(seed, 3, 2, torch.float32, False)
    states = torch.randn(
        3, HEADS, HEAD_DIM, STATE_DIM, generator=torch.Generator().manual_seed(seed)
    )
    full_states = states.clone()
    out, full_out = torch.empty_like(step["x"]), torch.empty_like(step["x"])
    selective_state_update(states, **step, out=out)
    full = {
        name: value.contiguous() if isinstance(value, torch.Tensor) else value
        for name, value in step.items()
    }
    selective_state_update(full_states, **full, out=full_out)
    torch.testing.assert_close(full_out, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(full_states, states, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS, groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=20)
def test_a_step_equals_a_prefill_of_one_token(seed: int, groups: int) -> None:
    scan, step = step_inputs(seed, 1, groups, torch.float32, False)
    states = scan["initial_states"].clone()
    out = torch.empty_like(step["x"])
    selective_state_update(states, **step, out=out)
    prefilled = torch.empty_like(scan["x"])
    _, final, _ = mamba_chunk_scan_combined(
        **scan,
        chunk_size=32,
        cu_seqlens=torch.tensor([0, 1]),
        out=prefilled,
        return_varlen_states=True,
        return_track_states=True,
        state_dtype=torch.float32,
    )
    torch.testing.assert_close(out, prefilled[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, final, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    scan, step = step_inputs(9, 2, 1, torch.bfloat16, False)
    states = scan["initial_states"].repeat(2, 1, 1, 1).bfloat16()
    before = states.clone()
    out = torch.empty_like(step["x"])
    selective_state_update(states, **step, out=out)
    steps = reference.time_steps(scan["dt"][0], scan["dt_bias"], True)
    for row in range(2):
        y, after = reference.recur(
            before[row].double(),
            step["x"][row],
            steps[row],
            scan["A"],
            step["B"][row],
            step["C"][row],
        )
        y = y + scan["D"].double()[:, None] * step["x"][row].double()
        torch.testing.assert_close(out[row].double(), y, rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(states[row].double(), after, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("keyword", ["intermediate_states_buffer", "disable_state_update"])
def test_speculative_decoding_is_refused(keyword: str) -> None:
    _, step = step_inputs(0, 1, 1, torch.float32, False)
    states = torch.zeros(1, HEADS, HEAD_DIM, STATE_DIM)
    with pytest.raises(NotImplementedError, match=f"{keyword}.*without speculative decoding"):
        selective_state_update(states, **step, out=step["x"].clone(), **{keyword: True})
