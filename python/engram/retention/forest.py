"""What removing snapshots frees, where segments are shared.

Segments form trees: each stands on its parent. A segment's bytes are free once no snapshot ends on
it or on anything that stands on it. So only *leaves* free anything. What can only go together
(segments between two places where something ends or forks) is kept as one run, which makes every
question and every removal cost the same however long the chains are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engram.retention.base import Segment, Snapshot


@dataclass(eq=False, slots=True)
class Run:
    """A run of segments that become free together; ``start`` and ``end`` are token counts.

    What stands or ends on it is counted, and the numbers of those are summed up: when one is left,
    the sum is its number. That takes a fraction of the memory and time of a set for each run.
    """

    number: int
    parent: Run | None
    start: int
    end: int
    bytes: int
    children: int = 0
    child_sum: int = 0
    stops: int = 0
    stop_sum: int = 0


@dataclass(eq=False, slots=True)
class Stop:
    """A place where snapshots end: the same last segment on every rank."""

    number: int
    runs: tuple[Run, ...]
    snapshots: dict[int, Snapshot] = field(default_factory=dict)

    def frees(self) -> tuple[int, int]:
        """Bytes and tokens that go when all its snapshots do; 0 while others need everything."""
        size = tokens = 0
        for run in self.runs:
            if run.children == 0 and run.stops == 1:
                size += run.bytes
                tokens = max(tokens, run.end - run.start)
        return size, tokens


class Forest:
    """The segments that some snapshots stand on. Snapshots are known by their place in the list.

    ``bytes`` counts each segment once.
    """

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        self.bytes = 0
        self.stops: list[Stop] = []
        self.stop_of: list[Stop] = []
        self._runs: list[Run] = []
        run_of: dict[Segment, Run] = {}
        stop_at: dict[tuple[Segment, ...], Stop] = {}
        for number, snapshot in enumerate(snapshots):
            stop = stop_at.get(snapshot.tips)
            if stop is None:
                own = tuple(self._run(tip, run_of) for tip in snapshot.tips)
                stop = stop_at[snapshot.tips] = Stop(len(self.stops), own)
                self.stops.append(stop)
                for run in own:
                    run.stops += 1
                    run.stop_sum += stop.number
            stop.snapshots[number] = snapshot
            self.stop_of.append(stop)
        for run in self._runs:
            self._join(run)

    def _run(self, tip: Segment, run_of: dict[Segment, Run]) -> Run:
        """The run of a segment; it and what it stands on are made where they are not yet there."""
        new: list[Segment] = []
        segment: Segment | None = tip
        while segment is not None and segment not in run_of:
            new.append(segment)
            segment = segment.parent
        above = None if segment is None else run_of[segment]
        for made in reversed(new):
            start = 0 if above is None else above.end
            run = Run(len(self._runs), above, start, made.end, made.bytes)
            self._runs.append(run)
            run_of[made] = run
            self.bytes += made.bytes
            if above is not None:
                above.children += 1
                above.child_sum += run.number
            above = run
        return run_of[tip]

    def remove(self, number: int) -> tuple[int, list[Stop]]:
        """Take a snapshot away: bytes that are free now, and stops that now free something else."""
        stop = self.stop_of[number]
        del stop.snapshots[number]
        if stop.snapshots:
            return 0, []
        freed = 0
        changed: list[Stop] = []
        for run in stop.runs:
            run.stops -= 1
            run.stop_sum -= stop.number
            freed += self._shed(run, changed)
        self.bytes -= freed
        return freed, changed

    def _shed(self, run: Run, changed: list[Stop]) -> int:
        """Drop a run that nothing needs any more; then look at what it stood on."""
        freed = 0
        node: Run | None = run
        while node is not None and node.children == 0 and node.stops == 0:
            freed += node.bytes
            above = node.parent
            if above is not None:
                above.children -= 1
                above.child_sum -= node.number
            node = above
        if node is not None:
            node = self._join(node)
            if node.children == 0 and node.stops == 1:
                changed.append(self.stops[node.stop_sum])
        return freed

    def _join(self, run: Run) -> Run:
        """Make a run on which nothing ends, and one other stands, a part of that other."""
        if run.stops or run.children != 1:
            return run
        child = self._runs[run.child_sum]
        child.bytes += run.bytes
        child.start = run.start
        child.parent = run.parent
        if run.parent is not None:
            run.parent.child_sum += child.number - run.number
        run.children = 0
        return child
