"""Conversations and snapshots as resources: listed, described, compared, branched, deleted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from engram.catalog.rows import ConversationRow, SnapshotRow
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.server.metadata import listed, summary
from engram.server.outcomes import continuation_in, restore_reply, save_reply
from engram.server.schemas import (
    BranchBody,
    CompareQuery,
    ContinueBody,
    ConversationsQuery,
    SaveBody,
    SnapshotsQuery,
)
from engram.server.wire import answering, body_of, query_of, read_body, read_query
from engram.service import SnapshotService


def browsing_router(service: SnapshotService) -> APIRouter:
    """The resource routes but for `PATCH`."""
    routes = _Routes(service)
    router = APIRouter(tags=["snapshots"])
    one, conversation = "/v1/snapshots/{snapshot_id}", "/v1/conversations/{conversation_id}"
    table: tuple[tuple[str, str, Any, type[BaseModel] | None], ...] = (
        ("GET", "/v1/conversations", routes.conversations, ConversationsQuery),
        ("GET", conversation, routes.conversation, None),
        ("DELETE", conversation, routes.delete_conversation, None),
        ("GET", f"{conversation}/tree", routes.tree, None),
        ("GET", "/v1/snapshots", routes.snapshots, SnapshotsQuery),
        ("GET", one, routes.snapshot, None),
        ("DELETE", one, routes.delete_snapshot, None),
        ("GET", f"{one}/compare", routes.compare, CompareQuery),
        ("GET", "/v1/requests/{rid}", routes.explain, None),
        ("POST", "/v1/snapshots", routes.save, SaveBody),
        ("POST", f"{one}/restore", routes.restore, ContinueBody),
        ("POST", f"{one}/branch", routes.branch, BranchBody),
    )
    for method, path, handler, schema in table:
        about = query_of if method == "GET" else body_of
        router.add_api_route(
            path,
            answering(handler),
            methods=[method],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            openapi_extra=None if schema is None else about(schema),
        )
    return router


class _Routes:
    def __init__(self, service: SnapshotService) -> None:
        self._service = service

    async def conversations(self, request: Request) -> dict[str, Any]:
        """List conversations by id, a page at a time."""
        query = read_query(request, ConversationsQuery)
        page = await self._service.browser.conversations(DEFAULT_TENANT, query.limit, query.after)
        return {
            "success": True,
            "conversations": [_conversation(row) for row in page.conversations],
            "after": page.after,
        }

    async def conversation(self, request: Request) -> dict[str, Any]:
        """Describe one conversation."""
        name = _path_id(request, "conversation_id")
        row = await self._service.browser.conversation(DEFAULT_TENANT, name)
        priority = await self._service.context.conversations.priority(DEFAULT_TENANT, name)
        return {"success": True, **_conversation(row), "priority": priority}

    async def delete_conversation(self, request: Request) -> dict[str, Any]:
        """Delete all snapshots of a conversation, and the bytes that no other shares."""
        name = _path_id(request, "conversation_id")
        rows = await self._service.list(DEFAULT_TENANT, name)
        # The newest first: what is left after an interruption is a whole conversation.
        for row in reversed(rows):
            await self._service.delete(row)
        return {
            "success": True,
            "conversation_id": name,
            "snapshots": len(rows),
            "message": f"deleted {len(rows)} snapshots of {name}",
        }

    async def tree(self, request: Request) -> dict[str, Any]:
        """The turns and branches of a conversation, parents before children."""
        name = _path_id(request, "conversation_id")
        rows = await self._service.list(DEFAULT_TENANT, name)
        tree = await self._service.browser.tree(DEFAULT_TENANT, rows)
        return {
            "success": True,
            "conversation_id": name,
            "branches": [
                {"branch_name": one.branch_name, "snapshots": one.snapshots}
                | {"newest_turn": one.newest_turn, "created_at": one.created_at}
                | {"updated_at": one.updated_at}
                for one in tree.branches
            ],
            "snapshots": [summary(row) for row in tree.snapshots],
        }

    async def snapshots(self, request: Request) -> dict[str, Any]:
        """List snapshots, oldest first, a page at a time."""
        query = read_query(request, SnapshotsQuery)
        page = await self._service.browser.snapshots(
            DEFAULT_TENANT, query.conversation_id, query.branch, query.limit, query.after
        )
        return {
            "success": True,
            "snapshots": [summary(row) for row in page.snapshots],
            "after": page.after,
        }

    async def snapshot(self, request: Request) -> dict[str, Any]:
        """Describe one snapshot, its recorded tokens included."""
        row = await self._row(_path_id(request, "snapshot_id"))
        return {"success": True, "metadata": await listed(self._service, row)}

    async def delete_snapshot(self, request: Request) -> dict[str, Any]:
        """Delete one snapshot, and the bytes that no other snapshot shares."""
        row = await self._row(_path_id(request, "snapshot_id"))
        await self._service.delete(row)
        return {
            "success": True,
            "snapshot_id": row.snapshot_id,
            "message": f"deleted {row.snapshot_id}",
        }

    async def save(self, request: Request) -> dict[str, Any]:
        """Save a turn of a conversation, or a finished request, as a snapshot."""
        body = await read_body(request, SaveBody)
        return save_reply(await self._service.save(tenant=DEFAULT_TENANT, **body.model_dump()))

    async def restore(self, request: Request) -> dict[str, Any]:
        """Bring a snapshot into memory, verified; with create_new_request, generate from it."""
        row = await self._row(_path_id(request, "snapshot_id"))
        continuation = continuation_in(await read_body(request, ContinueBody))
        return restore_reply(await self._service.restore(row, continuation))

    async def branch(self, request: Request) -> dict[str, Any]:
        """Make a snapshot the start of a branch, or of a new conversation; no state is copied."""
        row = await self._row(_path_id(request, "snapshot_id"))
        body = await read_body(request, BranchBody)
        return save_reply(await self._service.brancher.branch(row, **body.model_dump()))

    async def compare(self, request: Request) -> dict[str, Any]:
        """Say where two snapshots part, and how many bytes they share."""
        one = await self._row(_path_id(request, "snapshot_id"))
        other = await self._row(read_query(request, CompareQuery).to)
        found = await self._service.browser.compare(one, other)
        return {
            "success": True,
            "common_tokens": found.common_tokens,
            "shared_bytes": found.shared_bytes,
            "snapshots": [summary(found.one), summary(found.other)],
        }

    async def explain(self, request: Request) -> dict[str, Any]:
        """Say why so many tokens of a finished request were cached."""
        found = await self._service.explainer.explain(DEFAULT_TENANT, request.path_params["rid"])
        served, tag = found.served, found.served.tag
        return {
            "success": True,
            "rid": served.rid,
            "conversation_id": None if tag is None else tag.conversation_id,
            "branch_name": None if tag is None else tag.branch_name,
            "turn_number": found.turn_number,
            "prompt_tokens": served.prompt_tokens,
            "cached_tokens": served.cached_tokens,
            "vram_tokens": served.vram_tokens,
            "ram_tokens": served.ram_tokens,
            "fetched_tokens": served.fetched_tokens,
            "fetched_from": served.fetched_from,
            "problem": served.problem,
            "earlier": None if found.earlier is None else asdict(found.earlier),
        }

    async def _row(self, snapshot_id: str) -> SnapshotRow:
        return await self._service.get(DEFAULT_TENANT, snapshot_id)


def _path_id(request: Request, name: str) -> str:
    return check_id(name, request.path_params[name])


def _conversation(row: ConversationRow) -> dict[str, Any]:
    return {
        "conversation_id": row.conversation_id,
        "snapshots": row.snapshots,
        "branches": row.branches,
        "newest_turn": row.newest_turn,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "bytes": row.bytes,
    }
