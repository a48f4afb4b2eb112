"""Ordering of Engram's copies against the forward pass: CUDA streams, or nothing at all on CPU.

No GPU has run the CUDA half of this file; `docs/architecture.md` lists what is unverified.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class SideStream:
    """A stream of our own for copies between the device and the host."""

    def __init__(self, device: torch.device, forward_stream: Any | None) -> None:
        self._forward = forward_stream
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fence(self) -> Any | None:
        """A point that has passed once everything enqueued so far has run.

        Both streams that write the pools are in it: the scheduler's own and the forward stream,
        on which an overlapped step may still be writing.
        """
        if self._stream is None:
            return None
        events = [torch.cuda.Event()]
        events[0].record()
        if self._forward is not None:
            events.append(torch.cuda.Event())
            events[1].record(self._forward)
        return events

    def after(self, fence: Any | None) -> AbstractContextManager[Any]:
        """A context in which device work is enqueued on this stream, behind `fence`."""
        if self._stream is None:
            return nullcontext()
        for event in fence or ():
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def on_forward(self) -> AbstractContextManager[Any]:
        """A context in which device work is enqueued on the forward stream, behind the scheduler's:
        in order with the steps that write the pools."""
        if self._stream is None or self._forward is None:
            return nullcontext()
        self._forward.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._forward)

    def synchronize(self) -> None:
        """Wait until everything enqueued on this stream has run."""
        if self._stream is not None:
            self._stream.synchronize()
