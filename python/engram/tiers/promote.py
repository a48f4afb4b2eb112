"""From disk into RAM, verified, on two threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from engram.errors import ManifestCorruptError, RamTierFullError, SnapshotCorruptError
from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import SegmentHeader
from engram.store.base import SegmentStore
from engram.tiers.base import PageKeys, Promoted, Segment, Tier
from engram.tiers.lookup import Lookup
from engram.tiers.payload import bytes_of, tokens_of, zero_padding
from engram.tiers.persist import FILL_TIMEOUT_S
from engram.tiers.planning import SegmentPlanner
from engram.tiers.ram import RamTier
from engram.tiers.twins import copy_beginning

OTHER_HAND: Final = "restore another snapshot; the store was changed by something else than Engram"

Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class _Below:
    """What a segment of a chain stands on: in RAM, and by the name it was read under.

    The segment's own `segment_id` goes when another thread finds its file damaged.
    """

    segment: Segment
    segment_id: str


class Promoter:
    """Brings chains into RAM and leases them to whoever asked."""

    def __init__(
        self,
        ram: RamTier,
        store: SegmentStore,
        planner: SegmentPlanner,
        known: Lookup,
        page_keys: PageKeys | None,
    ) -> None:
        self._ram = ram
        self._store = store
        self._planner = planner
        self._stateful = known.stateful
        self._leases = known.leases
        self._page_keys = page_keys
        self._reading: dict[str, list[Future[Promoted]]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="engram-read")

    def promote(
        self, refs: Sequence[SegmentRef], owner: str, *, seconds: float, exact: bool
    ) -> Future[Promoted]:
        """See `TierManager.promote`."""
        problem = self._problem(refs)
        if problem is not None:
            self._ram.stats.corrupt += 1
            refused: Future[Promoted] = Future()
            refused.set_exception(problem)
            return refused
        with self._ram.lock:
            held = self._ram.get(refs[-1].key, refs[-1].has_state)
            if held is not None and self._ram.loadable(held, 0) and _same(held, refs, exact):
                self._ram.want(held)
                self._leases.take(owner, held.chain(), seconds=seconds)
                ready: Future[Promoted] = Future()
                ready.set_result(Promoted(Tier.RAM, sum(ref.bytes for ref in refs), 0))
                return ready
            future = self._threads.submit(self._promote, tuple(refs), owner, seconds, exact)
            self._reading.setdefault(owner, []).append(future)
        future.add_done_callback(lambda done: self._read_done(owner, done))
        return future

    def abandon(self, owner: str) -> None:
        """See `TierManager.abandon`."""
        with self._ram.lock:
            futures = self._reading.pop(owner, [])
            self._leases.release(owner)
        for future in futures:
            future.cancel()

    def in_background(self, work: Callable[[], Done]) -> Future[Done]:
        """See `TierManager.in_background`."""
        return self._threads.submit(work)

    def depth(self) -> int:
        """Promotions that are under way or wait."""
        with self._ram.lock:
            return sum(len(futures) for futures in self._reading.values())

    def close(self) -> None:
        """Finish what was asked for and stop the threads."""
        self._threads.shutdown(wait=True)

    def _read_done(self, owner: str, done: Future[Promoted]) -> None:
        with self._ram.lock:
            futures = self._reading.get(owner, [])
            if done in futures:
                futures.remove(done)
            if not futures:
                self._reading.pop(owner, None)

    def _problem(self, refs: Sequence[SegmentRef]) -> SnapshotCorruptError | None:
        """Whether a chain, however whole, is none that a sequence of this model can go on from."""
        if refs[-1].has_state is self._stateful:
            return None
        found, wanted = ("no", "needs one") if self._stateful else ("a", "has none")
        return ManifestCorruptError(
            f"the snapshot has {found} recurrent state at token {refs[-1].end}, and this model "
            f"{wanted}",
            hint="restore another snapshot, or delete this one",
            details={"segment_id": refs[-1].segment_id, "boundary": refs[-1].end},
        )

    # ---- on the threads ----

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
                self._ram.want(segment)
                read += nbytes
            with self._ram.lock:
                if owner in self._reading:
                    self._leases.take(owner, held, seconds=seconds)
        finally:
            self._ram.release(held)
        source = Tier.DISK if read else Tier.RAM
        return Promoted(source, sum(ref.bytes for ref in refs), read)

    def _bring(self, ref: SegmentRef, below: _Below | None, exact: bool) -> tuple[Segment, int]:
        """The segment of `ref` on top of `below`, in RAM and held once, and the bytes read.

        Other bits of the same tokens will not do here: a chain of which one part is stored under
        another parent could not be restored once it was saved.
        """
        with self._ram.lock:
            known = self._ram.get(ref.key, ref.has_state)
            reuse = None
            if (
                known is not None
                and known.in_ram
                and known.segment_id == ref.segment_id
                and known.parent is (below.segment if below else None)
            ):
                self._ram.hold((known,))
                reuse = known
        if reuse is not None:
            try:
                reuse.filled.result(FILL_TIMEOUT_S)
            except BaseException:
                self._ram.release((reuse,))
                raise
            return reuse, 0
        return self._fetch(ref, below, exact)

    def _fetch(self, ref: SegmentRef, below: _Below | None, exact: bool) -> tuple[Segment, int]:
        parent, below_id = (below.segment, below.segment_id) if below else (None, None)
        segment: Segment | None = None

        def take(header: SegmentHeader) -> Segment:
            nonlocal segment
            self._check(header, ref, below_id)
            segment = self._reserve(ref, parent)
            segment.payload = self._ram.allocate(segment.nbytes)
            return segment

        try:
            self._read(ref, take)
            assert segment is not None
            segment.first_key = self._first_key(segment)
        except BaseException as error:
            if isinstance(error, SnapshotCorruptError):
                self._ram.stats.corrupt += 1
                self._ram.forget_files(frozenset((ref.segment_id,)))
            if segment is not None:
                self._ram.fail(segment, error)
            raise
        with self._ram.lock:
            self._ram.mark_durable(segment, ref.segment_id, ref.bytes, below_id)
            self._ram.hold((segment,))
            known = self._ram.get(ref.key, ref.has_state)
            stale = known is not None and not self._ram.loadable(known, 0)
            self._ram.publish(segment, replace=exact or stale)
            self._ram.complete(segment)
        self._ram.stats.promoted_segments += 1
        self._ram.stats.promoted_bytes += ref.bytes
        return segment, ref.bytes

    def _read(self, ref: SegmentRef, take: Callable[[SegmentHeader], Segment]) -> None:
        """Fill the payload of the segment that `take` gives from its file, verified to the end.

        A file whose rows go on after those of `ref` is read in pieces of bounded size: nothing of
        the rest is kept, so the room of the segment is all that it needs.
        """
        shard = self._planner.shard
        whole = self._planner.unplaced(ref.key, ref.start, ref.end, ref.has_state)
        if ref.bytes <= whole.file_length:
            self._store.read_segment(shard, ref.segment_id, lambda header: _bytes(take(header)))
            return
        taken: list[tuple[SegmentHeader, Segment]] = []
        pieces = self._store.iter_payload(
            shard, ref.segment_id, lambda header: taken.append((header, take(header)))
        )
        position = 0
        for piece in pieces:
            header, segment = taken[0]
            copy_beginning(piece, position, header.buffers, segment)
            position += len(piece)
        _, segment = taken[0]
        assert segment.payload is not None
        zero_padding(segment.payload, segment.buffers)

    def _first_key(self, segment: Segment) -> str | None:
        """The key of the first page of rows; None for a state, or where it cannot be told.

        Without a parent it stands on the seed of a request that had neither extra key nor salt,
        which the last key tells: another seed is in no file.
        """
        if segment.has_state or self._page_keys is None:
            return None
        assert segment.payload is not None
        before = segment.parent.key if segment.parent is not None else None
        keys = self._page_keys(tokens_of(segment.payload, segment.buffers), before)
        return keys[0] if keys and keys[-1] == segment.key else None

    def _reserve(self, ref: SegmentRef, parent: Segment | None) -> Segment:
        """Room for a segment that is read, at the cost of the oldest leases if need be."""
        buffers = self._planner.buffers(ref.key, ref.start, ref.end, ref.has_state)
        nbytes = buffers[-1].offset + buffers[-1].length
        with self._ram.lock:
            self._leases.expire()
            while True:
                try:
                    return self._ram.reserve(
                        ref.key, ref.start, ref.end, parent, buffers, has_state=ref.has_state
                    )
                except RamTierFullError:
                    if nbytes > self._ram.capacity or not self._leases.give_way():
                        raise

    def _check(self, header: SegmentHeader, ref: SegmentRef, parent: str | None) -> None:
        """The file must be the segment that the manifest speaks of, on top of its parent."""
        # Rows may be used in part: then the file ends later, under another key.
        longer = not ref.has_state and header.end > ref.end
        key, end = (header.key, header.end) if longer else (ref.key, ref.end)
        expected = self._planner.header(key, ref.start, end, parent, ref.has_state)
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


def _bytes(segment: Segment) -> memoryview:
    assert segment.payload is not None
    return bytes_of(segment.payload)


def _same(held: Segment, refs: Sequence[SegmentRef], exact: bool) -> bool:
    """Whether a chain in RAM will do for the one named."""
    if not exact:
        return True
    return [s.segment_id for s in held.chain()] == [ref.segment_id for ref in refs]
