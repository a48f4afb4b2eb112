"""The hash in numpy: the reference that the others are held to, written to be read."""

from __future__ import annotations

import numpy as np

from engram.conditional_memory.hash_plan import BLOCK, HashPlan, Int64Array


def hash_window(window: Int64Array, plan: HashPlan) -> Int64Array:
    """Row of each column's part for every token: int64 [B, T, C], without offsets.

    ``window`` is int64 [B, max_n - 1 + T]. Products of ids beyond the vocabulary wrap, as int64
    does everywhere; remainders take the sign of the modulus, so negative ids hash to rows too.
    """
    columns = _polynomial(window, plan) if plan.polynomial else _xor(window, plan)
    return np.concatenate(columns, axis=-1)


def _xor(window: Int64Array, plan: HashPlan) -> list[Int64Array]:
    """Order n is the XOR over k < n of token[t - k] * multiplier[k] (paper, section 2.2; demo)."""
    columns = []
    mix = np.int64(0)
    blocked = np.bool_(False)
    for k in range(plan.max_n):
        ids = _shifted(window, plan, k)
        if plan.blocks:
            blocked = blocked | (ids == BLOCK)
            ids = np.where(blocked, plan.pad, ids)
        mix = mix ^ (ids * plan.multipliers[k])
        if k + 1 >= plan.min_n:
            columns.append(mix[..., None] % plan.moduli[k + 1 - plan.min_n])
    return columns


def _polynomial(window: Int64Array, plan: HashPlan) -> list[Int64Array]:
    """Order n is the sum over j < n of token[t - n + 1 + j] * base ** j."""
    columns = []
    for index, moduli in enumerate(plan.moduli):
        order = plan.min_n + index
        mix = np.int64(0)
        for j in range(order):
            mix = mix + _shifted(window, plan, order - 1 - j)[..., None] * plan.multipliers[:, j]
        heads = slice(index * moduli.size, (index + 1) * moduli.size)
        columns.append(mix % moduli % plan.sizes[heads])
    return columns


def _shifted(window: Int64Array, plan: HashPlan, k: int) -> Int64Array:
    """[B, T]: the ids k tokens back."""
    start = plan.max_n - 1 - k
    return window[:, start : window.shape[1] - k]
