"""Copies of the states of the rows in the mask, and of no others."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.sglang_plugin.cpu.tracking import (
    track_mamba_states_all_layers,
    track_mamba_states_if_needed,
)

LAYERS, SLOTS, BATCH = 3, 12, 4
MASKS = st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)


def pools(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(LAYERS, SLOTS, 5, 3, generator=generator)
    return conv, torch.randn(LAYERS, SLOTS, 2, 3, 4, generator=generator)


@given(
    seed=st.integers(0, 2**32 - 1),
    mask=MASKS,
    slots=st.permutations(range(SLOTS)),
    batch_size=st.integers(1, BATCH),
)
def test_tracked_rows_are_copied_in_every_layer(
    seed: int, mask: list[bool], slots: list[int], batch_size: int
) -> None:
    sources, destinations = slots[:BATCH], slots[BATCH : 2 * BATCH]
    conv, ssm = pools(seed)
    wanted_conv, wanted_ssm = conv.clone(), ssm.clone()
    for row in range(batch_size):
        if mask[row]:
            wanted_conv[:, destinations[row]] = conv[:, sources[row]]
            wanted_ssm[:, destinations[row]] = ssm[:, sources[row]]
    indices = (
        torch.tensor(sources, dtype=torch.int32),
        torch.tensor(mask),
        torch.tensor(destinations),
    )

    layer_conv, layer_ssm = conv[1].clone(), ssm[1].clone()
    track_mamba_states_if_needed(layer_conv, layer_ssm, *indices, batch_size)
    assert torch.equal(layer_conv, wanted_conv[1])
    assert torch.equal(layer_ssm, wanted_ssm[1])

    track_mamba_states_all_layers(conv, ssm, *indices, batch_size)
    assert torch.equal(conv, wanted_conv)
    assert torch.equal(ssm, wanted_ssm)


def test_freed_slots_are_skipped() -> None:
    conv, ssm = pools(1)
    wanted_conv, wanted_ssm = conv.clone(), ssm.clone()
    wanted_conv[:, 6], wanted_ssm[:, 6] = conv[:, 2], ssm[:, 2]
    track_mamba_states_all_layers(
        conv,
        ssm,
        torch.tensor([-1, 1, 2]),
        torch.tensor([True, True, True]),
        torch.tensor([4, -1, 6]),
        3,
        check_freed_slots=True,
    )
    assert torch.equal(conv, wanted_conv)
    assert torch.equal(ssm, wanted_ssm)
