"""The chunked scan against the recurrence, one token at a time in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.sglang_plugin.cpu.mamba2 import mamba_chunk_scan_combined
from unit.cpu import reference
from unit.cpu.reference import Tensors, starts_of

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any)
CHUNKS = st.sampled_from([16, 32, 64, 128])


def run(
    inputs: Tensors, lengths: list[int], chunk_size: int, **more: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    out = torch.full_like(inputs["x"], float("nan"))
    grid, final, tracked = mamba_chunk_scan_combined(
        **inputs,
        chunk_size=chunk_size,
        cu_seqlens=torch.tensor(starts_of(lengths), dtype=torch.int32),
        out=out,
        return_varlen_states=True,
        return_track_states=True,
        **{"state_dtype": torch.float32, **more},
    )
    return out, grid, final, tracked


def expect(inputs: Tensors, lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return reference.scan(**inputs, lengths=lengths)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def part(inputs: Tensors, sequence: int, begin: int, end: int) -> Tensors:
    """The arguments for the flat positions [begin, end) of one sequence alone."""
    cut = {
        name: value[:, begin:end]
        if name in ("x", "dt", "B", "C", "z") and value is not None
        else value
        for name, value in inputs.items()
    }
    initial = inputs["initial_states"]
    cut["initial_states"] = None if initial is None else initial[sequence : sequence + 1]
    return cut


@given(
    seed=SEEDS, lengths=LENGTHS, chunk_size=CHUNKS, groups=st.sampled_from([1, 2, 4]),
    initial=st.booleans(), gated=st.booleans(), wide_D=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_ragged_batch_equals_the_recurrence(
    seed: int, lengths: list[int], chunk_size: int, groups: int,
    initial: bool, gated: bool, wide_D: bool,
) -> None:  # fmt: skip
    inputs = reference.scan_inputs(
        seed, lengths, groups=groups, initial=initial, gated=gated, wide_D=wide_D
    )
    outputs, histories = expect(inputs, lengths)
    out, grid, final, tracked = run(inputs, lengths, chunk_size)
    assert tracked is None
    assert_near(out[0], outputs)
    assert_near(final, torch.stack([history[-1] for history in histories]))
    assert grid.shape == (1, -(-sum(lengths) // chunk_size), *final.shape[1:])
    starts = starts_of(lengths)
    for row, state in enumerate(grid[0]):
        position = row * chunk_size
        seq = max(seq for seq in range(len(lengths)) if starts[seq] <= position)
        if starts[seq] % chunk_size == 0:
            assert_near(state, histories[seq][position - starts[seq]])
        else:
            assert state.isnan().all()


@given(seed=SEEDS, lengths=LENGTHS, chunk_size=CHUNKS)
@settings(max_examples=20)
def test_tracked_states_are_those_at_chunk_ends(
    seed: int, lengths: list[int], chunk_size: int
) -> None:
    inputs = reference.scan_inputs(seed, lengths)
    _, histories = expect(inputs, lengths)
    starts = starts_of(lengths)
    asked = [
        (seq, done)
        for seq, length in enumerate(lengths)
        for done in range(0, length + 1, chunk_size)
    ]
    _, _, _, tracked = run(
        inputs, lengths, chunk_size,
        track_seq_idx=torch.tensor([seq for seq, _ in asked]),
        track_end_locs=torch.tensor([starts[seq] + done for seq, done in asked]),
    )  # fmt: skip
    assert tracked is not None
    assert tracked.shape[:2] == (1, len(asked))
    for state, (seq, done) in zip(tracked[0], asked, strict=True):
        assert_near(state, histories[seq][done])


@given(seed=SEEDS, lengths=LENGTHS.filter(lambda lengths: len(lengths) > 1), chunk_size=CHUNKS)
@settings(max_examples=20)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(
    seed: int, lengths: list[int], chunk_size: int
) -> None:
    inputs = reference.scan_inputs(seed, lengths)
    out, _, final, _ = run(inputs, lengths, chunk_size)
    starts = starts_of(lengths)
    for seq, length in enumerate(lengths):
        alone = part(inputs, seq, starts[seq], starts[seq + 1])
        out_alone, _, final_alone, _ = run(alone, [length], chunk_size)
        assert torch.equal(out_alone[0], out[0, starts[seq] : starts[seq + 1]])
        assert torch.equal(final_alone[0], final[seq])


@given(seed=SEEDS, length=st.integers(2, 200), chunk_size=CHUNKS, data=st.data())
@settings(max_examples=20)
def test_a_cut_prefill_equals_the_whole(
    seed: int, length: int, chunk_size: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, length - 1), label="cut")
    inputs = reference.scan_inputs(seed, [length])
    out, _, final, _ = run(inputs, [length], chunk_size)
    first, _, state, _ = run(part(inputs, 0, 0, cut), [cut], chunk_size)
    rest = {**part(inputs, 0, cut, length), "initial_states": state}
    second, _, final_cut, _ = run(rest, [length - cut], chunk_size)
    assert_near(torch.cat([first, second], dim=1), out.double())
    assert_near(final_cut, final.double())


def test_a_neighbour_with_nan_stays_by_itself() -> None:
    inputs = reference.scan_inputs(3, [40, 70])
    inputs["x"][:, 40:] = float("nan")
    inputs["B"][:, 40:] = float("inf")
    out, _, final, _ = run(inputs, [40, 70], 32)
    assert out[0, :40].isfinite().all()
    assert final[0].isfinite().all()
    assert not out[0, 40:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    lengths = [70, 9]
    inputs = reference.scan_inputs(11, lengths, dtype=dtype, gated=True)
    outputs, histories = expect(inputs, lengths)
    out, grid, final, _ = run(inputs, lengths, 32, state_dtype=None)
    assert out.dtype == final.dtype == grid.dtype == dtype
    unit = torch.finfo(dtype).eps  # one rounding is half of this, relatively
    torch.testing.assert_close(out[0].double(), outputs, rtol=unit, atol=1e-4)
    want = torch.stack([history[-1] for history in histories])
    torch.testing.assert_close(final.double(), want, rtol=unit, atol=1e-4)


def test_long_decays_keep_their_digits() -> None:
    """Sums of hundreds of log decays in float32 would leave three digits of their differences."""
    lengths = [256]
    inputs = reference.scan_inputs(5, lengths)
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    inputs["dt"] = torch.rand_like(inputs["dt"]) * 3
    inputs |= {"dt_softplus": False, "dt_bias": None}
    inputs["dt"][:, ::2] = 1e-4
    outputs, _ = expect(inputs, lengths)
    out, _, _, _ = run(inputs, lengths, 64)
    torch.testing.assert_close(out[0].double(), outputs, rtol=2e-5, atol=2e-5)


def test_initial_states_are_not_written() -> None:
    inputs = reference.scan_inputs(7, [33])
    before = inputs["initial_states"].clone()
    run(inputs, [33], 32)
    assert torch.equal(inputs["initial_states"], before)


@pytest.mark.parametrize(("seq", "position"), [(0, 31), (1, 64), (0, 64), (1, 137)])
def test_a_tracked_position_off_the_chunks_is_an_error(seq: int, position: int) -> None:
    with pytest.raises(ValueError, match="whole chunks of 32 tokens"):
        run(
            reference.scan_inputs(0, [41, 64]), [41, 64], 32,
            track_seq_idx=torch.tensor([seq]), track_end_locs=torch.tensor([position]),
        )  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        {"return_varlen_states": False},
        {"return_track_states": False},
        {"return_final_states": True},
        {"return_intermediate_states": True},
        {"out": None},
        {"cu_seqlens": None},
    ],
)
def test_other_flags_are_refused(flags: Tensors) -> None:
    inputs = reference.scan_inputs(0, [8])
    usual = {
        "cu_seqlens": torch.tensor([0, 8]),
        "out": torch.empty_like(inputs["x"]),
        "return_varlen_states": True,
        "return_track_states": True,
    }
    with pytest.raises(NotImplementedError, match="the CPU scan"):
        mamba_chunk_scan_combined(**inputs, chunk_size=32, **{**usual, **flags})
