"""The tools that explore: a model tries several ways on, compares them, and keeps one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from engram.agents.built_in import Branch, Conversation, Turn, conversation_of, shown
from engram.agents.exploring import Explorations
from engram.agents.requests import ExploreRequest, RunTask
from engram.agents.tool import Tool, ToolContext, make_tool

MAX_PROMPTS = 8
TIMEOUT_S = 600.0


def exploring_tools(explorations: Callable[[], Explorations]) -> list[Tool]:
    """The tools; `explorations` is asked when they are called, since runs know tools."""
    tools = _ExploringTools(explorations)
    return [
        make_tool(function, tags=("built-in", "conversation"), isolated=False, timeout=TIMEOUT_S)
        for function in (tools.conversation_explore, tools.conversation_keep)
    ]


class _ExploringTools:
    def __init__(self, explorations: Callable[[], Explorations]) -> None:
        self._explorations = explorations

    async def conversation_explore(
        self,
        context: ToolContext,
        prompts: Annotated[
            list[Annotated[str, Field(max_length=65536)]],
            Field(min_length=2, max_length=MAX_PROMPTS),
        ],
        conversation_id: Conversation = None,
        turn_number: Turn = None,
        branch_name: Branch = None,
        max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256,
    ) -> dict[str, Any]:
        """Try several ways on from one turn of a conversation, and compare the replies.

        Keep one of them with conversation_keep; what is not kept expires.

        Args:
            prompts: the messages to try, each on a branch of its own.
            conversation_id: which conversation; this one if left out.
            turn_number: the turn they begin at; the newest if left out.
            branch_name: the branch of that turn; main if left out.
            max_tokens: of each reply at most.
        """
        explorations = self._explorations()
        # Without tools: what a model explores cannot explore in its turn.
        tasks = [
            RunTask(messages=[{"role": "user", "content": prompt}], tools=[], max_tokens=max_tokens)
            for prompt in prompts
        ]
        request = ExploreRequest(
            conversation_id=conversation_of(context, conversation_id),
            branch_name=branch_name,
            turn_number=turn_number,
            branches=tasks,
        )
        made = await explorations.create(context.owner, request)
        try:
            await explorations.ended(context.owner, made)
        except asyncio.CancelledError:
            await explorations.drop(context.owner, made)
            raise
        return await explorations.get(context.owner, made)

    async def conversation_keep(
        self,
        context: ToolContext,
        exploration_id: Annotated[str, Field(max_length=255)],
        branch_name: Annotated[str, Field(max_length=255)],
    ) -> dict[str, Any]:
        """Keep one branch of an exploration, and drop the others.

        Args:
            exploration_id: as conversation_explore has told it.
            branch_name: the branch to keep.
        """
        kept = await self._explorations().keep(context.owner, exploration_id, branch_name)
        return {"kept": shown(kept.snapshot), "run_id": kept.run_id, "dropped": kept.dropped}
