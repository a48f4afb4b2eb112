"""What the catalog's queries return. Times are seconds since the epoch, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import JsonValue

from engram.snapshot.listing import DamagedManifest
from engram.snapshot.manifest import Durability
from engram.snapshot.segment import Shard


@dataclass(frozen=True)
class SnapshotRow:
    """One snapshot as listings show it; the tokens and segments are in its manifest."""

    snapshot_id: str
    tenant: str
    conversation_id: str
    branch_name: str
    turn_number: int
    parent_snapshot: str | None
    created_at: float
    namespace: str
    model_name: str
    num_layers: int
    model_type: str
    token_count: int
    pending_count: int
    durability: Durability
    world_size: int
    boundary_key: str
    bytes: int
    unique_bytes: int
    health: str | None
    user_metadata: dict[str, JsonValue]
    pinned: bool
    expires_at: float | None
    rid: str | None


@dataclass(frozen=True)
class SnapshotPage:
    """Some snapshots, oldest first; ``after`` is the cursor of the next page, None at the end."""

    snapshots: tuple[SnapshotRow, ...]
    after: str | None


@dataclass(frozen=True)
class ConversationRow:
    """One conversation. ``bytes`` counts a segment once, however many snapshots share it."""

    conversation_id: str
    snapshots: int
    branches: int
    newest_turn: int
    created_at: float
    updated_at: float
    bytes: int


@dataclass(frozen=True)
class BranchRow:
    """One branch of a conversation."""

    branch_name: str
    snapshots: int
    newest_turn: int
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class UnreferencedSegment:
    """A segment that no snapshot names any more."""

    shard: Shard
    segment_id: str
    bytes: int


@dataclass(frozen=True)
class CatalogCounts:
    """How much the catalog holds."""

    snapshots: int
    conversations: int
    segments: int
    segment_bytes: int


@dataclass
class OpenReport:
    """What opening the catalog had to heal."""

    rebuilt_because: str | None = None
    added: int = 0
    refreshed: int = 0
    removed: int = 0
    damaged: list[DamagedManifest] = field(default_factory=list)
    suspect: str | None = None
    """What was found wrong with the catalog after it was opened; the next start rebuilds it."""
