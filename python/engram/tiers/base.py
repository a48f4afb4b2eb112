"""The words of the tiers: segments, outcomes, and the shape of a segment's payload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from engram.core.tokens import TokenArray
from engram.snapshot.manifest import SegmentRef
from engram.snapshot.segment import BufferSpec
from engram.tiers.health import StateCheck


class Tier(str, Enum):
    """A place that can hold the bytes of a segment, fastest first."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"


BufferPlan = tuple[str, str, tuple[int, ...]]
"""(name, dtype in safetensors' spelling, shape) of one buffer of a payload."""


class PayloadLayout(Protocol):
    """What a segment of this model holds, in the order in which it is stored."""

    def __call__(self, num_tokens: int, has_state: bool) -> Sequence[BufferPlan]:
        """Buffers of a state, or of `num_tokens` KV rows without the tokens themselves."""
        ...


class DeviceReader(Protocol):
    """Fills the buffers of payloads from the device pools (called on the copy thread)."""

    def __call__(
        self, targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck
    ) -> None:
        """Fill `targets` with the rows from `first` up to `last`, counted from the capture's start,
        or with the state, where they are its buffers.

        Return when every byte has landed in host memory and `check` has seen the state.
        """
        ...


class PageKeys(Protocol):
    """How the keys of pages are made."""

    def __call__(self, tokens: TokenArray, before: str | None, /) -> Sequence[str]:
        """One key for each whole page of `tokens`, which follow the page with the key `before`.

        None for `before` is the start of a sequence that has neither extra key nor cache salt.
        """
        ...


class Fill(Enum):
    """Whether the payload of a boundary may be read."""

    FILLING = "filling"
    READY = "ready"
    FAILED = "failed"


@dataclass(eq=False, slots=True)
class Segment:
    """A stored unit of state, wherever its bytes are: rows of tokens, or the state after them.

    `in_ram` says that room in the RAM tier is taken; `payload` is the one contiguous host buffer
    (uint8, 1-d) there, allocated by whoever fills it, so that no scheduler waits for pinned memory;
    `parent` are the rows that reach `start` (None at the sequence's start), the rows before these
    rows or below this state.  Chains are object references: a segment replaced in the index stays
    whole for whoever holds it.

    `health` is what is wrong with a state that was kept all the same, `norm` its L2 norm if known.

    `segment_id` is that of its file, if it has one, `file_bytes` the length of that and
    `file_parent` the id of the file that it stands on; the file may go on with rows that are not
    these.  `first_key` is the key of the first page of rows, None if that is not known.  `wanted`
    says that somebody asked to keep it, or one that stands on it: all below a wanted segment is
    wanted.
    """

    key: str
    start: int
    end: int
    parent: Segment | None
    buffers: tuple[BufferSpec, ...]
    has_state: bool
    in_ram: bool = False
    payload: torch.Tensor | None = None
    fill: Fill = Fill.FILLING
    filled: Future[None] = field(default_factory=Future)
    health: str | None = None
    norm: float | None = None
    segment_id: str | None = None
    file_bytes: int = 0
    file_parent: str | None = None
    first_key: str | None = None
    wanted: bool = False
    holders: int = 0
    resident_children: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.buffers[-1].offset + self.buffers[-1].length

    @property
    def durable(self) -> bool:
        """True when a segment file on disk holds the bytes."""
        return self.segment_id is not None

    @property
    def resident(self) -> bool:
        """True when the bytes are in RAM and complete."""
        return self.in_ram and self.fill is Fill.READY

    def chain(self, after: int = 0) -> list[Segment]:
        """The segments of the chain that end past token `after`, first one first."""
        found: list[Segment] = []
        node: Segment | None = self
        while node is not None and node.end > after:
            found.append(node)
            node = node.parent
        return found[::-1]

    def ancestors(self) -> Iterator[Segment]:
        """This segment and those before it on its chain, last one first."""
        node: Segment | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Persisted:
    """A chain that is durable: `written` of its `nbytes` had to be written for it.

    `health` says what is wrong with its state, if it was kept all the same.
    """

    refs: tuple[SegmentRef, ...]
    nbytes: int
    written: int
    health: str | None


@dataclass(frozen=True, slots=True)
class Promoted:
    """A chain that is verified and in RAM, and the slowest tier it had to be fetched from."""

    source: Tier
    nbytes: int
    read: int


@dataclass(slots=True)
class TierStats:
    """Counters since start; bytes are bytes, the rest are events."""

    captured: int = 0
    capture_refused: int = 0
    capture_failed: int = 0
    capture_stale: int = 0
    unhealthy: int = 0
    evicted: int = 0
    demoted: int = 0
    persisted_segments: int = 0
    persisted_bytes: int = 0
    promoted_segments: int = 0
    promoted_bytes: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    corrupt: int = 0
    contained_errors: int = 0
