"""Who may rely on a chain staying in RAM, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engram.tiers.base import Segment
from engram.tiers.ram import RamTier


@dataclass(slots=True)
class _Lease:
    held: tuple[Segment, ...]
    expires: float
    promised: bool


class Leases:
    """At most one lease an owner.  Every method may be called from any thread.

    `clock` gives seconds; leases that have run out end when anything is asked of the tiers.
    """

    def __init__(self, ram: RamTier, clock: Callable[[], float]) -> None:
        self._ram = ram
        self._clock = clock
        # The one that was taken longest ago first.
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def take(
        self, owner: str, chain: Sequence[Segment], *, seconds: float, promised: bool = False
    ) -> None:
        """Keep a chain in RAM for `owner`, in place of what it has leased before.

        Unless it is `promised`, it may have to `give_way`.
        """
        with self._ram.lock:
            held = self._ram.hold(chain)
            self.release(owner)
            self._leases[owner] = _Lease(held, self._clock() + seconds, promised)
            self.expire()

    def release(self, owner: str) -> None:
        """End the lease of `owner`, if it has one."""
        with self._ram.lock:
            lease = self._leases.pop(owner, None)
            if lease is not None:
                self._ram.release(lease.held)

    def release_all(self) -> None:
        """End every lease."""
        with self._ram.lock:
            for owner in list(self._leases):
                self.release(owner)

    def expire(self) -> None:
        """End the leases whose time has passed."""
        with self._ram.lock:
            now = self._clock()
            for owner in [o for o, lease in self._leases.items() if lease.expires <= now]:
                self.release(owner)

    def give_way(self) -> bool:
        """End the oldest lease that is promised to nobody; False if there is none."""
        with self._ram.lock:
            oldest = next((o for o, lease in self._leases.items() if not lease.promised), None)
            if oldest is None:
                return False
            self.release(oldest)
            return True
