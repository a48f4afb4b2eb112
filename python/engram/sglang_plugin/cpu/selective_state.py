"""One decode step of a selective state-space layer (Mamba-1 and Mamba-2), in plain torch.

Stands in for `selective_state_update` of SGLang (Triton there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

PAD_SLOT_ID = -1


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
    out: torch.Tensor | None = None,
    **speculative: Any,
) -> None:
    """Advance each row's state by one token and write the row's output.

    `state = state * exp(dt A) + (dt x) B` and `out = state C + D x`, gated by silu(z); computed in
    float32 whatever the inputs are.

    Args:
        state: [slots, heads, head_dim, state_dim], updated in place.
        x, dt, z: [batch, heads, head_dim].
        A: [heads, head_dim, state_dim]; D, dt_bias: [heads, head_dim].
        B, C: [batch, groups, state_dim]; `groups` divides `heads`.
        state_batch_indices: [batch], the slot of each row; rows in slot `pad_slot_id` are skipped
            (their output is zero). Without it row i has slot i.
        out: like x, any float dtype; written in place.
        speculative: the remaining keywords of SGLang's function, which serve speculative decoding.

    Raises:
        NotImplementedError: for several tokens a row or any keyword of speculative decoding.
    """
    used = [name for name, value in speculative.items() if value is not None and value is not False]
    if used or x.dim() != 3:
        raise NotImplementedError(
            f"the CPU state update takes one token a sequence (got x of {x.dim()} dimensions"
            f"{', ' + ', '.join(used) if used else ''}); serve without speculative decoding on a "
            "machine without an accelerator"
        )
    assert out is not None, "selective_state_update writes into `out`"
    if state_batch_indices is None:
        index = torch.arange(x.shape[0], device=x.device)
    else:
        index = state_batch_indices.long()
        live = index != pad_slot_id
        if not bool(live.all()):
            rows = live.nonzero(as_tuple=True)[0]
            part = torch.empty_like(out[rows])
            selective_state_update(
                state, x[rows], dt[rows], A, B[rows], C[rows], D,
                None if z is None else z[rows], dt_bias, dt_softplus, index[rows], out=part,
            )  # fmt: skip
            out.zero_()
            out[rows] = part
            return

    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    # Mamba-2 hands in one value a head, expanded: compute with that one value.
    decay, step = _collapse_expanded(A).float(), _collapse_expanded(dt).float()
    if dt_bias is not None:
        step = step + _collapse_expanded(dt_bias).float()
    if dt_softplus:
        step = functional.softplus(step)
    values = x.float()

    by_group = (batch, groups, heads // groups)
    new = state[index].float()
    new.mul_(torch.exp(step.unsqueeze(-1) * decay))
    new.view(*by_group, head_dim, state_dim).addcmul_(
        (step * values).view(*by_group, head_dim, 1),
        B.float().view(batch, groups, 1, 1, state_dim),
    )
    state[index] = new.to(state.dtype)

    result = torch.matmul(
        new.view(batch, groups, heads // groups * head_dim, state_dim),
        C.float().unsqueeze(-1),
    ).view(batch, heads, head_dim)
    if D is not None:
        result.addcmul_(values, D.float())
    if z is not None:
        result.mul_(functional.silu(z.float()))
    out.copy_(result)


def _collapse_expanded(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with every trailing expanded (stride 0) axis cut to length 1."""
    for axis in range(tensor.dim() - 1, 0, -1):
        if tensor.stride(axis) != 0:
            break
        tensor = tensor.narrow(axis, 0, 1)
    return tensor
