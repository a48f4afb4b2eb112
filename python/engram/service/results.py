"""The outcomes of save and restore, as the routes report them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engram.catalog.rows import SnapshotRow
from engram.service.ports import Generation


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What a save acknowledged.

    `durability` is "sync" when the snapshot is durable now; with "async" it is on its way and
    `bytes` are not known yet.  `recomputed` says that the state was gone from every tier and was
    computed again from the recorded tokens.
    """

    snapshot_id: str
    conversation_id: str
    branch_name: str
    turn_number: int
    token_count: int
    recompute_tokens: int
    bytes: int | None
    unique_bytes: int | None
    durability: str
    elapsed_ms: float
    existing: bool = False
    recomputed: bool = False


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did: the state is verified and in RAM, or in VRAM as well.

    `recompute_tokens` are recorded tokens past the boundary, which the next turn computes.
    """

    snapshot: SnapshotRow
    token_count: int
    recompute_tokens: int
    source_tier: str
    tier: str
    bytes: int
    state_slot: int | None
    elapsed_ms: float
    verified: bool = True
    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class TierChange:
    """Bytes of a conversation have moved; `conversation_id` is None where nobody can tell whose."""

    conversation_id: str | None
    source: str
    target: str
    reason: str
    snapshot_id: str | None = None
    bytes: int | None = None


@dataclass(slots=True)
class ServiceStats:
    """Counters of the service since start."""

    saves: int = 0
    save_failures: int = 0
    restores: int = 0
    restore_failures: int = 0
    corrupt: int = 0
    recomputed_saves: int = 0
    refused_saves: int = 0
    left_out_saves: int = 0
    held_requests: int = 0
    hold_timeouts: int = 0
    hold_failures: int = 0
    lost_turns: int = 0
    collected_segments: int = 0
    collected_bytes: int = 0
    collected_temps: int = 0
    last_failures: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Keep the newest failures of background work, where an operator can see them."""
        self.last_failures.append(what)
        del self.last_failures[:-20]
