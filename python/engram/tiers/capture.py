"""From the device pools into RAM, on a thread: what a finished request leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from engram.errors import RamTierFullError, StateUnhealthyError
from engram.tiers.base import DeviceReader, Segment
from engram.tiers.health import HealthPolicy, StateCheck, StateHealth
from engram.tiers.lookup import Lookup
from engram.tiers.payload import tokens_of, views, zero_padding
from engram.tiers.planning import SegmentPlanner
from engram.tiers.ram import RamTier

logger = logging.getLogger(__name__)

MIN_SHARED_BYTES: Final = 16 << 10
"""Rows of fewer bytes are not worth a file of their own, which has 4,128 bytes beside them."""


class Capturer:
    """One thread that fills payloads from the device, in the order in which it was asked."""

    def __init__(
        self, ram: RamTier, planner: SegmentPlanner, known: Lookup, health: HealthPolicy
    ) -> None:
        self._ram = ram
        self._planner = planner
        # Learnt here, not at a capture: those are on the scheduler's thread.
        self._row_bytes = planner.row_bytes
        self._known = known
        self._health = health
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-copy")

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
        """See `TierManager.capture`."""
        ids = np.asarray(tokens, dtype="<u4")
        with self._ram.lock:
            self._known.leases.expire()
            taken: list[Segment] = []
            try:
                self._take_all(taken, keys, start, ids, parent)
            except RamTierFullError as full:
                self._ram.stats.capture_refused += 1
                for segment in reversed(taken):
                    self._ram.fail(segment, full)
                return False
            # The index cannot hold a whole boundary here: the caller has looked, and whoever else
            # publishes has read it from disk, which makes this copy the newer one.
            for segment in taken:
                self._ram.publish(segment, replace=True)
        self._thread.submit(self._fill, taken, ids, read, on_done)
        return True

    def quiesce(self) -> None:
        """Return when no capture reads device memory any more."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what was asked for and stop the thread."""
        self._thread.shutdown(wait=True)

    # ---- room ----

    def _take_all(
        self,
        taken: list[Segment],
        keys: Sequence[str],
        start: int,
        tokens: np.ndarray,
        parent: Segment | None,
    ) -> None:
        """Room for the rows, cut, and the state; what has been found goes into `taken`."""
        page = len(tokens) // len(keys)
        rows, first = parent, 0
        for last in self._cuts(keys, tokens):
            rows = self._take(
                keys[last // page - 1],
                start + first,
                start + last,
                rows,
                first_key=keys[first // page],
            )
            taken.append(rows)
            first = last
        if self._known.stateful:
            end = start + len(tokens)
            taken.append(self._take(keys[-1], end, end, rows))

    def _cuts(self, keys: Sequence[str], tokens: np.ndarray) -> list[int]:
        """Where rows of these tokens end, the last of them at the end of the tokens."""
        page = len(tokens) // len(keys)
        least = max(1, MIN_SHARED_BYTES // self._row_bytes)
        cuts, first = [], 0
        while first < len(tokens):
            common = self._ram.twins.common(keys[first // page], tokens[first:]) // page * page
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
        buffers = self._planner.buffers(key, start, end, has_state)
        return self._ram.reserve(
            key, start, end, parent, buffers, has_state=has_state, first_key=first_key
        )

    # ---- on the thread ----

    def _fill(
        self,
        taken: Sequence[Segment],
        tokens: np.ndarray,
        read: DeviceReader,
        on_done: Callable[[], None],
    ) -> None:
        try:
            payloads = []
            check = StateCheck(norm=self._health.interval > 0)
            for segment in taken:
                payload = self._ram.allocate(segment.nbytes)
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
            self._ram.stats.capture_failed += 1
            # The state first: it stands on the rows.
            for segment in reversed(taken):
                self._ram.fail(segment, error)
        else:
            self._ram.stats.captured += 1
            for segment, payload in zip(taken, payloads, strict=True):
                segment.payload = payload
                self._ram.complete(segment)
        finally:
            on_done()

    def _judge(self, taken: Sequence[Segment], found: StateHealth) -> None:
        """Note what was seen of a state; `StateUnhealthyError` if it is not to be kept."""
        rows, state = taken[0], taken[-1]
        with self._ram.lock:
            state.norm = found.norm
            problem = found.problem or found.drift(self._norm_before(rows))
        if problem is None:
            return
        self._ram.stats.unhealthy += 1
        state.health = problem
        text = f"the state at token {state.end} is unhealthy: {problem}"
        if self._health.keep:
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
        left = self._health.interval
        before = rows.parent
        while before is not None and left:
            state = self._known.boundary(before.key)
            left -= state is not None and state.parent is before
            if state is not None and not left:
                return state.norm
            before = before.parent
        return None
