"""Rows fetched on threads while the layers before compute.

Which rows a token needs follows from the text alone, so a lookup can start as soon as the token is
known: before the first layer in prefill, right after sampling in decode.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final
from weakref import WeakSet

import torch

from engram.errors import DeadlineError, InvalidRequestError


class PrefetchHandle:
    """A lookup under way; `result` is its tensor. From `EngramModule.prefetch_embeddings`."""

    def __init__(self, future: Future[tuple[torch.Tensor, torch.cuda.Event | None]]) -> None:
        self._future = future
        self._process = os.getpid()
        self.piece: object | None = None
        """What an `EngramState` took in for it, if it was made with one."""

    def done(self) -> bool:
        """Whether `result` returns at once (a copy to a GPU may still run on its stream)."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> torch.Tensor:
        """The memory embeddings [B, T, M]; waits for them, at most ``timeout`` seconds.

        On a GPU the current stream waits, not the caller. May be called several times. Raises what
        the lookup raised, or `DeadlineError`.
        """
        if self._process != os.getpid() and not self._future.done():
            raise InvalidRequestError(
                "the lookup runs in the process that this one was forked from",
                hint="start it after the fork",
            )
        try:
            rows, copied = self._future.result(timeout)
        except TimeoutError as error:
            if self._future.done():
                raise
            raise DeadlineError(
                f"memory rows did not arrive within {timeout} s",
                hint="the disk of the table may be overloaded",
            ) from error
        if copied is not None:
            stream = torch.cuda.current_stream(rows.device)
            stream.wait_event(copied)
            rows.record_stream(stream)
        return rows


class Prefetcher:
    """Runs lookups on ``threads`` threads; one may serve many modules.

    Lookups start in the order they were submitted. Those of one layer are served by one thread
    each; several layers, or steps, overlap with more threads.
    """

    def __init__(self, threads: int = 2) -> None:
        if threads < 1:
            raise InvalidRequestError(f"a prefetcher has at least one thread, not {threads}")
        self._threads = threads
        self._closed = False
        self._start()
        _prefetchers.add(self)

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="engram-prefetch")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> Prefetcher:
        # A copy of a module shares its threads.
        return self

    def submit(
        self, lookup: Callable[[], torch.Tensor], device: torch.device | None = None
    ) -> PrefetchHandle:
        """Run ``lookup`` on a thread and bring its tensor to ``device`` (None: leave it).

        Raises `InvalidRequestError` after `close`.
        """
        if self._closed:
            raise InvalidRequestError("the prefetcher is closed", hint="make another one")
        return PrefetchHandle(self._pool.submit(self._run, lookup, device, torch.is_grad_enabled()))

    def close(self) -> None:
        """Wait for running lookups and end the threads. May be called again."""
        self._closed = True
        self._pool.shutdown(wait=True)

    def _run(
        self, lookup: Callable[[], torch.Tensor], device: torch.device | None, grad: bool
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        # The gradient mode belongs to a thread; a trainable table needs the caller's.
        with torch.set_grad_enabled(grad):
            rows = lookup()
        if device is None or rows.device == device:
            return rows, None
        if device.type != "cuda":
            return rows.to(device), None
        return self._to_cuda(rows, device)

    def _to_cuda(
        self, rows: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Copy through pinned memory on a stream of our own, behind none of the model's work."""
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
        # torch's pinned allocator reuses the block only after the copy on this stream is done.
        staged = rows.pin_memory()
        with torch.cuda.stream(stream):
            copy = staged.to(device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        return copy, copied


_prefetchers: Final[WeakSet[Prefetcher]] = WeakSet()
_shared: Prefetcher | None = None
_shared_lock = threading.Lock()


def shared_prefetcher() -> Prefetcher:
    """The prefetcher of all modules that were not given one."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Prefetcher()
        return _shared


def _restart_in_child() -> None:
    """After a fork: the threads are not there, and would be waited for without end."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for prefetcher in list(_prefetchers):
        prefetcher._start()


os.register_at_fork(after_in_child=_restart_in_child)
