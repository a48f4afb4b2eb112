"""The tools every server has: memory, checkpoints, branches, arithmetic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from engram.agents.calculator import calculate
from engram.agents.memory import MemoryStore
from engram.agents.requests import Id
from engram.agents.tool import Tool, ToolContext, make_tool
from engram.catalog.rows import SnapshotRow
from engram.core.ids import DEFAULT_TENANT, MAX_ID_LENGTH
from engram.errors import InvalidRequestError
from engram.service import SnapshotService

Conversation = Annotated[Id | None, Field(max_length=MAX_ID_LENGTH)]
Branch = Annotated[Id | None, Field(max_length=MAX_ID_LENGTH)]
Turn = Annotated[int | None, Field(ge=1, lt=2**63)]

SHOWN_TOKENS = 512
"""Of each side of a comparison, from where they part."""


def built_in_tools(
    service: SnapshotService, memory: MemoryStore, decode: Callable[[list[int]], str]
) -> list[Tool]:
    """The tools; they run in the server's process and are trusted.

    `decode` turns tokens into text.
    """
    memories, checkpoints = _MemoryTools(memory), _CheckpointTools(service, decode)

    def made(function: Callable[..., Awaitable[Any]], *tags: str, idempotent: bool = True) -> Tool:
        return make_tool(
            function, tags=("built-in", *tags), idempotent=idempotent, isolated=False, timeout=600.0
        )

    return [
        made(memories.memory_store, "memory"),
        made(memories.memory_recall, "memory"),
        made(memories.memory_search, "memory"),
        made(checkpoints.checkpoint_save, "checkpoint"),
        made(checkpoints.checkpoint_list, "checkpoint"),
        made(checkpoints.checkpoint_restore, "checkpoint"),
        made(checkpoints.conversation_branch, "conversation"),
        made(checkpoints.conversation_compare, "conversation"),
        made(calculator, "math"),
    ]


async def calculator(expression: Annotated[str, Field(max_length=1000)]) -> int | float:
    """Compute an arithmetic expression.

    Args:
        expression: numbers, + - * / // % **, parentheses, and functions such as sqrt, log, sin,
            min, max, round, factorial.
    """
    return calculate(expression)


class _MemoryTools:
    def __init__(self, memory: MemoryStore) -> None:
        self._memory = memory

    async def memory_store(
        self,
        context: ToolContext,
        key: Annotated[str, Field(max_length=255)],
        value: Annotated[str, Field(max_length=65536)],
        category: Annotated[str | None, Field(max_length=64)] = None,
        scope: Literal["conversation", "owner"] = "conversation",
    ) -> dict[str, Any]:
        """Remember a value under a key, in place of what was remembered under it.

        Args:
            key: what to find it by.
            value: what to remember.
            category: a group that memory_search can be limited to.
            scope: whether it is for this conversation or for all of them.
        """
        conversation = context.conversation_id if scope == "conversation" else None
        stored = await self._memory.store(
            context.owner, key, value, category=category, conversation_id=conversation
        )
        return asdict(stored)

    async def memory_recall(
        self, context: ToolContext, key: Annotated[str, Field(max_length=255)]
    ) -> dict[str, Any]:
        """Recall what is remembered under a key.

        Args:
            key: what it was stored under.
        """
        found = await self._memory.recall(
            context.owner, key, conversation_id=context.conversation_id
        )
        return asdict(found)

    async def memory_search(
        self,
        context: ToolContext,
        query: Annotated[str, Field(max_length=1000)],
        category: Annotated[str | None, Field(max_length=64)] = None,
        limit: Annotated[int, Field(ge=1, le=100)] = 10,
    ) -> list[dict[str, Any]]:
        """Search what is remembered by words; the best match comes first.

        Args:
            query: words to look for; empty for all, the newest first.
            category: only memories of this group.
            limit: how many to return at most.
        """
        found = await self._memory.search(
            context.owner,
            query,
            category=category,
            conversation_id=context.conversation_id,
            limit=limit,
        )
        return [asdict(one) for one in found]


class _CheckpointTools:
    def __init__(self, service: SnapshotService, decode: Callable[[list[int]], str]) -> None:
        self._service = service
        self._decode = decode

    async def checkpoint_save(
        self,
        context: ToolContext,
        conversation_id: Conversation = None,
        branch_name: Branch = None,
        snapshot_id: Conversation = None,
    ) -> dict[str, Any]:
        """Save the newest turn of a conversation as a durable snapshot.

        Args:
            conversation_id: which conversation; this one if left out.
            branch_name: which branch; main if left out.
            snapshot_id: a name for the snapshot.
        """
        result = await self._service.save(
            tenant=DEFAULT_TENANT,
            conversation_id=conversation_of(context, conversation_id),
            branch_name=branch_name,
            snapshot_id=snapshot_id,
        )
        return {
            "snapshot_id": result.snapshot_id,
            "conversation_id": result.conversation_id,
            "branch_name": result.branch_name,
            "turn_number": result.turn_number,
            "token_count": result.token_count,
            "durability": result.durability,
            "existing": result.existing,
        }

    async def checkpoint_list(
        self, context: ToolContext, conversation_id: Conversation = None
    ) -> list[dict[str, Any]]:
        """List the snapshots of a conversation, oldest first.

        Args:
            conversation_id: which conversation; this one if left out.
        """
        where = conversation_of(context, conversation_id)
        return [shown(row) for row in await self._service.list(DEFAULT_TENANT, where)]

    async def checkpoint_restore(
        self,
        context: ToolContext,
        conversation_id: Conversation = None,
        turn_number: Turn = None,
        branch_name: Branch = None,
    ) -> dict[str, Any]:
        """Bring a snapshot into memory, verified, so that going on from it computes nothing again.

        Args:
            conversation_id: which conversation; this one if left out.
            turn_number: which turn; the newest if left out.
            branch_name: which branch; main if left out.
        """
        row = await self._find(context, conversation_id, branch_name, turn_number)
        result = await self._service.restore(row)
        return {
            **shown(row),
            "source_tier": result.source_tier,
            "tier": result.tier,
            "verified": result.verified,
            "bytes": result.bytes,
        }

    async def conversation_branch(
        self,
        context: ToolContext,
        branch_name: Annotated[Id, Field(max_length=MAX_ID_LENGTH)],
        conversation_id: Conversation = None,
        turn_number: Turn = None,
    ) -> dict[str, Any]:
        """Begin a branch at a turn of a conversation.  No state is copied.

        Args:
            branch_name: its name.
            conversation_id: which conversation; this one if left out.
            turn_number: the turn of main it begins at; the newest if left out.
        """
        result = await self._service.save(
            tenant=DEFAULT_TENANT,
            conversation_id=conversation_of(context, conversation_id),
            turn_number=turn_number,
            branch_name=branch_name,
        )
        return {
            "snapshot_id": result.snapshot_id,
            "conversation_id": result.conversation_id,
            "branch_name": result.branch_name,
            "turn_number": result.turn_number,
            "token_count": result.token_count,
            "existing": result.existing,
        }

    async def conversation_compare(
        self,
        context: ToolContext,
        other_conversation_id: Conversation = None,
        other_branch_name: Branch = None,
        other_turn_number: Turn = None,
        conversation_id: Conversation = None,
        branch_name: Branch = None,
        turn_number: Turn = None,
    ) -> dict[str, Any]:
        """Compare two snapshots: how far they are equal, and what follows in each.

        Args:
            other_conversation_id: the other one's conversation; the same if left out.
            other_branch_name: the other one's branch; main if left out.
            other_turn_number: the other one's turn; the newest if left out.
            conversation_id: the first one's conversation; this one if left out.
            branch_name: the first one's branch; main if left out.
            turn_number: the first one's turn; the newest if left out.
        """
        first = await self._find(context, conversation_id, branch_name, turn_number)
        second = await self._find(
            context,
            other_conversation_id or first.conversation_id,
            other_branch_name,
            other_turn_number,
        )
        one, other = [await self._service.tokens(row) for row in (first, second)]
        shorter = min(len(one), len(other))
        differing = np.flatnonzero(one[:shorter] != other[:shorter])
        common = int(differing[0]) if len(differing) else shorter
        return {
            "common_tokens": common,
            "equal": common == len(one) == len(other),
            "first": {**shown(first), **self._rest(one, common)},
            "other": {**shown(second), **self._rest(other, common)},
        }

    def _rest(self, tokens: Any, common: int) -> dict[str, Any]:
        rest = tokens[common : common + SHOWN_TOKENS].tolist()
        return {
            "tokens": len(tokens),
            "differing_tokens": len(tokens) - common,
            "text": self._decode(rest),
            "text_is_cut": len(tokens) - common > SHOWN_TOKENS,
        }

    async def _find(
        self, context: ToolContext, conversation: str | None, branch: str | None, turn: int | None
    ) -> SnapshotRow:
        return await self._service.find(
            tenant=DEFAULT_TENANT,
            conversation_id=conversation_of(context, conversation),
            branch_name=branch,
            turn_number=turn,
        )


def shown(row: SnapshotRow) -> dict[str, Any]:
    """A snapshot as agents see it."""
    return {
        "snapshot_id": row.snapshot_id,
        "conversation_id": row.conversation_id,
        "branch_name": row.branch_name,
        "turn_number": row.turn_number,
        "token_count": row.token_count,
        "created_at": row.created_at,
        "pinned": row.pinned,
    }


def conversation_of(context: ToolContext, given: str | None) -> str:
    """The conversation a call means: the one it names, else the one it belongs to."""
    found = given or context.conversation_id
    if found is None:
        raise InvalidRequestError(
            "conversation_id is needed: the call belongs to no conversation",
            details={"field": "conversation_id"},
        )
    return found
