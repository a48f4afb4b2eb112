"""Moves segments between the device pools, RAM and disk, on background threads.

One `TierManager` serves one rank.  The scheduler thread only asks (`capture`, `lookup`, `hold`);
copies, hashes and files are the work of three threads whose long calls release the GIL:

* *copy* fills captured payloads from the device pools,
* *write* makes chains durable, in the order in which it was asked; what waits for it beyond a
  bounded share of the RAM tier is not held there,
* *read* fetches chains from disk and verifies them.

Nothing here raises into the scheduler: an outcome is a value or the exception of a `Future`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from engram.errors import (
    CaptureLostError,
    RamTierFullError,
    SnapshotCorruptError,
    StateUnhealthyError,
)
from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import BufferSpec, SegmentHeader, Shard
from engram.store.base import SegmentStore
from engram.tiers.base import (
    DeviceReader,
    PayloadLayout,
    Persisted,
    Promoted,
    Segment,
    Tier,
)
from engram.tiers.health import HealthPolicy, StateCheck, StateHealth
from engram.tiers.payload import bytes_of, tokens_of, views, zero_padding
from engram.tiers.ram import RamTier
from engram.tiers.writing import Write, WriteQueue

logger = logging.getLogger(__name__)

FILL_TIMEOUT_S: Final = 120.0
"""How long a writer waits for a payload that is still being copied from the device."""

LOOKUP_LEASE_S: Final = 60.0
"""How long what a lookup promised waits for its load, should nobody say that it is not coming."""


@dataclass(slots=True)
class _Lease:
    held: tuple[Segment, ...]
    expires: float
    promised: bool


@dataclass(frozen=True, slots=True)
class _Below:
    """What a segment of a chain stands on: in RAM, and by the name it was read under.

    The segment's own `segment_id` goes when another thread finds its file damaged.
    """

    segment: Segment
    segment_id: str


@dataclass(slots=True)
class TierManager:
    """Owner of one rank's RAM tier and of its way to the store.

    `stateful` says that the model has a recurrent state: a sequence goes on only where it exists.
    """

    ram: RamTier
    store: SegmentStore
    shard: Shard
    layout: PayloadLayout
    stateful: bool
    clock: Callable[[], float] = time.monotonic
    health: HealthPolicy = field(default_factory=HealthPolicy)
    _leases: dict[str, _Lease] = field(default_factory=dict)
    _reading: dict[str, list[Future[Promoted]]] = field(default_factory=dict)
    _copy: ThreadPoolExecutor = field(init=False)
    _writes: WriteQueue = field(init=False)
    _read: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._copy = ThreadPoolExecutor(1, thread_name_prefix="engram-copy")
        self._writes = WriteQueue(self.ram)
        self._read = ThreadPoolExecutor(2, thread_name_prefix="engram-read")

    # ---- capture ----

    def capture(
        self,
        key: str,
        start: int,
        tokens: Sequence[int],
        parent: Segment | None,
        read: DeviceReader,
        *,
        on_done: Callable[[], None],
    ) -> bool:
        """Queue the copy of the rows [start, start + len(tokens)) and of the state at their end.

        `parent` are the rows that end at `start`.  `on_done` is called on the copy thread once the
        device memory is no longer read.  Returns False, without calling it, when the RAM tier has
        no room: the state is then not kept.
        """
        end = start + len(tokens)
        with self.ram.lock:
            self._expire()
            taken: list[Segment] = []
            try:
                rows = self._take(key, start, end, parent, has_state=False)
                taken.append(rows)
                if self.stateful:
                    taken.append(self._take(key, end, end, rows, has_state=True))
            except RamTierFullError as full:
                self.ram.stats.capture_refused += 1
                for segment in taken:
                    self.ram.fail(segment, full)
                return False
            # The index cannot hold a whole boundary here: the caller has looked, and whoever else
            # publishes has read it from disk, which makes this copy the newer one.
            for segment in taken:
                self.ram.publish(segment, replace=True)
        self._copy.submit(self._fill, taken, np.asarray(tokens, dtype="<u4"), read, on_done)
        return True

    def _take(
        self, key: str, start: int, end: int, parent: Segment | None, *, has_state: bool
    ) -> Segment:
        buffers = self._buffers(key, start, end, has_state)
        return self.ram.reserve(key, start, end, parent, buffers, has_state=has_state)

    def _fill(
        self,
        taken: Sequence[Segment],
        tokens: np.ndarray,
        read: DeviceReader,
        on_done: Callable[[], None],
    ) -> None:
        try:
            payloads = []
            targets: dict[str, torch.Tensor] = {}
            for segment in taken:
                payload = self.ram.allocate(segment.nbytes)
                zero_padding(payload, segment.buffers)
                targets.update(views(payload, segment.buffers))
                payloads.append(payload)
            tokens_of(payloads[0], taken[0].buffers)[:] = tokens
            check = StateCheck(norm=self.health.interval > 0)
            read(targets, check)
            self._judge(taken, check.result())
        except BaseException as error:
            if isinstance(error, StateUnhealthyError):
                logger.error("Engram: %s", error.message)
            else:
                logger.exception("capture of %s failed", taken[0].key)
            self.ram.stats.capture_failed += 1
            # The state first: it stands on the rows.
            for segment in reversed(taken):
                self.ram.fail(segment, error)
        else:
            self.ram.stats.captured += 1
            for segment, payload in zip(taken, payloads, strict=True):
                segment.payload = payload
                self.ram.complete(segment)
        finally:
            on_done()

    def _judge(self, taken: Sequence[Segment], found: StateHealth) -> None:
        """Note what was seen of a state; `StateUnhealthyError` if it is not to be kept."""
        rows, state = taken[0], taken[-1]
        with self.ram.lock:
            state.norm = found.norm
            problem = found.problem or found.drift(self._norm_before(rows))
        if problem is None:
            return
        self.ram.stats.unhealthy += 1
        state.health = problem
        text = f"the state at token {state.end} is unhealthy: {problem}"
        if self.health.keep:
            logger.warning("Engram: %s; it is kept, as --snapshot-health-failure-policy says", text)
            return
        raise StateUnhealthyError(
            f"{text}; it is not kept",
            hint="go on from an earlier turn; --snapshot-health-failure-policy log_and_continue "
            "keeps such a state, marked",
            details={"boundary": state.end, "problem": problem},
        )

    def _norm_before(self, rows: Segment) -> float | None:
        """The norm of the state `interval` boundaries before the one that stands on `rows`."""
        before: Segment | None = rows
        for _ in range(self.health.interval):
            before = before.parent if before is not None else None
        state = self.boundary(before.key) if before is not None else None
        return state.norm if state is not None and self.health.interval else None

    # ---- lookup and leases ----

    def boundary(self, key: str) -> Segment | None:
        """The segment from which a sequence goes on at `key`: its state there if it has one."""
        return self.ram.get(key, self.stateful)

    def lookup(self, owner: str, keys: Sequence[str], page_size: int) -> list[int]:
        """Lengths, in pages of `keys`, that can be loaded now; they are leased to `owner`.

        `keys` are the page keys past some device-resident prefix, first page first.
        """
        with self.ram.lock:
            for index in range(len(keys) - 1, -1, -1):
                boundary = self.boundary(keys[index])
                if boundary is None:
                    continue
                after = boundary.end - (index + 1) * page_size
                if not self.ram.loadable(boundary, after):
                    continue
                chain = boundary.chain(after)
                ends = list(self._loadable_ends(chain))
                promised = dict.fromkeys([*chain, *ends])
                self.lease(owner, list(promised), seconds=LOOKUP_LEASE_S, promised=True)
                return [(end.end - after) // page_size for end in ends]
        return []

    def _loadable_ends(self, chain: Sequence[Segment]) -> Iterator[Segment]:
        """Where on a loadable chain a sequence could go on, first one first."""
        for segment in chain:
            end = self.boundary(segment.key)
            if end is None or end is chain[-1]:
                continue
            if end is segment or (end.parent is segment and end.resident):
                yield end
        yield chain[-1]

    def lease(
        self, owner: str, chain: Sequence[Segment], *, seconds: float, promised: bool = False
    ) -> None:
        """Keep a chain in RAM for `owner` until it is released or `seconds` have passed.

        Unless it is `promised` to SGLang, it gives way to what is read from disk later when that
        finds no room: the older of two restored snapshots is then read again when it is needed.
        """
        with self.ram.lock:
            held = self.ram.hold(chain)
            self.release(owner)
            self._leases[owner] = _Lease(held, self.clock() + seconds, promised)
            self._expire()

    def release(self, owner: str) -> None:
        """End the lease of `owner`, if it has one."""
        with self.ram.lock:
            lease = self._leases.pop(owner, None)
            if lease is not None:
                self.ram.release(lease.held)

    def _expire(self) -> None:
        now = self.clock()
        for owner in [o for o, lease in self._leases.items() if lease.expires <= now]:
            self.release(owner)

    # ---- persist ----

    def persist(self, boundary: Segment) -> Future[Persisted]:
        """Make the chain that ends in a boundary durable.  The future fails with an `EngramError`.

        A chain that waits for its turn longer than there is room to hold it may have left RAM by
        then: `CaptureLostError`, whose `details` say which boundary to compute again.
        """
        chain = boundary.chain()
        with self.ram.lock:
            self.ram.want(boundary)
            self.ram.touch(chain)
            return self._writes.submit(Write(self._persist, chain))

    def _persist(self, write: Write[Persisted]) -> Persisted:
        refs: list[SegmentRef] = []
        written = 0
        for segment in write.chain:
            # Readers may find a file of the chain damaged at any time and take its segment's id
            # away: what this save relies on is in `refs` and read once.
            parent = refs[-1].segment_id if refs else None
            header = self._plan(segment.key, segment.start, segment.end, parent, segment.has_state)
            segment_id = segment.segment_id
            if segment_id and not self.store.has_segment(
                self.shard, segment_id, header.file_length
            ):
                # Quarantined, cut or deleted: no manifest may name it.
                self.ram.lose_file(segment)
                segment_id = None
            if segment_id is None:
                try:
                    segment_id = self._write_segment(segment, header)
                except CaptureLostError as lost:
                    lost.details["boundary"] = write.chain[-1].end
                    raise
                written += header.file_length
            refs.append(_ref(header, segment_id))
            self._writes.let_go(write, segment)
        nbytes = sum(ref.bytes for ref in refs)
        return Persisted(tuple(refs), nbytes, written, write.chain[-1].health)

    def _write_segment(self, segment: Segment, header: SegmentHeader) -> str:
        try:
            segment.filled.result(FILL_TIMEOUT_S)
        except StateUnhealthyError:
            raise
        except Exception as error:
            raise CaptureLostError(
                f"the copy of the state at token {segment.end} failed: {error!r}"
            ) from error
        payload = segment.payload
        if payload is None:
            # Evicted between being found and being held.
            raise CaptureLostError(f"the state at token {segment.end} has left memory")
        segment_id = self.store.put_segment(header, bytes_of(payload))
        self.ram.mark_durable(segment, segment_id)
        self.ram.stats.persisted_segments += 1
        self.ram.stats.persisted_bytes += header.file_length
        return segment_id

    # ---- promote ----

    def promote(
        self, refs: Sequence[SegmentRef], owner: str, *, seconds: float, exact: bool
    ) -> Future[Promoted]:
        """Bring a chain into RAM, verified, and lease it to `owner` for `seconds`.

        With `exact` the very segments named are made the ones that lookups find; else bytes of the
        same tokens that are in RAM already will do.
        """
        with self.ram.lock:
            held = self.ram.get(refs[-1].key, refs[-1].has_state)
            if held is not None and self.ram.loadable(held, 0) and self._same(held, refs, exact):
                self.ram.want(held)
                self.lease(owner, held.chain(), seconds=seconds)
                ready: Future[Promoted] = Future()
                ready.set_result(Promoted(Tier.RAM, sum(ref.bytes for ref in refs), 0))
                return ready
            future = self._read.submit(self._promote, tuple(refs), owner, seconds, exact)
            self._reading.setdefault(owner, []).append(future)
        future.add_done_callback(lambda done: self._read_done(owner, done))
        return future

    def _read_done(self, owner: str, done: Future[Promoted]) -> None:
        with self.ram.lock:
            futures = self._reading.get(owner, [])
            if done in futures:
                futures.remove(done)
            if not futures:
                self._reading.pop(owner, None)

    def abandon(self, owner: str) -> None:
        """Nobody waits for the promotions of `owner` any longer.

        Those not begun never begin; what the others bring is not leased.
        """
        with self.ram.lock:
            futures = self._reading.pop(owner, [])
            self.release(owner)
        for future in futures:
            future.cancel()

    @staticmethod
    def _same(held: Segment, refs: Sequence[SegmentRef], exact: bool) -> bool:
        if not exact:
            return True
        return [s.segment_id for s in held.chain()] == [ref.segment_id for ref in refs]

    def _promote(
        self, refs: Sequence[SegmentRef], owner: str, seconds: float, exact: bool
    ) -> Promoted:
        held: list[Segment] = []
        read = 0
        try:
            for number, ref in enumerate(refs):
                below = _Below(held[-1], refs[number - 1].segment_id) if held else None
                segment, nbytes = self._bring(ref, below, exact)
                held.append(segment)
                self.ram.want(segment)
                read += nbytes
            with self.ram.lock:
                if owner in self._reading:
                    self.lease(owner, held, seconds=seconds)
        finally:
            self.ram.release(held)
        source = Tier.DISK if read else Tier.RAM
        return Promoted(source, sum(ref.bytes for ref in refs), read)

    def _bring(self, ref: SegmentRef, below: _Below | None, exact: bool) -> tuple[Segment, int]:
        """The segment of `ref` on top of `below`, in RAM and held once, and the bytes read.

        Other bits of the same tokens will not do here: a chain of which one part is stored under
        another parent could not be restored once it was saved.
        """
        with self.ram.lock:
            known = self.ram.get(ref.key, ref.has_state)
            reuse = None
            if (
                known is not None
                and known.in_ram
                and known.segment_id == ref.segment_id
                and known.parent is (below.segment if below else None)
            ):
                self.ram.hold((known,))
                reuse = known
        if reuse is not None:
            try:
                reuse.filled.result(FILL_TIMEOUT_S)
            except BaseException:
                self.ram.release((reuse,))
                raise
            return reuse, 0
        return self._fetch(ref, below, exact)

    def _fetch(self, ref: SegmentRef, below: _Below | None, exact: bool) -> tuple[Segment, int]:
        parent = below.segment if below else None
        segment: Segment | None = None

        def into(header: SegmentHeader) -> memoryview:
            nonlocal segment
            self._check(header, ref, below.segment_id if below else None)
            segment = self._reserve(ref, header, parent)
            segment.payload = self.ram.allocate(segment.nbytes)
            return bytes_of(segment.payload)

        try:
            self.store.read_segment(self.shard, ref.segment_id, into)
        except BaseException as error:
            if isinstance(error, SnapshotCorruptError):
                self.ram.stats.corrupt += 1
                self.ram.forget_files(frozenset((ref.segment_id,)))
            if segment is not None:
                self.ram.fail(segment, error)
            raise
        assert segment is not None
        with self.ram.lock:
            self.ram.mark_durable(segment, ref.segment_id)
            self.ram.hold((segment,))
            known = self.ram.get(ref.key, ref.has_state)
            stale = known is not None and not self.ram.loadable(known, 0)
            self.ram.publish(segment, replace=exact or stale)
            self.ram.complete(segment)
        self.ram.stats.promoted_segments += 1
        self.ram.stats.promoted_bytes += ref.bytes
        return segment, ref.bytes

    def _reserve(self, ref: SegmentRef, header: SegmentHeader, parent: Segment | None) -> Segment:
        """Room for a segment that is read, at the cost of the oldest leases if need be."""
        with self.ram.lock:
            self._expire()
            while True:
                try:
                    return self.ram.reserve(
                        ref.key,
                        ref.start,
                        ref.end,
                        parent,
                        header.buffers,
                        has_state=header.has_state,
                    )
                except RamTierFullError:
                    oldest = next((o for o, at in self._leases.items() if not at.promised), None)
                    if oldest is None or header.payload_length > self.ram.capacity:
                        raise
                    self.release(oldest)

    def _check(self, header: SegmentHeader, ref: SegmentRef, parent: str | None) -> None:
        """The file must be the segment that the manifest speaks of, on top of its parent."""
        expected = self._plan(ref.key, ref.start, ref.end, parent, ref.has_state)
        if header == expected:
            return
        found = header.model_dump()
        name, wanted = next((n, v) for n, v in expected.model_dump().items() if found[n] != v)
        raise SnapshotCorruptError(
            f"segment {ref.segment_id} is not the one its manifest speaks of: "
            f"{name} is {found[name]!r}, expected {wanted!r}",
            hint="restore another snapshot; the store was changed by something else than Engram",
        )

    # ---- drop ----

    def drop(self, segment_ids: Sequence[str]) -> Future[int]:
        """Delete segment files nobody names any more; returns how many were asked to go.

        Queued behind every write asked for before, so a chain that is being made durable is
        never pulled from under its manifest.
        """
        gone = frozenset(segment_ids)
        return self._writes.submit(Write(lambda _: self._drop(gone)))

    def _drop(self, segment_ids: frozenset[str]) -> int:
        self.ram.forget_files(segment_ids)
        for segment_id in segment_ids:
            self.store.delete_segment(self.shard, segment_id)
        return len(segment_ids)

    # ---- life ----

    def views(self, segment: Segment) -> dict[str, torch.Tensor]:
        """The buffers of a segment in RAM, by name."""
        assert segment.payload is not None
        return views(segment.payload, segment.buffers)

    def depths(self) -> dict[str, int]:
        """How much is under way: chains written and waiting to be, promotions, leases, bytes."""
        with self.ram.lock:
            self._expire()
            return {
                **self._writes.depths(),
                "promotions": sum(len(futures) for futures in self._reading.values()),
                "leases": len(self._leases),
            }

    def quiesce(self) -> None:
        """Return when no capture reads device memory any more."""
        self._copy.submit(lambda: None).result()

    def forget(self) -> None:
        """Let go of all that no running work holds; what was asked for is still finished."""
        with self.ram.lock:
            for owner in list(self._leases):
                self.release(owner)
            self.ram.clear()

    def close(self) -> None:
        """Finish what was asked for and stop the threads."""
        self._writes.finish()
        self._copy.shutdown(wait=True)
        self._writes.close()
        self._read.shutdown(wait=True)

    def _buffers(self, key: str, start: int, end: int, has_state: bool) -> tuple[BufferSpec, ...]:
        """Where each buffer lies in a payload; it does not depend on the parent, whose id may
        not be known before it is written."""
        return self._plan(key, start, end, key if start else None, has_state).buffers

    def _plan(
        self, key: str, start: int, end: int, parent: str | None, has_state: bool
    ) -> SegmentHeader:
        return SegmentHeader.plan(
            shard=self.shard,
            key=key,
            start=start,
            end=end,
            parent=parent,
            has_state=has_state,
            buffers=self.layout(end - start, has_state),
        )


def _ref(header: SegmentHeader, segment_id: str) -> SegmentRef:
    return SegmentRef(
        segment_id=segment_id,
        key=header.key,
        start=header.start,
        end=header.end,
        has_state=header.has_state,
        bytes=header.file_length,
    )
