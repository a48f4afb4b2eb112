"""From RAM to disk, on the writer's thread, and off the disk again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final

from engram.errors import CaptureLostError, StateUnhealthyError
from engram.snapshot.manifest import SegmentRef
from engram.store.base import SegmentStore
from engram.tiers.base import Persisted, Segment
from engram.tiers.payload import bytes_of
from engram.tiers.planning import SegmentPlanner
from engram.tiers.ram import RamTier
from engram.tiers.twins import begins_with
from engram.tiers.writing import Write, WriteQueue

FILL_TIMEOUT_S: Final = 120.0
"""How long a writer waits for a payload that is still being copied from the device."""

COPY_WAIT_S: Final = 5.0
"""How long who asks what a save would write waits for a copy, which takes milliseconds."""


class Persister:
    """Makes chains durable, in the order in which it was asked."""

    def __init__(self, ram: RamTier, store: SegmentStore, planner: SegmentPlanner) -> None:
        self._ram = ram
        self._store = store
        self._planner = planner
        self._shard = planner.shard
        self._writes = WriteQueue(ram)

    def persist(self, boundary: Segment) -> Future[Persisted]:
        """See `TierManager.persist`."""
        chain = boundary.chain()
        with self._ram.lock:
            self._ram.want(boundary)
            self._ram.touch(chain)
            return self._writes.submit(Write(self._persist, chain))

    def unsaved_bytes(self, boundary: Segment) -> int:
        """See `TierManager.unsaved_bytes`."""
        nbytes = 0
        parent: str | None = None
        stands = True
        for node in boundary.chain():
            file = None
            # What is to stand on a file that is yet to be written has none itself.
            if stands:
                file = self._file_of(node, parent) or self._shared_with_twin(node, parent)
            if file is not None:
                parent = file[0]
                continue
            stands = False
            planned = self._planner.unplaced(node.key, node.start, node.end, node.has_state)
            nbytes += planned.file_length
        return nbytes

    def _shared_with_twin(self, node: Segment, parent: str | None) -> tuple[str, int] | None:
        """`_twin_of`, once the segment has been copied; none if it has not been in time.

        From now on it is in that file: the twin may have left RAM when the save's turn comes.
        """
        try:
            node.filled.result(COPY_WAIT_S)
        except Exception:
            return None  # It is written in full, or its save says what became of it.
        file = self._twin_of(node, parent)
        if file is not None:
            self._share(node, file, parent)
        return file

    def drop(self, segment_ids: Sequence[str]) -> Future[int]:
        """See `TierManager.drop`."""
        gone = frozenset(segment_ids)
        return self._writes.submit(Write(lambda _: self._drop(gone)))

    def depths(self) -> dict[str, int]:
        """How much is being written and waits for it."""
        return self._writes.depths()

    def finish(self) -> None:
        """Return when everything asked for so far is done."""
        self._writes.finish()

    def close(self) -> None:
        """Stop the thread."""
        self._writes.close()

    # ---- on the thread ----

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
                    if file is not None:
                        self._share(segment, file, parent)
                    else:
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
        with self._ram.lock:
            segment_id, length = segment.segment_id, segment.file_bytes
            below = segment.file_parent
        if segment_id is None or below != parent:
            return None
        if self._store.has_segment(self._shard, segment_id, length):
            return segment_id, length
        # Quarantined, cut or deleted: no manifest may name it.
        self._ram.lose_file(segment)
        return None

    def _twin_of(self, rows: Segment, parent: str | None) -> tuple[str, int] | None:
        """The file of other rows on the same parent that begin with the very bits of these.

        Keys name tokens, not bits, and a snapshot comes back with the bits it was taken with.
        """
        with self._ram.lock:
            if not rows.resident:
                return None
            held = self._ram.hold((rows, *self._ram.twins.of(rows)))
        try:
            for other in held[1:]:
                if other.end < rows.end:
                    continue
                file = self._file_of(other, parent)
                if file is not None and begins_with(other, rows):
                    return file
        finally:
            self._ram.release(held)
        return None

    def _share(self, rows: Segment, file: tuple[str, int], parent: str | None) -> None:
        """From now on the file of their twin is that of these rows, if they have none there."""
        with self._ram.lock:
            if rows.durable and rows.file_parent == parent:
                return
            self._ram.mark_durable(rows, *file, parent)
            self._ram.twins.remove(rows)  # whoever is their twin is the other's too

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
            self._ram.lose_file(segment)
            raise CaptureLostError(f"the state at token {segment.end} has left memory")
        header = self._planner.header(
            segment.key, segment.start, segment.end, parent, segment.has_state
        )
        segment_id = self._store.put_segment(header, bytes_of(payload))
        self._ram.mark_durable(segment, segment_id, header.file_length, parent)
        self._ram.stats.persisted_segments += 1
        self._ram.stats.persisted_bytes += header.file_length
        return segment_id, header.file_length

    def _drop(self, segment_ids: frozenset[str]) -> int:
        self._ram.forget_files(segment_ids)
        for segment_id in segment_ids:
            self._store.delete_segment(self._shard, segment_id)
        return len(segment_ids)


def _ref(segment: Segment, segment_id: str, file_bytes: int) -> SegmentRef:
    return SegmentRef(
        segment_id=segment_id,
        key=segment.key,
        start=segment.start,
        end=segment.end,
        has_state=segment.has_state,
        bytes=file_bytes,
    )
