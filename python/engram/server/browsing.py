"""Looking through what is stored: `GET` on conversations, trees and snapshots; `DELETE`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from engram.catalog.rows import ConversationRow, SnapshotRow
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.server.metadata import listed, summary
from engram.server.schemas import CompareQuery, ConversationsQuery, SnapshotsQuery
from engram.server.wire import answering, query_of, read_query
from engram.service import SnapshotService


def browsing_router(service: SnapshotService) -> APIRouter:
    """The resource routes that list, describe, compare and delete."""
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
    )
    for method, path, handler, schema in table:
        router.add_api_route(
            path,
            answering(handler),
            methods=[method],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            openapi_extra=None if schema is None else query_of(schema),
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
