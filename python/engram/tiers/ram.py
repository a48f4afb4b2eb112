"""The RAM tier: a bounded pool of host buffers and the index over them.

The index finds a segment by the page key it ends at and its kind.  Page keys are chained, so a
lookup walks back from the end of a request to the first state held (rows, if there are no states).

Eviction takes what nobody asked to keep before anything that somebody did, and of that what is on
disk before what is not; within each of the three the least recently used goes first, and a segment
goes before the ones it stands on: using a chain touches its parents last.  What is held (leased,
being written, being filled) never goes.
A durable segment keeps its entry when its bytes leave RAM; the others are forgotten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain
from threading import RLock
from typing import Final

import torch

from engram.errors import RamTierFullError
from engram.snapshot.segment import BufferSpec
from engram.tiers.base import Fill, Segment, TierStats
from engram.tiers.twins import Twins

MAX_COLD_ENTRIES: Final = 65_536
"""Durable segments remembered without their bytes; a few hundred bytes each."""

Place = tuple[str, bool]
"""A page key, and whether it is the state there or the rows that end there."""


class RamTier:
    """Bounded host memory for segments.  Every method may be called from any thread.

    `capacity` is in bytes; `pinned` asks for page-locked memory, which device copies need to
    overlap with computation; `stats` are the counters to go on with.
    """

    def __init__(
        self, capacity: int, *, pinned: bool = False, stats: TierStats | None = None
    ) -> None:
        self.capacity = capacity
        self.pinned = pinned
        self.used = 0
        self.stats = stats or TierStats()
        self.lock = RLock()
        self.twins = Twins()
        self._index: dict[Place, Segment] = {}
        # What has room here, least recently used first.
        self._unwanted: OrderedDict[Segment, None] = OrderedDict()
        self._wanted: OrderedDict[Segment, None] = OrderedDict()
        self._cold: OrderedDict[Segment, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def held(self) -> int:
        """Bytes that cannot give way now: leased, being written, loaded or filled."""
        with self.lock:
            return sum(node.nbytes for node in chain(self._unwanted, self._wanted) if node.holders)

    @property
    def residents(self) -> int:
        """How many segments have room here."""
        with self.lock:
            return len(self._unwanted) + len(self._wanted)

    def durable_residents(self) -> list[tuple[str, int, bool]]:
        """(segment id, bytes, whether it is held) of what is whole here and on disk as well."""
        with self.lock:
            return [
                (node.segment_id, node.nbytes, node.holders > 0)
                for node in chain(self._unwanted, self._wanted)
                if node.segment_id is not None and node.resident
            ]

    def demote(self, segment_ids: frozenset[str]) -> int:
        """Let the bytes of segments go that are on disk as well; how many went.

        What is held stays, and what something else here stands on.
        """
        freed = 0
        with self.lock:
            chosen = [
                node
                for node in chain(self._unwanted, self._wanted)
                if node.segment_id in segment_ids and node.resident
            ]
            # Children before what they stand on.
            for node in sorted(chosen, key=lambda s: (-s.end, not s.has_state)):
                if node.holders or node.resident_children:
                    continue
                self._evict(node)
                self.stats.demoted += 1
                freed += node.nbytes
        return freed

    def get(self, key: str, has_state: bool) -> Segment | None:
        """The state at `key`, or the rows that end there, whether or not their bytes are in RAM."""
        return self._index.get((key, has_state))

    def reserve(
        self,
        key: str,
        start: int,
        end: int,
        parent: Segment | None,
        buffers: Sequence[BufferSpec],
        *,
        has_state: bool,
        first_key: str | None = None,
    ) -> Segment:
        """Take room for a new segment, to be published and filled.

        Raises `RamTierFullError` when everything that could make room is held.
        """
        segment = Segment(
            key, start, end, parent, tuple(buffers), has_state, first_key=first_key, holders=1
        )
        with self.lock:
            self._take_room(segment)
        return segment

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A host buffer of `nbytes` (uint8, 1-d, pinned where asked for); may be slow."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)

    def publish(self, segment: Segment, *, replace: bool = False) -> Segment:
        """Put a reserved segment into the index and return the one that stands there.

        The first write wins unless `replace`: keys name tokens, not bits, so a second computation
        of the same tokens must not change what others already read.  What lost stays in RAM for
        its holders and goes like everything else when room is needed.
        """
        with self.lock:
            if segment.in_ram:
                self._queue(segment)[segment] = None
            held = self._index.get(_place(segment))
            if held is not None and held is not segment and not replace and self.whole(held):
                return held
            if held is not None and held is not segment:
                self._unlist(held)
            self._index[_place(segment)] = segment
            return segment

    def complete(self, segment: Segment) -> None:
        """The payload is whole: lookups may promise it from now on."""
        with self.lock:
            segment.fill = Fill.READY
            segment.holders -= 1
            self.twins.add(segment)
        segment.filled.set_result(None)

    def fail(self, segment: Segment, error: BaseException) -> None:
        """The payload could not be filled: give its room back and forget what has no file."""
        with self.lock:
            segment.fill = Fill.FAILED
            segment.holders -= 1
            self._drop_payload(segment)
            if not segment.durable:
                self._unlist(segment)
        segment.filled.set_exception(error)

    def whole(self, segment: Segment) -> bool:
        """True when every part of the chain is in RAM, being filled, or durable."""
        return all(
            node.durable or (node.in_ram and node.fill is not Fill.FAILED)
            for node in segment.ancestors()
        )

    def loadable(self, segment: Segment, after: int) -> bool:
        """True when the bytes past token `after` are in RAM."""
        return all(node.resident for node in segment.chain(after))

    def hold(self, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """Keep segments in RAM until `release`; counts as a use."""
        with self.lock:
            held = tuple(segments)
            for segment in held:
                segment.holders += 1
            self.touch(held)
            return held

    def release(self, held: Iterable[Segment]) -> None:
        """Undo one `hold`."""
        with self.lock:
            for segment in held:
                segment.holders -= 1

    def touch(self, segments: Iterable[Segment]) -> None:
        """Mark a chain as just used; parents come out more recent than their children."""
        with self.lock:
            for segment in sorted(segments, key=lambda s: (-s.end, not s.has_state)):
                queue = self._queue(segment)
                if segment in queue:
                    queue.move_to_end(segment)

    def want(self, segment: Segment) -> None:
        """Somebody asked to keep this chain: it goes only when nothing unwanted is left to go."""
        with self.lock:
            for node in segment.ancestors():
                if node.wanted:
                    return
                node.wanted = True
                if node in self._unwanted:
                    del self._unwanted[node]
                    self._wanted[node] = None

    def mark_durable(
        self, segment: Segment, segment_id: str, file_bytes: int, file_parent: str | None
    ) -> None:
        """The bytes of this segment are on disk, in the file `segment_id` of this length, which
        stands on the file `file_parent`."""
        with self.lock:
            segment.segment_id = segment_id
            segment.file_bytes = file_bytes
            segment.file_parent = file_parent

    def forget_files(self, segment_ids: frozenset[str]) -> None:
        """These segment files are gone: their segments live on only where bytes are in RAM."""
        with self.lock:
            for segment in list(self._index.values()):
                if segment.segment_id in segment_ids:
                    self.lose_file(segment)

    def lose_file(self, segment: Segment) -> None:
        """The segment file of this segment, listed or not, is gone."""
        with self.lock:
            segment.segment_id = None
            if not segment.in_ram:
                self._unlist(segment)

    def _queue(self, segment: Segment) -> OrderedDict[Segment, None]:
        return self._wanted if segment.wanted else self._unwanted

    def clear(self) -> None:
        """Forget every segment, and the bytes of those that nobody holds."""
        with self.lock:
            for segment in [*self._unwanted, *self._wanted]:
                if not segment.holders:
                    self._drop_payload(segment)
            self._index.clear()
            self._cold.clear()

    def _take_room(self, segment: Segment) -> None:
        # Counted before room is made, so that a parent does not go to make room for its child.
        if segment.parent is not None:
            segment.parent.resident_children += 1
        try:
            self._make_room(segment.nbytes)
        except RamTierFullError:
            if segment.parent is not None:
                segment.parent.resident_children -= 1
            raise
        self.used += segment.nbytes
        segment.in_ram = True

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self.capacity:
            raise RamTierFullError(
                f"a segment of {nbytes} bytes is larger than the RAM tier ({self.capacity} bytes)",
                hint="raise --max-warm-memory-gb",
            )
        if self.used + nbytes <= self.capacity:
            return
        victims = self._victims(self.used + nbytes - self.capacity)
        if victims:
            for segment in victims:
                self._evict(segment)
            return
        raise RamTierFullError(
            f"the RAM tier is full: {self.used} of {self.capacity} bytes are held",
            hint="raise --max-warm-memory-gb, or retry when running saves and restores are done",
        )

    def _victims(self, wanted: int) -> list[Segment]:
        """What to evict for `wanted` bytes, children before parents; nothing if not enough."""
        victims: list[Segment] = []
        passed: set[Segment] = set()
        gone: Counter[Segment] = Counter()
        # What somebody wants and no disk has yet would be lost: it goes last.
        unsaved = [segment for segment in self._wanted if not segment.durable]
        saved = (segment for segment in self._wanted if segment.durable)
        for segment in chain(self._unwanted, saved, unsaved):
            node: Segment | None = segment
            while node is not None:
                children = node.resident_children - gone[node]
                if node.holders or children or node.fill is Fill.FILLING:
                    passed.add(node)
                    break
                victims.append(node)
                wanted -= node.nbytes
                if wanted <= 0:
                    return victims
                parent = node.parent
                if parent is not None:
                    gone[parent] += 1
                # One that was passed over for its child's sake has been used less recently.
                node = parent if parent in passed else None
        return []

    def _evict(self, segment: Segment) -> None:
        self._drop_payload(segment)
        self.stats.evicted += 1
        if not segment.durable:
            self._unlist(segment)
        elif self._index.get(_place(segment)) is segment:
            self._cold[segment] = None
            if len(self._cold) > MAX_COLD_ENTRIES:
                self._unlist(next(iter(self._cold)))

    def _drop_payload(self, segment: Segment) -> None:
        if not segment.in_ram:
            return
        self.twins.remove(segment)
        segment.in_ram = False
        segment.payload = None
        self.used -= segment.nbytes
        self._queue(segment).pop(segment, None)
        if segment.parent is not None:
            segment.parent.resident_children -= 1

    def _unlist(self, segment: Segment) -> None:
        """Take a segment out of the index; its bytes go when its last holder lets go."""
        self._cold.pop(segment, None)
        if self._index.get(_place(segment)) is segment:
            del self._index[_place(segment)]


def _place(segment: Segment) -> Place:
    return segment.key, segment.has_state
