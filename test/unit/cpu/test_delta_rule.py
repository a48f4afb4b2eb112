"""The delta rule in blocks, and by one token, against the recurrence in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.sglang_plugin.cpu import delta_rule
from engram.sglang_plugin.cpu.delta_rule import CHUNK, PAD_SLOT_ID, DeltaInputs
from unit.cpu import reference
from unit.cpu.reference import starts_of

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any)
KEY_DIM, VALUE_DIM, HEADS, SLOTS = 8, 6, 4, 9
SCALE = KEY_DIM**-0.5


def draw(
    seed: int, tokens: int, *, key_heads: int = 2, by_channel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[DeltaInputs, torch.Tensor]:  # fmt: skip
    """Inputs with decays between almost nothing and almost everything, and a pool of states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = KEY_DIM if by_channel else 1
    decay = torch.exp(torch.rand(tokens, HEADS, width, generator=generator) * 10 - 7)
    inputs = DeltaInputs(
        q=normal(tokens, key_heads, KEY_DIM),
        k=normal(tokens, key_heads, KEY_DIM),
        v=normal(tokens, HEADS, VALUE_DIM),
        log_decay=-decay,
        beta=torch.rand(tokens, HEADS, generator=generator),
    )
    return inputs, normal(SLOTS, HEADS, VALUE_DIM, KEY_DIM).float()


def cut(inputs: DeltaInputs, rows: slice) -> DeltaInputs:
    return DeltaInputs(*(getattr(inputs, name)[rows] for name in DeltaInputs.__annotations__))


def expect(
    inputs: DeltaInputs, state: torch.Tensor, rows: range
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of some tokens, and the state before the first of them and after each."""
    outputs, states = [], [state.double()]
    for t in rows:
        output, after = reference.delta(
            states[-1], inputs.q[t], inputs.k[t], inputs.v[t], inputs.log_decay[t],
            inputs.beta[t], SCALE,
        )  # fmt: skip
        outputs.append(output)
        states.append(after)
    return torch.stack(outputs) if outputs else inputs.v[:0].double(), states


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@given(seed=SEEDS, lengths=LENGTHS, key_heads=st.sampled_from([1, 2, 4]), by_channel=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_ragged_batch_equals_the_recurrence(
    seed: int, lengths: list[int], key_heads: int, by_channel: bool
) -> None:
    inputs, states = draw(seed, sum(lengths), key_heads=key_heads, by_channel=by_channel)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed)).tolist()
    slots, before = slots[: len(lengths)], states.clone()
    starts = starts_of(lengths)
    outputs, chunks = delta_rule.scan(inputs, states, slots, starts, scale=SCALE)
    kept = iter(chunks)
    for slot, (start, end) in zip(slots, pairwise(starts), strict=True):
        wanted, history = expect(inputs, before[slot], range(start, end))
        assert_near(outputs[start:end], wanted)
        assert_near(states[slot], history[-1])
        for done in range(0, end - start, CHUNK):
            assert_near(next(kept), history[done])
    assert next(kept, None) is None
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(states[others], before[others])


@given(
    seed=SEEDS, slots=st.lists(st.integers(-1, 8), min_size=1, max_size=6), channel=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_a_step_equals_the_recurrence(seed: int, slots: list[int], channel: bool) -> None:
    slots = list(dict.fromkeys(slots))  # every request has a slot of its own
    inputs, states = draw(seed, len(slots), by_channel=channel)
    before = states.clone()
    outputs = delta_rule.step(inputs, states, torch.tensor(slots), scale=SCALE)
    for row, slot in enumerate(slots):
        if slot == PAD_SLOT_ID:
            assert not outputs[row].any()
            continue
        wanted, history = expect(inputs, before[slot], range(row, row + 1))
        assert_near(outputs[row], wanted[0])
        assert_near(states[slot], history[-1])
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(states[others], before[others])


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("split", [1, 31, 64, 100])
def test_a_prefill_goes_on_from_a_state(split: int, by_channel: bool) -> None:
    inputs, states = draw(7, 130, by_channel=by_channel)
    whole = states.clone()
    wanted, _ = delta_rule.scan(inputs, whole, [3], [0, 130], scale=SCALE)
    parts = [
        delta_rule.scan(cut(inputs, rows), states, [3], [0, rows.stop - rows.start], scale=SCALE)[0]
        for rows in (slice(0, split), slice(split, 130))
    ]
    assert_near(torch.cat(parts), wanted.double())
    assert_near(states[3], whole[3].double())


@pytest.mark.parametrize("by_channel", [False, True])
def test_a_sequences_bits_do_not_depend_on_its_batch(by_channel: bool) -> None:
    lengths = [37, 5, 100]
    inputs, states = draw(11, sum(lengths), by_channel=by_channel)
    alone, together = states.clone(), states.clone()
    starts = starts_of(lengths)
    outputs, _ = delta_rule.scan(inputs, together, [0, 1, 2], starts, scale=SCALE)
    for slot, (start, end) in enumerate(pairwise(starts)):
        part = cut(inputs, slice(start, end))
        output, _ = delta_rule.scan(part, alone, [slot], [0, end - start], scale=SCALE)
        assert torch.equal(output, outputs[start:end])
    assert torch.equal(alone, together)


def test_states_stay_where_they_are_not_to_be_written() -> None:
    inputs, states = draw(3, 70)
    before = states.clone()
    outputs, chunks = delta_rule.scan(inputs, states, [5], [0, 70], scale=SCALE, write_back=False)
    assert outputs.any()
    assert torch.equal(states, before)
    assert torch.equal(chunks[0], before[5])


@pytest.mark.parametrize("by_channel", [False, True])
def test_bfloat16_inputs_are_computed_in_float32(by_channel: bool) -> None:
    inputs, states = draw(5, 80, by_channel=by_channel, dtype=torch.bfloat16)
    wanted, history = expect(inputs, states[0], range(80))
    outputs, _ = delta_rule.scan(inputs, states, [0], [0, 80], scale=SCALE)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.double(), wanted, rtol=1e-2, atol=1e-2)
    assert_near(states[0], history[-1])
