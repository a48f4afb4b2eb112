"""The hash in torch, for any device. Equal to `hash_numpy` bit by bit."""

from __future__ import annotations

import torch

from engram.conditional_memory.hash_plan import BLOCK, HashPlan


class TorchHash:
    """One layer's hash with its numbers on ``device``."""

    def __init__(self, plan: HashPlan, device: torch.device) -> None:
        self._plan = plan
        self._multipliers = torch.tensor(plan.multipliers, device=device)
        self._moduli = torch.tensor(plan.moduli, device=device)
        self._sizes = torch.tensor(plan.sizes, device=device).view_as(self._moduli)
        self._offsets = torch.tensor(plan.offsets, device=device)

    def __call__(self, window: torch.Tensor, *, offsets: bool) -> torch.Tensor:
        """``window`` int64 [B, max_n - 1 + T] to int64 [B, T, C], with or without offsets."""
        hashes = self._polynomial(window) if self._plan.polynomial else self._xor(window)
        ids = torch.cat(hashes, dim=-1)
        return ids.add_(self._offsets) if offsets else ids

    def _xor(self, window: torch.Tensor) -> list[torch.Tensor]:
        plan = self._plan
        hashes = []
        mix: torch.Tensor | None = None
        blocked: torch.Tensor | None = None
        for k in range(plan.max_n):
            ids = self._shifted(window, k)
            if plan.blocks:
                hit = ids == BLOCK
                blocked = hit if blocked is None else blocked | hit
                ids = ids.masked_fill(blocked, plan.pad)
            product = ids * self._multipliers[k]
            mix = product if mix is None else mix ^ product
            if k + 1 >= plan.min_n:
                hashes.append(mix.unsqueeze(-1) % self._moduli[k + 1 - plan.min_n])
        return hashes

    def _polynomial(self, window: torch.Tensor) -> list[torch.Tensor]:
        plan = self._plan
        hashes = []
        for index in range(plan.moduli.shape[0]):
            order = plan.min_n + index
            back = [self._shifted(window, order - 1 - j) for j in range(order)]
            mix = (torch.stack(back, dim=-1).unsqueeze(-2) * self._multipliers[:, :order]).sum(-1)
            hashes.append(mix % self._moduli[index] % self._sizes[index])
        return hashes

    def _shifted(self, window: torch.Tensor, k: int) -> torch.Tensor:
        return window[:, self._plan.max_n - 1 - k : window.shape[1] - k]
