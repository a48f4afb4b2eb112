"""What removing snapshots frees, and what it costs, where segments are shared.

Segments form trees: each stands on its parent. A segment's bytes are free once no snapshot ends on
it or on anything that stands on it. So only *leaves* free anything: the states, each of which is
its snapshot's alone, and the rows at the ends of chains. What can only go together (segments
between two places where something ends or forks) is kept as one run, which makes every question
and every removal cost the same however long the chains are.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from engram.retention.base import Segment, Snapshot


@dataclass(eq=False, slots=True)
class Run:
    """A run of segments that become free together; ``start`` is a token count.

    ``states`` are the boundaries, in order, whose states stand on it; ``boundary`` is this run's
    own while it is listed there. What stands or ends on it is counted, and the numbers of those are
    summed up: when one is left, the sum is its number. That takes a fraction of the memory and time
    of a set for each run.
    """

    number: int
    parent: Run | None
    start: int
    bytes: int
    boundary: int | None = None
    states: list[int] = field(default_factory=list)
    children: int = 0
    child_sum: int = 0
    stops: int = 0
    stop_sum: int = 0


@dataclass(eq=False, slots=True)
class Stop:
    """A place where snapshots end: the same last segment on every rank, at the token ``end``."""

    number: int
    runs: tuple[Run, ...]
    end: int
    has_state: bool
    snapshots: dict[int, Snapshot] = field(default_factory=dict)

    def frees(self) -> int:
        """Bytes that go when all its snapshots do; 0 while others need everything."""
        return sum([run.bytes for run in self.runs if run.children == 0 and run.stops == 1])

    def tokens(self) -> int:
        """Tokens that going on from here would compute again, were all its snapshots gone.

        They count from the nearest earlier state on the same chain that stays; without states, from
        where the rows begin that would go.
        """
        if self.has_state:
            return self.end - min([_nearest_state(run, self.end) for run in self.runs])
        going = [run.start for run in self.runs if run.children == 0 and run.stops == 1]
        return self.end - min(going, default=self.end)


def _nearest_state(run: Run, end: int) -> int:
    """The last boundary up to token ``end`` that has a state, other than the one ``run`` holds."""
    # Its own is listed where it stands, but of two states at one boundary either will do.
    own = run.boundary
    below, end = (run.parent, end) if own is not None else (run.parent, min(end, run.start))
    while below is not None:
        place = bisect_right(below.states, end)
        if own is not None:
            place -= 1
            own = None
        if place:
            return below.states[place - 1]
        end = min(end, below.start)
        below = below.parent
    return 0


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
                end, has_state = snapshot.token_count, snapshot.tips[0].is_state
                stop = Stop(len(self.stops), own, end, has_state)
                stop_at[snapshot.tips] = stop
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
            run = Run(len(self._runs), above, made.start, made.bytes)
            self._runs.append(run)
            run_of[made] = run
            self.bytes += made.bytes
            if above is not None:
                above.children += 1
                above.child_sum += run.number
                if made.is_state:
                    run.boundary = made.start
                    insort(above.states, made.start)
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
                if node.boundary is not None:
                    above.states.pop(bisect_right(above.states, node.boundary) - 1)
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
        # A state alone on its rows is below nothing else, and so is listed nowhere.
        child.boundary = None
        child.start = run.start
        child.parent = run.parent
        if run.parent is not None:
            run.parent.child_sum += child.number - run.number
        run.children = 0
        return child
