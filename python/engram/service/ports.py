"""What the service needs of the engine.  SGLang's side of it is in `engram.sglang_plugin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engram.conversation.turns import FinishedRequest, Tag
from engram.core.namespace import Namespace
from engram.core.tokens import TokenArray
from engram.snapshot.manifest import SegmentRef

Chains = Sequence[Sequence[SegmentRef]]
"""One chain of segments a rank, rank 0 first."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Who the engine is; the same for all ranks but for their pools."""

    namespace: Namespace
    world_size: int
    page_size: int
    num_layers: int
    model_type: str
    model_name: str


@dataclass(frozen=True, slots=True)
class Located:
    """Where the state of a request stands: `boundary` tokens, page key `key`.

    `needed` are the bytes of segment files that making it durable would write, on all ranks; None
    if nobody asked to measure them.
    """

    boundary: int
    key: str
    needed: int | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """Segments that are durable on every rank; sizes in bytes of segment files.

    `health` is what is wrong with the state of a rank that was told to keep it all the same.
    """

    boundary: int
    chains: tuple[tuple[SegmentRef, ...], ...]
    bytes: int
    unique_bytes: int
    health: str | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """A chain that is verified in RAM on every rank.

    `state_slot` is the recurrent state's slot in VRAM, where the tree holds the whole chain too.
    """

    source_tier: str
    bytes: int
    read_bytes: int
    in_vram: bool
    state_slot: int | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation."""

    rid: str
    output_ids: list[int]
    text: str | None
    cached_tokens: int
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ResidentSegment:
    """A segment in a rank's RAM that has a file; `held` if something is being done with it."""

    segment_id: str
    bytes: int
    held: bool


class Ranks(Protocol):
    """The scheduler ranks.  Every call fails with an `EngramError` if any rank fails.

    `namespace` is the id of the one that the caller believes the ranks have; if their weights have
    changed since, the call fails with `NamespaceChangedError` and nothing was done.
    """

    async def describe(self) -> EngineInfo: ...

    async def locate(
        self, namespace: str, request: FinishedRequest, boundary: int, *, measure: bool = False
    ) -> Located:
        """Where a snapshot of the request would end; `CaptureLostError` if its state is gone.

        With `measure` also what it would write, which may wait for the disk.

        The state counts as wanted from now on: what nobody asked to keep leaves RAM before it.
        """
        ...

    async def persist(self, namespace: str, request: FinishedRequest, boundary: int) -> Stored:
        """Make the state at the request's end durable; `boundary` is where it is expected."""
        ...

    async def promote(
        self,
        namespace: str,
        chains: Chains,
        *,
        owner: str,
        seconds: float,
        exact: bool,
        timeout: float,
        tokens: TokenArray | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Brought:
        """Bring chains into RAM, verified, leased to `owner` for `seconds`."""
        ...

    def abandon(self, owner: str) -> None:
        """Nobody waits for the promotions of `owner` any longer: those not begun never begin."""
        ...

    async def tier(self, namespace: str, key: str, tokens: TokenArray) -> str:
        """The fastest tier that holds the whole sequence that ends at page key `key`."""
        ...

    async def drop(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> None:
        """Delete segment files, by rank, that no manifest names."""
        ...

    async def residents(self, namespace: str) -> list[list[ResidentSegment]]:
        """The durable segments in RAM, by rank."""
        ...

    async def demote(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> int:
        """Let durable segments, by rank, leave RAM, but for what is in use; the bytes that left."""
        ...

    async def pin(
        self, namespace: str, request: FinishedRequest, boundary: int, owner: str
    ) -> bool:
        """Keep the state at the request's end in VRAM for `owner`, in place of what it has there.

        False, and `owner` keeps what it has, if VRAM does not hold it.  `PinBudgetError`.
        """
        ...

    async def unpin(self, owner: str) -> bool:
        """Let go of what `owner` has pinned in VRAM; whether there was anything."""
        ...

    async def stats(self) -> list[dict[str, Any]]: ...

    def page_keys(
        self, tokens: TokenArray, page_size: int, extra_key: str | None, cache_salt: str | None
    ) -> list[str]:
        """One key a whole page, as the ranks compute them."""
        ...


class Generator(Protocol):
    """The engine's own way to serve a request."""

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        rid: str | None = None,
        tag: Tag | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Generation:
        """Generate to the end.

        `InvalidRequestError` for what the engine refuses, `GenerationAbortedError` for what it
        ends without completing.
        """
        ...
