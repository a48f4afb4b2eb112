"""The causal convolution against a window that slides one token at a time in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.sglang_plugin.cpu.causal_conv import (
    PAD_SLOT_ID,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from unit.cpu.reference import convolve, starts_of

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(2, 5)
DIM, SLOTS = 10, 7


@st.composite
def prefills(draw: st.DrawFn) -> tuple[list[int], list[int], list[bool]]:
    """Lengths, distinct slots (some of them padding) and whether each has an initial state."""
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    count = len(lengths)
    slots = draw(st.permutations(range(SLOTS)))[:count]
    padded = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    slots = [PAD_SLOT_ID if pad else slot for slot, pad in zip(slots, padded, strict=True)]
    return lengths, slots, draw(st.lists(st.booleans(), min_size=count, max_size=count))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, width: int, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return random(seed + 1, DIM, width), random(seed + 2, DIM) if with_bias else None


@given(
    seed=SEEDS,
    width=WIDTHS,
    batch=prefills(),
    with_bias=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
@settings(max_examples=100)
def test_prefill_equals_the_sliding_window(
    seed: int,
    width: int,
    batch: tuple[list[int], list[int], list[bool]],
    with_bias: bool,
    activation: str | None,
) -> None:
    lengths, slots, initial = batch
    tokens = random(seed, sum(lengths), DIM)
    weight, bias = weights(seed, width, with_bias)
    states = random(seed + 3, SLOTS, DIM, width - 1)
    wanted = states.clone().double()
    out = causal_conv1d_fn(
        tokens.t(),
        weight,
        bias,
        query_start_loc=torch.tensor(starts_of(lengths), dtype=torch.int32),
        conv_states=states,
        cache_indices=torch.tensor(slots, dtype=torch.int32),
        has_initial_state=torch.tensor(initial),
        activation=activation,
        seq_lens_cpu=lengths,
    )
    assert out.shape == (DIM, sum(lengths))
    for (start, end), slot, starts_with_state in zip(
        pairwise(starts_of(lengths)), slots, initial, strict=True
    ):
        if slot == PAD_SLOT_ID:
            assert (out[:, start:end] == 0).all()
        elif end > start:
            before = wanted[slot] if starts_with_state else torch.zeros(DIM, width - 1)
            outputs, after = convolve(tokens[start:end], weight, bias, before, activation)
            torch.testing.assert_close(
                out[:, start:end].t().double(), outputs, rtol=1e-5, atol=1e-5
            )
            wanted[slot] = after
    # Exact, and for every slot: inputs are kept as they are, and no other slot is written.
    assert torch.equal(states.double(), wanted)


@given(seed=SEEDS, width=WIDTHS, length=st.integers(2, 40), data=st.data())
@settings(max_examples=40)
def test_a_cut_prefill_equals_the_whole(
    seed: int, width: int, length: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, length - 1), label="cut")
    tokens = random(seed, length, DIM)
    weight, bias = weights(seed, width, True)

    def run(part: torch.Tensor, states: torch.Tensor, goes_on: bool) -> torch.Tensor:
        return causal_conv1d_fn(
            part.t(),
            weight,
            bias,
            query_start_loc=torch.tensor([0, len(part)]),
            conv_states=states,
            has_initial_state=torch.tensor([goes_on]),
        )

    whole_state, cut_state = random(1, 1, DIM, width - 1), random(1, 1, DIM, width - 1)
    whole = run(tokens, whole_state, False)
    parts = [run(tokens[:cut], cut_state, False), run(tokens[cut:], cut_state, True)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(cut_state, whole_state)


@given(seed=SEEDS, width=WIDTHS, lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4))
@settings(max_examples=40)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(
    seed: int, width: int, lengths: list[int]
) -> None:
    tokens = random(seed, sum(lengths), DIM)
    weight, bias = weights(seed, width, True)
    starts = starts_of(lengths)
    together = causal_conv1d_fn(tokens.t(), weight, bias, query_start_loc=torch.tensor(starts))
    for start, end in pairwise(starts):
        alone = causal_conv1d_fn(
            tokens[start:end].t(), weight, bias, query_start_loc=torch.tensor([0, end - start])
        )
        assert torch.equal(alone, together[:, start:end])


@given(
    seed=SEEDS,
    width=WIDTHS,
    slots=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=6).filter(
        lambda slots: len({slot for slot in slots if slot >= 0}) == sum(s >= 0 for s in slots)
    ),
    activation=st.sampled_from(["silu", None]),
)
@settings(max_examples=60)
def test_a_decode_step_equals_the_sliding_window(
    seed: int, width: int, slots: list[int], activation: str | None
) -> None:
    x = random(seed, len(slots), DIM)
    weight, bias = weights(seed, width, True)
    states = random(seed + 3, SLOTS, DIM, width - 1)
    wanted = states.clone().double()
    out = causal_conv1d_update(
        x,
        states,
        weight,
        bias,
        activation,
        conv_state_indices=torch.tensor(slots, dtype=torch.int32),
    )
    for row, slot in enumerate(slots):
        if slot == PAD_SLOT_ID:
            assert (out[row] == 0).all()
            continue
        output, wanted[slot] = convolve(x[row : row + 1], weight, bias, wanted[slot], activation)
        torch.testing.assert_close(out[row].double(), output[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(states.double(), wanted)


def test_a_decode_step_equals_a_prefill_of_one_token() -> None:
    x, state = random(1, 1, DIM), random(2, 1, DIM, 3)
    weight, bias = weights(3, 4, True)
    decoded_state, prefilled_state = state.clone(), state.clone()
    decoded = causal_conv1d_update(x, decoded_state, weight, bias, "silu")
    prefilled = causal_conv1d_fn(
        x.t(),
        weight,
        bias,
        query_start_loc=torch.tensor([0, 1]),
        conv_states=prefilled_state,
        has_initial_state=torch.tensor([True]),
    )
    torch.testing.assert_close(decoded, prefilled.t(), rtol=1e-6, atol=1e-6)
    assert torch.equal(decoded_state, prefilled_state)


def test_half_precision_is_computed_in_float32() -> None:
    tokens = random(4, 30, DIM).bfloat16()
    weight, bias = weights(5, 4, True)
    weight = weight.bfloat16()
    states = torch.zeros(1, DIM, 3, dtype=torch.float32)
    out = causal_conv1d_fn(
        tokens.t(), weight, bias, query_start_loc=torch.tensor([0, 30]), conv_states=states
    )
    outputs, after = convolve(tokens, weight, bias, torch.zeros(DIM, 3), "silu")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.t().double(), outputs, rtol=2**-8, atol=1e-6)
    assert torch.equal(states[0].double(), after)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_unknown_activation_is_an_error(activation: str) -> None:
    with pytest.raises(ValueError, match=f"unknown activation '{activation}'"):
        causal_conv1d_update(
            random(0, 1, 2), torch.zeros(1, 2, 3), random(1, 2, 4), None, activation
        )


def test_a_state_of_another_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="keeps 3 inputs, but the state pool has room for 4"):
        causal_conv1d_update(random(0, 1, 2), torch.zeros(1, 2, 4), random(1, 2, 4))


def test_speculative_decoding_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="without speculative decoding"):
        causal_conv1d_update(random(0, 1, 2, 3), torch.zeros(1, 2, 3), random(1, 2, 4))
