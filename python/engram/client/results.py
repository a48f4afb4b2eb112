"""What the server answers, typed.  Sizes are bytes, times seconds since the epoch.

A field that a newer server adds is left out; one that is missing is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

Tier = Literal["vram", "ram", "disk", "remote"]
Durability = Literal["sync", "async"]


class Result(BaseModel):
    """The base of all: read-only."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class LayerConfig(Result):
    """The model's layers, for people."""

    num_layers: int
    model_type: str


class SnapshotSummary(Result):
    """One snapshot as lists have it."""

    snapshot_id: str
    conversation_id: str
    branch_name: str
    turn_number: int
    parent_snapshot: str | None
    created_at: float
    token_count: int
    """The boundary: tokens that the saved state covers."""
    recompute_tokens: int
    """Recorded tokens past the boundary, which the next turn computes."""
    bytes: int
    unique_bytes: int
    durability: Durability
    model_name: str
    layer_config: LayerConfig
    namespace: str
    pinned: bool
    expires_at: float | None
    user_metadata: dict[str, JsonValue]
    rid: str | None
    health: str | None


class Snapshot(SnapshotSummary):
    """One snapshot with its tokens."""

    fill_ids: list[int] | None
    """All recorded tokens, those past the boundary included; None if they cannot be read."""
    tier: Tier
    """The fastest tier that holds it now."""
    damaged: str | None
    """What is wrong with its files, if anything."""


class SnapshotPage(Result):
    """Some snapshots, oldest first; `after` is the cursor of the next page, None at the end."""

    snapshots: list[SnapshotSummary]
    after: str | None


class ConversationSummary(Result):
    """One conversation; `bytes` counts a file once, however many snapshots share it."""

    conversation_id: str
    snapshots: int
    branches: int
    newest_turn: int
    created_at: float
    updated_at: float
    bytes: int


class ConversationPage(Result):
    """Some conversations by id; `after` is the cursor of the next page, None at the end."""

    conversations: list[ConversationSummary]
    after: str | None


class Branch(Result):
    """One branch of a conversation."""

    branch_name: str
    snapshots: int
    newest_turn: int
    created_at: float
    updated_at: float


class ConversationDetails(Result):
    """One conversation, its branches by name, and what it is worth (0 to 100).

    Of one of which no turn is saved yet there are no snapshots and no times.
    """

    conversation_id: str
    snapshots: int
    branches: list[Branch]
    newest_turn: int
    created_at: float | None
    updated_at: float | None
    bytes: int
    priority: int


class TreePage(Result):
    """Some turns of a conversation, oldest first; `after` is the cursor of the next page."""

    conversation_id: str
    branches: list[Branch]
    turns: list[SnapshotSummary]
    after: str | None


class Tree(Result):
    """A conversation: its branches by name, its snapshots, oldest first."""

    conversation_id: str
    branches: list[Branch]
    snapshots: list[SnapshotSummary]

    def children(self, snapshot_id: str | None) -> list[SnapshotSummary]:
        """The snapshots that go on from this one; without one, the beginnings."""
        known = {one.snapshot_id for one in self.snapshots}
        return [
            one
            for one in self.snapshots
            if (one.parent_snapshot if one.parent_snapshot in known else None) == snapshot_id
        ]


class Comparison(Result):
    """Two snapshots: recorded tokens that both begin with, bytes of files that both stand on."""

    common_tokens: int
    shared_bytes: int
    snapshots: tuple[SnapshotSummary, SnapshotSummary]


class Saved(Result):
    """What a save acknowledged; with durability "async" `bytes` are not known yet."""

    snapshot_id: str
    conversation_id: str
    branch_name: str
    turn_number: int
    token_count: int
    recompute_tokens: int
    bytes: int | None
    unique_bytes: int | None
    durability: Durability
    recomputed: bool
    elapsed_ms: float
    message: str


class Restored(Result):
    """What a restore did; the fields from `rid` on are those of a new request."""

    snapshot_id: str
    conversation_id: str
    branch_name: str
    turn_number: int
    token_count: int
    recompute_tokens: int
    source_tier: Tier
    tier: Tier
    verified: bool
    bytes: int
    elapsed_ms: float
    message: str
    mamba_pool_idx: int | None = None
    rid: str | None = None
    output_ids: list[int] | None = None
    output_text: str | None = None
    finish_reason: dict[str, Any] | None = None
    cached_tokens: int | None = None


