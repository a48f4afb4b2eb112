"""Moves segments between the device pools, RAM and disk, on background threads.

One `TierManager` serves one rank.  The scheduler thread only asks (`capture`, `lookup`, `hold`);
copies, hashes and files are the work of threads whose long calls release the GIL:

* *copy* (`capture.py`) fills captured payloads from the device pools,
* *write* (`persist.py`) makes chains durable, in the order in which it was asked; what waits for it
  beyond a bounded share of the RAM tier is not held there,
* *read* (`promote.py`) fetches chains from disk and verifies them.

Nothing here raises into the scheduler: an outcome is a value or the exception of a `Future`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import Shard
from engram.store.base import SegmentStore
from engram.tiers.base import DeviceReader, PageKeys, PayloadLayout, Persisted, Promoted, Segment
from engram.tiers.capture import Capturer
from engram.tiers.health import HealthPolicy
from engram.tiers.leases import Leases
from engram.tiers.lookup import Lookup
from engram.tiers.payload import views
from engram.tiers.persist import Persister
from engram.tiers.planning import SegmentPlanner
from engram.tiers.promote import Promoter
from engram.tiers.ram import RamTier

Done = TypeVar("Done")


@dataclass(slots=True)
class TierManager:
    """Owner of one rank's RAM tier and of its way to the store.

    `stateful` says that the model has a recurrent state: a sequence goes on only where it exists.
    `clock` gives seconds.  Without `page_keys` rows that are read from disk are compared with
    nothing that is captured later: what they begin with alike is then stored twice.
    """

    ram: RamTier
    store: SegmentStore
    shard: Shard
    layout: PayloadLayout
    stateful: bool
    clock: Callable[[], float] = time.monotonic
    health: HealthPolicy = field(default_factory=HealthPolicy)
    page_keys: PageKeys | None = None
    _leases: Leases = field(init=False)
    _lookup: Lookup = field(init=False)
    _capturer: Capturer = field(init=False)
    _persister: Persister = field(init=False)
    _promoter: Promoter = field(init=False)

    def __post_init__(self) -> None:
        planner = SegmentPlanner(self.shard, self.layout)
        self._leases = Leases(self.ram, self.clock)
        self._lookup = Lookup(self.ram, self._leases, self.stateful)
        self._capturer = Capturer(self.ram, planner, self._lookup, self.health)
        self._persister = Persister(self.ram, self.store, planner)
        self._promoter = Promoter(self.ram, self.store, planner, self._lookup, self.page_keys)

    # ---- capture ----

    def capture(
        self,
        keys: Sequence[str],
        start: int,
        tokens: Sequence[int],
        parent: Segment | None,
        read: DeviceReader,
        *,
        on_done: Callable[[], None],
    ) -> bool:
        """Queue the copy of the rows [start, start + len(tokens)) and of the state at their end.

        `keys` are those of the pages of `tokens`, `parent` the rows that end at `start`.  Where
        rows in RAM begin with the same tokens and then part, these are cut, so that what is common
        can be stored once.  `on_done` is called on the copy thread once the device memory is no
        longer read.  Returns False, without calling it, when the RAM tier has no room: the state
        is then not kept.
        """
        return self._capturer.capture(keys, start, tokens, parent, read, on_done=on_done)

    # ---- lookup and leases ----

    def boundary(self, key: str) -> Segment | None:
        """The segment from which a sequence goes on at `key`: its state there if it has one."""
        return self._lookup.boundary(key)

    def stand(self, keys: Sequence[str]) -> Segment | None:
        """The rows that end at the last of `keys` from which a sequence can go on, if any do."""
        return self._lookup.stand(keys)

    def lookup(self, owner: str, keys: Sequence[str], page_size: int) -> list[int]:
        """Lengths, in pages of `keys`, that can be loaded now; they are leased to `owner`.

        `keys` are the page keys past some device-resident prefix, first page first.
        """
        return self._lookup.promise(owner, keys, page_size)

    def lease(
        self, owner: str, chain: Sequence[Segment], *, seconds: float, promised: bool = False
    ) -> None:
        """Keep a chain in RAM for `owner` until it is released or `seconds` have passed.

        Unless it is `promised` to SGLang, it gives way to what is read from disk later when that
        finds no room: the older of two restored snapshots is then read again when it is needed.
        """
        self._leases.take(owner, chain, seconds=seconds, promised=promised)

    def release(self, owner: str) -> None:
        """End the lease of `owner`, if it has one."""
        self._leases.release(owner)

    # ---- disk ----

    def persist(self, boundary: Segment) -> Future[Persisted]:
        """Make the chain that ends in a boundary durable.  The future fails with an `EngramError`.

        A chain that waits for its turn longer than there is room to hold it may have left RAM by
        then: `CaptureLostError`, whose `details` say which boundary to compute again.
        """
        return self._persister.persist(boundary)

    def unsaved_bytes(self, boundary: Segment) -> int:
        """Bytes of the files that making a chain durable would write now.

        Compares bytes and asks the disk: for a thread in the background.  Not less than what is
        written, unless a file that is relied on is damaged or dropped in between.
        """
        return self._persister.unsaved_bytes(boundary)

    def promote(
        self, refs: Sequence[SegmentRef], owner: str, *, seconds: float, exact: bool
    ) -> Future[Promoted]:
        """Bring a chain into RAM, verified, and lease it to `owner` for `seconds`.

        With `exact` the very segments named are made the ones that lookups find; else bytes of the
        same tokens that are in RAM already will do.  The future fails with an `EngramError`:
        `SnapshotCorruptError` for a chain that does not end as one of this model does, too.
        """
        return self._promoter.promote(refs, owner, seconds=seconds, exact=exact)

    def abandon(self, owner: str) -> None:
        """Nobody waits for the promotions of `owner` any longer.

        Those not begun never begin; what the others bring is not leased.
        """
        self._promoter.abandon(owner)

    def drop(self, segment_ids: Sequence[str]) -> Future[int]:
        """Delete segment files nobody names any more; returns how many were asked to go.

        Queued behind every write asked for before, so a chain that is being made durable is
        never pulled from under its manifest.
        """
        return self._persister.drop(segment_ids)

    def in_background(self, work: Callable[[], Done]) -> Future[Done]:
        """Do what may take long for a scheduler on a thread that reads."""
        return self._promoter.in_background(work)

    # ---- life ----

    def views(self, segment: Segment) -> dict[str, torch.Tensor]:
        """The buffers of a segment in RAM, by name."""
        assert segment.payload is not None
        return views(segment.payload, segment.buffers)

    def depths(self) -> dict[str, int]:
        """How much is under way: chains written and waiting to be, promotions, leases, bytes."""
        with self.ram.lock:
            self._leases.expire()
            return {
                **self._persister.depths(),
                "promotions": self._promoter.depth(),
                "leases": len(self._leases),
            }

    def quiesce(self) -> None:
        """Return when no capture reads device memory any more."""
        self._capturer.quiesce()

    def forget(self) -> None:
        """Let go of all that no running work holds; what was asked for is still finished."""
        with self.ram.lock:
            self._leases.release_all()
            self.ram.clear()

    def close(self) -> None:
        """Finish what was asked for and stop the threads."""
        self._persister.finish()
        self._capturer.close()
        self._persister.close()
        self._promoter.close()
