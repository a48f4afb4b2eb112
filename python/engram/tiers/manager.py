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
from typing import Final, TypeVar

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
from engram.tiers.twins import begins_with, copy_beginning
from engram.tiers.writing import Write, WriteQueue

logger = logging.getLogger(__name__)

OTHER_HAND: Final = "restore another snapshot; the store was changed by something else than Engram"

MIN_SHARED_BYTES: Final = 16 << 10
"""Rows of fewer bytes are not worth a file of their own, which has 4,128 bytes beside them."""
Done = TypeVar("Done")

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
        ids = np.asarray(tokens, dtype="<u4")
        page = len(ids) // len(keys)
        with self.ram.lock:
            self._expire()
            taken: list[Segment] = []
            try:
                rows, first = parent, 0
                for last in self._cuts(keys, ids):
                    rows = self._take(
                        keys[last // page - 1],
                        start + first,
                        start + last,
                        rows,
                        first_key=keys[first // page],
                    )
                    taken.append(rows)
                    first = last
                if self.stateful:
                    end = start + len(ids)
                    taken.append(self._take(keys[-1], end, end, rows))
            except RamTierFullError as full:
                self.ram.stats.capture_refused += 1
                for segment in reversed(taken):
                    self.ram.fail(segment, full)
                return False
            # The index cannot hold a whole boundary here: the caller has looked, and whoever else
            # publishes has read it from disk, which makes this copy the newer one.
            for segment in taken:
                self.ram.publish(segment, replace=True)
        self._copy.submit(self._fill, taken, ids, read, on_done)
        return True

    def _cuts(self, keys: Sequence[str], tokens: np.ndarray) -> list[int]:
        """Where rows of these tokens end, the last of them at the end of the tokens."""
        page = len(tokens) // len(keys)
        row_bytes = sum(spec.length for spec in self._buffers(keys[0], 0, 1, False))
        least = max(1, MIN_SHARED_BYTES // row_bytes)
        cuts, first = [], 0
        while first < len(tokens):
            common = self.ram.twins.common(keys[first // page], tokens[first:]) // page * page
            if common < least:
                break
            first += common
            cuts.append(first)
        return cuts if first == len(tokens) else [*cuts, len(tokens)]

    def _take(
        self,
        key: str,
        start: int,
        end: int,
        parent: Segment | None,
        *,
        first_key: str | None = None,
    ) -> Segment:
        """Room for rows, or with `start` = `end` for a state."""
        has_state = start == end
        buffers = self._buffers(key, start, end, has_state)
        return self.ram.reserve(
            key, start, end, parent, buffers, has_state=has_state, first_key=first_key
        )

    def _fill(
        self,
        taken: Sequence[Segment],
        tokens: np.ndarray,
        read: DeviceReader,
        on_done: Callable[[], None],
    ) -> None:
        try:
            payloads = []
            check = StateCheck(norm=self.health.interval > 0)
            for segment in taken:
                payload = self.ram.allocate(segment.nbytes)
                zero_padding(payload, segment.buffers)
                first, last = segment.start - taken[0].start, segment.end - taken[0].start
                if not segment.has_state:
                    tokens_of(payload, segment.buffers)[:] = tokens[first:last]
                read(views(payload, segment.buffers), first, last, check)
                payloads.append(payload)
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
        """The norm of the state `interval` boundaries before the one that is captured."""
        left = self.health.interval
        before = rows.parent
        while before is not None and left:
            state = self.boundary(before.key)
            left -= state is not None and state.parent is before
            if state is not None and not left:
                return state.norm
            before = before.parent
        return None

    # ---- lookup and leases ----

    def boundary(self, key: str) -> Segment | None:
        """The segment from which a sequence goes on at `key`: its state there if it has one."""
        return self.ram.get(key, self.stateful)

    def stand(self, keys: Sequence[str]) -> Segment | None:
        """The rows that end at the last of `keys` from which a sequence can go on, if any do.

        Only there are they known to be the bits that who goes on from there has computed with:
        other rows of the same tokens may be of another computation.
        """
        with self.ram.lock:
            for key in reversed(keys):
                boundary = self.boundary(key)
                if boundary is not None and self.ram.whole(boundary):
                    return boundary.parent if boundary.has_state else boundary
        return None

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

    def unsaved_bytes(self, boundary: Segment) -> int:
        """Bytes of the files that making a chain durable would write now."""
        with self.ram.lock:
            return sum(
                self._plan(
                    node.key, node.start, node.end, node.key if node.start else None, node.has_state
                ).file_length
                for node in boundary.chain()
                if not node.durable
            )

    def _persist(self, write: Write[Persisted]) -> Persisted:
        refs: list[SegmentRef] = []
        written = 0
        for segment in write.chain:
            # Readers may find a file of the chain damaged at any time and take its segment's id
            # away: what this save relies on is in `refs` and read once.
            parent = refs[-1].segment_id if refs else None
            file = self._file_of(segment, parent)
            if file is None:
                try:
                    self._require_filled(segment)
                    file = self._twin_of(segment, parent)
                    if file is None:
                        file = self._write_segment(segment, parent)
                        written += file[1]
                except CaptureLostError as lost:
                    lost.details["boundary"] = write.chain[-1].end
                    raise
            refs.append(_ref(segment, *file))
            self._writes.let_go(write, segment)
        nbytes = sum(ref.bytes for ref in refs)
        return Persisted(tuple(refs), nbytes, written, write.chain[-1].health)

    def _file_of(self, segment: Segment, parent: str | None) -> tuple[str, int] | None:
        """Name and length of the file that holds a segment on top of this parent, if there is one.

        What it stands on may have come into another file since, damaged in the first: a chain over
        that one could not be restored.
        """
        with self.ram.lock:
            segment_id, length = segment.segment_id, segment.file_bytes
            below = segment.file_parent
        if segment_id is None or below != parent:
            return None
        if self.store.has_segment(self.shard, segment_id, length):
            return segment_id, length
        # Quarantined, cut or deleted: no manifest may name it.
        self.ram.lose_file(segment)
        return None

    def _twin_of(self, rows: Segment, parent: str | None) -> tuple[str, int] | None:
        """The file of other rows on the same parent that begin with the very bits of these.

        Keys name tokens, not bits, and a snapshot comes back with the bits it was taken with.
        """
        with self.ram.lock:
            if not rows.resident:
                return None
            held = self.ram.hold((rows, *self.ram.twins.of(rows)))
        try:
            for other in held[1:]:
                if other.end < rows.end:
                    continue
                file = self._file_of(other, parent)
                if file is not None and begins_with(other, rows):
                    with self.ram.lock:
                        self.ram.mark_durable(rows, *file, parent)
                        self.ram.twins.remove(rows)  # whoever is their twin is the other's too
                    return file
        finally:
            self.ram.release(held)
        return None

    @staticmethod
    def _require_filled(segment: Segment) -> None:
        """Wait for the copy of a segment; raises what became of it if it failed."""
        try:
            segment.filled.result(FILL_TIMEOUT_S)
        except StateUnhealthyError:
            raise
        except Exception as error:
            raise CaptureLostError(
                f"the copy of the state at token {segment.end} failed: {error!r}"
            ) from error

    def _write_segment(self, segment: Segment, parent: str | None) -> tuple[str, int]:
        payload = segment.payload
        if payload is None:
            # Evicted between being found and being held; a file on another parent is of no use.
            self.ram.lose_file(segment)
            raise CaptureLostError(f"the state at token {segment.end} has left memory")
        header = self._plan(segment.key, segment.start, segment.end, parent, segment.has_state)
        segment_id = self.store.put_segment(header, bytes_of(payload))
        self.ram.mark_durable(segment, segment_id, header.file_length, parent)
        self.ram.stats.persisted_segments += 1
        self.ram.stats.persisted_bytes += header.file_length
        return segment_id, header.file_length

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
        whole: torch.Tensor | None = None

        def into(header: SegmentHeader) -> memoryview:
            nonlocal segment, whole
            self._check(header, ref, below.segment_id if below else None)
            segment = self._reserve(ref, parent)
            segment.payload = whole = self.ram.allocate(segment.nbytes)
            if header.end > ref.end:
                # The digest is of the whole file, so it is read to its end, into passing memory.
                whole = torch.empty(header.payload_length, dtype=torch.uint8)
            return bytes_of(whole)

        try:
            header = self.store.read_segment(self.shard, ref.segment_id, into)
            assert segment is not None
            assert segment.payload is not None
            assert whole is not None
            if header.end > ref.end:
                zero_padding(segment.payload, segment.buffers)
                copy_beginning(whole, header.buffers, segment)
        except BaseException as error:
            if isinstance(error, SnapshotCorruptError):
                self.ram.stats.corrupt += 1
                self.ram.forget_files(frozenset((ref.segment_id,)))
            if segment is not None:
                self.ram.fail(segment, error)
            raise
        with self.ram.lock:
            below_id = below.segment_id if below else None
            self.ram.mark_durable(segment, ref.segment_id, ref.bytes, below_id)
            self.ram.hold((segment,))
            known = self.ram.get(ref.key, ref.has_state)
            stale = known is not None and not self.ram.loadable(known, 0)
            self.ram.publish(segment, replace=exact or stale)
            self.ram.complete(segment)
        self.ram.stats.promoted_segments += 1
        self.ram.stats.promoted_bytes += ref.bytes
        return segment, ref.bytes

    def _reserve(self, ref: SegmentRef, parent: Segment | None) -> Segment:
        """Room for a segment that is read, at the cost of the oldest leases if need be."""
        with self.ram.lock:
            self._expire()
            while True:
                try:
                    return self._take(ref.key, ref.start, ref.end, parent)
                except RamTierFullError:
                    oldest = next((o for o, at in self._leases.items() if not at.promised), None)
                    if oldest is None or self._payload_bytes(ref) > self.ram.capacity:
                        raise
                    self.release(oldest)

    def _payload_bytes(self, ref: SegmentRef) -> int:
        last = self._buffers(ref.key, ref.start, ref.end, ref.has_state)[-1]
        return last.offset + last.length

    def _check(self, header: SegmentHeader, ref: SegmentRef, parent: str | None) -> None:
        """The file must be the segment that the manifest speaks of, on top of its parent."""
        # Rows may be used in part: then the file ends later, under another key.
        longer = not ref.has_state and header.end > ref.end
        key, end = (header.key, header.end) if longer else (ref.key, ref.end)
        expected = self._plan(key, ref.start, end, parent, ref.has_state)
        if header == expected and header.file_length == ref.bytes:
            return
        if header == expected:
            raise SnapshotCorruptError(
                f"segment {ref.segment_id} has {header.file_length} bytes, its manifest says "
                f"{ref.bytes}",
                hint=OTHER_HAND,
            )
        found = header.model_dump()
        name, wanted = next((n, v) for n, v in expected.model_dump().items() if found[n] != v)
        raise SnapshotCorruptError(
            f"segment {ref.segment_id} is not the one its manifest speaks of: "
            f"{name} is {found[name]!r}, expected {wanted!r}",
            hint=OTHER_HAND,
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

    def in_background(self, work: Callable[[], Done]) -> Future[Done]:
        """Do what may take long for a scheduler on a thread that reads."""
        return self._read.submit(work)

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


def _ref(segment: Segment, segment_id: str, file_bytes: int) -> SegmentRef:
    return SegmentRef(
        segment_id=segment_id,
        key=segment.key,
        start=segment.start,
        end=segment.end,
        has_state=segment.has_state,
        bytes=file_bytes,
    )
