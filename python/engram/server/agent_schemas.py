"""Bodies of `/v1/agent/*`, and the messages of its WebSocket: closed, strict, and bounded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

from engram.server.schemas import Id, TurnNumber

ToolName = Annotated[str, Strict(), Field(min_length=1, max_length=64)]
Key = Annotated[str, Strict(), Field(min_length=1, max_length=255)]
Category = Annotated[str, Strict(), Field(min_length=1, max_length=64)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExecuteBody(_Closed):
    """`POST /v1/agent/tools/execute`."""

    tool: ToolName
    arguments: dict[str, Any] = {}
    conversation_id: Id | None = None


class MemoryStoreBody(_Closed):
    """`POST /v1/agent/memory/store`."""

    key: Key
    value: Annotated[str, Strict(), Field(max_length=65536)]
    category: Category | None = None
    conversation_id: Id | None = None


class MemoryKeyBody(_Closed):
    """`POST /v1/agent/memory/recall` and `/v1/agent/memory/delete`."""

    key: Key
    conversation_id: Id | None = None


class MemorySearchBody(_Closed):
    """`POST /v1/agent/memory/search`."""

    query: Annotated[str, Strict(), Field(max_length=1000)] = ""
    category: Category | None = None
    limit: Annotated[int, Strict(), Field(ge=1, le=100)] = 10
    conversation_id: Id | None = None


class CheckpointBody(_Closed):
    """`POST /v1/agent/conversations/checkpoint`."""

    conversation_id: Id
    branch_name: Id | None = None
    snapshot_id: Id | None = None


class RestorePlace(_Closed):
    """`POST /v1/agent/conversations/restore`."""

    conversation_id: Id
    turn_number: TurnNumber | None = None
    branch_name: Id | None = None


class BranchBody(_Closed):
    """`POST /v1/agent/conversations/branch`."""

    conversation_id: Id
    branch_name: Id
    turn_number: TurnNumber | None = None


class CompareBody(_Closed):
    """`POST /v1/agent/conversations/compare`."""

    conversation_id: Id
    branch_name: Id | None = None
    turn_number: TurnNumber | None = None
    other_conversation_id: Id | None = None
    other_branch_name: Id | None = None
    other_turn_number: TurnNumber | None = None


Topic = Literal[
    "memory_update",
    "run_event",
    "run_tokens",
    "tier_transition",
    "tool_error",
    "tool_progress",
    "tool_result",
    "tool_start",
]
"""As `engram.agents.events.TOPICS`."""
RequestId = Annotated[str, Strict(), Field(min_length=1, max_length=255)]


class ExecuteMessage(_Closed):
    """Run a tool; the answers carry `request_id`."""

    type: Literal["execute_tool"]
    tool: ToolName
    arguments: dict[str, Any] = {}
    conversation_id: Id | None = None
    request_id: RequestId | None = None


class SubscribeMessage(_Closed):
    """Hear of these events, in these conversations or runs; replaces what was subscribed to.

    None for events stands for all kinds; None for both others for all conversations and runs.
    """

    type: Literal["subscribe"]
    events: Annotated[list[Topic], Field(max_length=32)] | None = None
    conversation_ids: Annotated[list[Id], Field(max_length=1000)] | None = None
    run_ids: Annotated[list[Id], Field(max_length=1000)] | None = None


class PingMessage(_Closed):
    """Be answered with a heartbeat."""

    type: Literal["ping"]
    request_id: RequestId | None = None


SocketMessage = Annotated[
    ExecuteMessage | SubscribeMessage | PingMessage, Field(discriminator="type")
]
