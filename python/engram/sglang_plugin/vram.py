"""What SGLang's tree holds, and the pins: conversations whose path in it is locked.

A pinned path is never evicted, whatever else is computed.  Pins share the pools with every request,
so their sum is bounded: by a budget in bytes, and by half of the slots of either pool.  When the
tree is emptied the locks die with it; a pin is then no longer resident, until it is set again.
Everything here runs on the scheduler thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from engram.errors import PinBudgetError
from engram.sglang_plugin.pools import DevicePools, Kind

if TYPE_CHECKING:
    from engram.sglang_plugin.cache import EngramRadixCache

DEFAULT_SHARE: Final = 0.25
"""Of the KV pool (of the states' in a model without attention), the budget unless one is given."""
MOST: Final = 0.5
"""Of the slots of each pool, what pins may hold at most: requests need the rest."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The slots of one kind: how many, and the bytes of one over all layers."""

    slots: int
    slot_bytes: int

    @classmethod
    def of(cls, pools: DevicePools, kind: Kind) -> Pool:
        """The pool of one kind of buffers; empty if there are none."""
        tensors = [buffer.tensor for buffer in pools.buffers if buffer.kind is kind]
        if not tensors:
            return cls(0, 0)
        sizes = [tensor[0].numel() * tensor.element_size() for tensor in tensors]
        return cls(tensors[0].shape[0], sum(sizes))

    @property
    def nbytes(self) -> int:
        """Bytes of all its slots."""
        return self.slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class _Pin:
    lock: Any
    kv_slots: torch.Tensor
    state_slot: int | None


class VramPins:
    """The pins of one rank's tree.  ``budget`` is in bytes; None for a quarter of the KV pool."""

    def __init__(self, cache: EngramRadixCache, pools: DevicePools, budget: int | None) -> None:
        self.kv = Pool.of(pools, Kind.KV)
        self.states = Pool.of(pools, Kind.STATE)
        share = (self.kv.nbytes or self.states.nbytes) * DEFAULT_SHARE
        self.budget = int(share) if budget is None else budget
        self._cache = cache
        self._pins: dict[str, _Pin] = {}

    def pin(self, owner: str, tokens: Any, extra_key: str | None, cache_salt: str | None) -> bool:
        """Lock the path of a sequence for `owner`, in place of the one it has; False if the tree
        does not hold it to its last token, with its state.

        Raises `PinBudgetError` if it would be too much, and leaves the one that it has.
        """
        found = self._cache.path_of(tokens, extra_key, cache_salt)
        if found is None:
            return False
        node, kv_slots, state_slot = found
        others = [pin for name, pin in self._pins.items() if name != owner]
        kv = _distinct([kv_slots, *(pin.kv_slots for pin in others)])
        states = len({state_slot, *(pin.state_slot for pin in others)} - {None})
        self._check(kv, states)
        pin = _Pin(self._cache.lock(node), kv_slots, state_slot)
        self.unpin(owner)
        self._pins[owner] = pin
        return True

    def _check(self, kv: int, states: int) -> None:
        needed = self._bytes(kv, states)
        slots = kv <= self.kv.slots * MOST and states <= self.states.slots * MOST
        if needed <= self.budget and slots:
            return
        pinned = self.pinned_bytes
        if slots:
            limit = f"--snapshot-pin-budget-gb allows {self.budget}"
        else:
            limit = f"{kv} KV and {states} state slots would be more than half of a pool"
        raise PinBudgetError(
            f"{needed} bytes would be pinned in VRAM, {pinned} are: {limit}",
            hint="unpin another conversation, or raise --snapshot-pin-budget-gb",
            details={"needed": needed - pinned, "pinned": pinned, "budget": self.budget},
        )

    def unpin(self, owner: str) -> bool:
        """Let go of what `owner` has pinned; whether there was anything."""
        pin = self._pins.pop(owner, None)
        if pin is not None:
            self._cache.unlock(pin.lock)
        return pin is not None

    def forget(self) -> None:
        """The tree was emptied, and the locks with it."""
        self._pins.clear()

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose pins are resident."""
        return tuple(self._pins)

    @property
    def pinned_bytes(self) -> int:
        """Bytes that pins hold, those that two share once."""
        pins = self._pins.values()
        states = {pin.state_slot for pin in pins} - {None}
        return self._bytes(_distinct([pin.kv_slots for pin in pins]), len(states))

    def report(self) -> dict[str, Any]:
        """What the tree holds now, and what of it is pinned; sizes in bytes."""
        tokens, states = self._cache.resident_sizes()
        return {
            "capacity_bytes": self.kv.nbytes + self.states.nbytes,
            "bytes": self._bytes(tokens, states),
            "tokens": tokens,
            "states": states,
            "token_bytes": self.kv.slot_bytes,
            "state_bytes": self.states.slot_bytes,
            "pinned_bytes": self.pinned_bytes,
            "pin_budget_bytes": self.budget,
            "pinned": list(self.owners),
        }

    def _bytes(self, kv: int, states: int) -> int:
        return kv * self.kv.slot_bytes + states * self.states.slot_bytes


def _distinct(slots: Sequence[torch.Tensor] | Iterable[torch.Tensor]) -> int:
    """How many different slots there are in all."""
    every = list(slots)
    return int(torch.unique(torch.cat(every)).numel()) if every else 0
