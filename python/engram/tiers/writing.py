"""The writer's line of work, and what it holds in RAM until it is on disk."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from engram.tiers.base import Segment
from engram.tiers.ram import RamTier

WRITE_SHARE: Final = 0.5
"""Of the RAM tier, what may be held for writing; one chain alone may be larger."""

Done = TypeVar("Done")


@dataclass(eq=False, slots=True)
class Write(Generic[Done]):
    """Work for the writer: `held` is what it keeps in RAM until that is on disk."""

    work: Callable[[Write[Done]], Done]
    chain: Sequence[Segment] = ()
    held: list[Segment] = field(default_factory=list)
    future: Future[Done] = field(default_factory=Future)


class WriteQueue:
    """One thread that does writes in the order in which they were asked for.

    A write holds its chain in RAM from when it is handed to the thread, which is as early as the
    bounded share of the tier allows; what waits beyond that is not held.
    """

    def __init__(self, ram: RamTier) -> None:
        self._ram = ram
        self._waiting: deque[Write[Any]] = deque()
        self._running = 0
        self._held_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-write")

    def submit(self, write: Write[Done]) -> Future[Done]:
        """Put work at the end of the line."""
        with self._ram.lock:
            self._waiting.append(write)
            self._start()
        return write.future

    def let_go(self, write: Write[Any], segment: Segment) -> None:
        """A segment is on disk: no effect if the write does not hold it."""
        with self._ram.lock:
            if segment in write.held:
                self._release(write, segment)
                self._start()

    def depths(self) -> dict[str, int]:
        """Writes handed to the thread and waiting, and the bytes they hold."""
        with self._ram.lock:
            return {
                "writes_running": self._running,
                "writes_waiting": len(self._waiting),
                "bytes_held_for_writing": self._held_bytes,
            }

    def finish(self) -> None:
        """Return when everything asked for so far is done."""
        # What waits is handed on only as what is before it ends.
        with contextlib.suppress(Exception):
            self.submit(Write(lambda _: None)).result()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True)

    def _start(self) -> None:
        """Hold and hand to the thread what may be held; called under the lock of the RAM tier."""
        while self._waiting:
            write = self._waiting[0]
            needed = [s for s in write.chain if s.in_ram and not s.durable]
            nbytes = sum(s.nbytes for s in needed)
            full = self._held_bytes + nbytes > self._ram.capacity * WRITE_SHARE
            if needed and self._held_bytes and full:
                return
            self._waiting.popleft()
            write.held.extend(self._ram.hold(needed))
            self._held_bytes += nbytes
            self._running += 1
            self._thread.submit(self._run, write)

    def _run(self, write: Write[Done]) -> None:
        try:
            done = write.work(write)
        except BaseException as error:
            self._end(write)
            write.future.set_exception(error)
        else:
            self._end(write)
            write.future.set_result(done)

    def _end(self, write: Write[Any]) -> None:
        with self._ram.lock:
            self._running -= 1
            for segment in list(write.held):
                self._release(write, segment)
            self._start()

    def _release(self, write: Write[Any], segment: Segment) -> None:
        write.held.remove(segment)
        self._ram.release((segment,))
        self._held_bytes -= segment.nbytes
