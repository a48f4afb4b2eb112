"""Whether a recurrent state is one: found out while it is copied, a buffer at a time.

A state that holds a NaN or an infinity gives nothing but NaNs for ever after, in every turn that
starts from it, so each one is looked at. That its norm has changed by more than `MAX_DRIFT` is a
sign of a computation that runs away, and is looked at only where it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from engram.core.settings import Settings

MAX_DRIFT: Final = 10.0
"""Factor by which the norm may grow or shrink between two states that are compared."""


@dataclass(frozen=True, slots=True)
class StateHealth:
    """What was seen: `problem` in words, or None; `norm` is the L2 norm of the whole state."""

    problem: str | None = None
    norm: float | None = None

    def drift(self, before: float | None) -> str | None:
        """What is wrong with this norm after the norm `before`; None if nothing or not known."""
        if self.norm is None or before is None:
            return None
        low, high = sorted((self.norm, before))
        if high <= MAX_DRIFT * low:
            return None
        return f"the norm went from {before:.4g} to {self.norm:.4g}"


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """What is looked at, and what becomes of a state that fails.

    A state's norm is compared with that of the state `interval` boundaries before it on its chain,
    if that is known; 0 switches this off. `keep` keeps a state that fails, with a mark.
    """

    interval: int = 0
    keep: bool = False

    @classmethod
    def of(cls, settings: Settings) -> HealthPolicy:
        """The policy that an operator's settings ask for."""
        return cls(
            settings.snapshot_health_check_interval,
            settings.snapshot_health_failure_policy == "log_and_continue",
        )


class StateCheck:
    """Looks at the buffers of one state.

    `look` reads a buffer once, where it lies (on CUDA it only enqueues that on the current stream),
    best right after it was written: then it is in the cache still. `result` may be asked for once
    all that is done.
    """

    def __init__(self, *, norm: bool) -> None:
        self._norm = norm
        self._names: list[str] = []
        self._seen: list[torch.Tensor] = []

    def look(self, name: str, buffer: torch.Tensor) -> None:
        """Take in one buffer, of any shape; what is no floating-point number is always healthy."""
        if not buffer.is_floating_point():
            return
        # A NaN comes out of both, and an infinity is one of them.
        seen = torch.stack(torch.aminmax(buffer)).double()
        if self._norm:
            norm = torch.linalg.vector_norm(buffer, dtype=torch.float64)
            seen = torch.cat((seen, norm.view(1)))
        self._names.append(name)
        self._seen.append(seen)

    def result(self) -> StateHealth:
        """What is to be said of all buffers together."""
        if not self._names:
            return StateHealth()
        values = torch.stack(self._seen).tolist()
        for name, (low, high, *_) in zip(self._names, values, strict=True):
            if math.isnan(low) or math.isnan(high):
                return StateHealth(f"{name} holds a NaN")
            if math.isinf(low) or math.isinf(high):
                return StateHealth(f"{name} holds an infinity")
        if not self._norm:
            return StateHealth()
        return StateHealth(norm=math.sqrt(sum(norm * norm for _, _, norm in values)))