class Exported(Result):
    """A snapshot is in a file on this side."""

    path: Path
    bytes: int


class Imported(Result):
    """The snapshots of a file are stored; `new_bytes` of its `bytes` were not there before."""

    snapshots: list[SnapshotSummary]
    bytes: int
    new_bytes: int
    message: str


class Deleted(Result):
    """One snapshot is gone."""

    snapshot_id: str
    message: str


class ConversationDeleted(Result):
    """All snapshots of a conversation are gone."""

    conversation_id: str
    snapshots: int
    message: str


class Changed(Result):
    """What may change of a snapshot, as it is now."""

    snapshot_id: str
    pinned: bool
    expires_at: float | None
    user_metadata: dict[str, JsonValue]
    message: str


class Prioritised(Result):
    """What a conversation is worth now, from 0 to 100."""

    conversation_id: str
    priority: int
    message: str


class Promoted(Result):
    """A snapshot is in RAM now."""

    snapshot_id: str
    source_tier: Tier
    tier: Tier
    bytes: int
    message: str


class Demoted(Result):
    """How many snapshots were meant, and the bytes that left RAM."""

    snapshots: int
    bytes: int
    message: str


class Pinned(Result):
    """A branch is kept in VRAM, from its next turn on if it is not `resident` now."""

    conversation_id: str
    branch_name: str
    resident: bool
    message: str


class Unpinned(Result):
    """Whether the branch was pinned in VRAM."""

    unpinned: bool
    message: str


class VramPin(Result):
    """A branch that is kept in VRAM."""

    conversation_id: str
    branch_name: str
    resident: bool


class VramTier(Result):
    """What SGLang's tree holds."""

    capacity_bytes: int
    bytes: int
    tokens: int
    states: int
    pinned_bytes: int
    pin_budget_bytes: int
    pins: list[VramPin]


class RamTier(Result):
    """What the RAM pools hold; counters are since the server's start."""

    capacity_bytes: int
    bytes: int
    held_bytes: int
    segments: int
    conversations: int
    pinned_bytes: int
    captured: int
    promoted_bytes: int
    persisted_bytes: int
    evicted: int
    demoted: int


class DiskTier(Result):
    """What lies in the store; `capacity_bytes` is the quota, None without one."""

    capacity_bytes: int | None
    free_bytes: int | None
    bytes: int
    segments: int
    named_bytes: int
    snapshots: int
    conversations: int


class Tiers(Result):
    """What each tier holds now."""

    vram: VramTier
    ram: RamTier
    disk: DiskTier


class Difference(Result):
    """The first token that differs: its place, and the ids that were recorded and sent."""

    position: int
    recorded: int
    sent: int


class Earlier(Result):
    """The turn that a prompt should have gone on from; `common_tokens` of its `tokens` begin it."""

    branch_name: str
    turn_number: int
    snapshot_id: str | None
    token_count: int | None
    tokens: int
    common_tokens: int
    difference: Difference | None


class Explanation(Result):
    """Why so many tokens of a request were cached; the fields are those of the HTTP API."""

    rid: str
    conversation_id: str | None
    branch_name: str | None
    turn_number: int | None
    prompt_tokens: int
    cached_tokens: int
    vram_tokens: int | None
    ram_tokens: int | None
    fetched_tokens: int
    fetched_from: Tier | None
    problem: str | None
    earlier: Earlier | None


class Prefix(Result):
    """A named beginning of prompts; `usable`: made by what the server runs now."""

    name: str
    token_count: int
    bytes: int
    unique_bytes: int
    snapshot_id: str
    created_at: float
    expires_at: float | None
    usable: bool


class PrefixPage(Result):
    """Some prefixes by name; `after` is the cursor of the next page, None at the end."""

    prefixes: list[Prefix]
    after: str | None


class PrefixDeleted(Result):
    """A prefix is gone."""

    name: str
    message: str
