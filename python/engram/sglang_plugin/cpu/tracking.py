"""Copies of recurrent states into the slots that SGLang's `extra_buffer` strategy keeps.

Stands in for `track_mamba_states_if_needed` and `track_mamba_states_all_layers` (Triton there).
"""

from __future__ import annotations

import torch


def track_mamba_states_if_needed(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy one layer's states of the rows in the mask from their slot to their tracking slot.

    Args:
        conv_states, ssm_states: [slots, ...], changed in place.
        cache_indices, mamba_track_indices: [batch_size or more], source and destination slots.
        mamba_track_mask: [batch_size or more], bool.
        check_freed_slots: skip rows with a negative slot.
    """
    pools = (conv_states.unsqueeze(0), ssm_states.unsqueeze(0))
    _copy_rows(
        pools,
        cache_indices,
        mamba_track_mask,
        mamba_track_indices,
        batch_size,
        check_freed_slots,
    )


def track_mamba_states_all_layers(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Do the same for every layer at once; the pools are [layers, slots, ...]."""
    pools = (conv_states_pool, ssm_states_pool)
    _copy_rows(
        pools,
        cache_indices,
        mamba_track_mask,
        mamba_track_indices,
        batch_size,
        check_freed_slots,
    )


def _copy_rows(
    pools: tuple[torch.Tensor, ...],
    sources: torch.Tensor,
    mask: torch.Tensor,
    destinations: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool,
) -> None:
    chosen = mask[:batch_size].bool()
    sources, destinations = sources[:batch_size], destinations[:batch_size]
    if check_freed_slots:
        chosen = chosen & (sources >= 0) & (destinations >= 0)
    if not bool(chosen.any()):
        return
    source, destination = sources[chosen].long(), destinations[chosen].long()
    for pool in pools:
        pool[:, destination] = pool[:, source]
