"""What an operator can set: one field a flag, with its bounds.

The flags themselves, their help and which of them are active yet are in
`engram.sglang_plugin.args`; `docs/flags.md` explains them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Gigabytes = Annotated[float, Field(gt=0, le=1e9)]
"""An exabyte at most, so that it is a number of bytes."""


class Settings(BaseModel):
    """Settings of the snapshot subsystem; times are seconds, sizes GB are 10^9 bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enable_snapshot_persistence: bool = False
    snapshot_dir: str = "./sglang_snapshots"
    snapshot_retention_count: Count = 10
    snapshot_trigger_policy: Literal[
        "every_turn", "every_n_turns", "on_tool_call", "manual_only"
    ] = "every_turn"
    snapshot_every_n_turns: Count = 5
    snapshot_min_interval_seconds: NotNegative = 1.0
    snapshot_point_interval: Annotated[int, Field(ge=0)] = 0
    snapshot_keep_named_branches: bool = True
    snapshot_auto_restore: bool = True
    snapshot_health_check_interval: Annotated[int, Field(ge=0)] = 0
    snapshot_health_failure_policy: Literal["skip_snapshot", "log_and_continue"] = "skip_snapshot"
    enable_memory_tiers: bool = True
    max_warm_conversations: Count = 100
    max_warm_memory_gb: Gigabytes = 10.0
    conversation_active_timeout: Positive = 300.0
    conversation_warm_timeout: Positive = 1800.0
    conversation_cold_retention: Positive = 604_800.0
    enable_cross_session_refs: bool = True
    enable_tier_background_cleanup: bool = True
    tier_cleanup_interval: Positive = 60.0
    enable_agent_tools: bool = False
    agent_tool_timeout: Positive = 30.0
    agent_max_iterations: Count = 10
    agent_max_tool_calls_per_iteration: Count = 5
    snapshot_durability: Literal["sync", "async"] = "async"
    snapshot_disk_quota_gb: Gigabytes | None = None
    snapshot_pin_budget_gb: Gigabytes | None = None
    snapshot_promote_timeout: NotNegative = 10.0
    snapshot_encryption_key_file: str | None = None
    snapshot_link_by_prefix: bool = False
    snapshot_tenants: str | None = None
    agent_tools_module: str | None = None
    snapshot_remote: str | None = None
    snapshot_verify_weights: Literal["fast", "full"] = "fast"

    @property
    def max_warm_bytes(self) -> int:
        """Capacity of the RAM tier in bytes."""
        return int(self.max_warm_memory_gb * 1e9)

    @property
    def pin_budget_bytes(self) -> int | None:
        """Bytes of VRAM that pins may hold; None for a share of the pool."""
        return (
            None if self.snapshot_pin_budget_gb is None else int(self.snapshot_pin_budget_gb * 1e9)
        )
