"""What clients change of snapshots and conversations: `PATCH` on the resource itself."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from engram.core.ids import DEFAULT_TENANT, check_id
from engram.server.examples import described
from engram.server.schemas import ConversationPatch, SnapshotPatch
from engram.server.wire import answering, body_of, read_body
from engram.service import SnapshotService


def resources_router(service: SnapshotService) -> APIRouter:
    """`PATCH /v1/snapshots/{snapshot_id}` and `PATCH /v1/conversations/{conversation_id}`."""

    async def snapshot(request: Request) -> dict[str, Any]:
        """Pin a snapshot, say when it expires, or give it metadata."""
        snapshot_id = check_id("snapshot_id", request.path_params["snapshot_id"])
        body = await read_body(request, SnapshotPatch)
        fields = body.model_dump(include=body.model_fields_set - {"ttl_seconds"})
        if body.ttl_seconds is not None:
            fields["expires_at"] = time.time() + body.ttl_seconds
        row = await service.change(DEFAULT_TENANT, snapshot_id, **fields)
        return {
            "success": True,
            "snapshot_id": row.snapshot_id,
            "pinned": row.pinned,
            "expires_at": row.expires_at,
            "user_metadata": row.user_metadata,
            "message": f"changed {', '.join(sorted(fields))}",
        }

    async def conversation(request: Request) -> dict[str, Any]:
        """Say what a conversation is worth."""
        conversation_id = check_id("conversation_id", request.path_params["conversation_id"])
        body = await read_body(request, ConversationPatch)
        await service.set_priority(DEFAULT_TENANT, conversation_id, body.priority)
        return {
            "success": True,
            "conversation_id": conversation_id,
            "priority": body.priority,
            "message": f"the priority of {conversation_id} is {body.priority}",
        }

    router = APIRouter(tags=["snapshots"])
    for path, handler, schema in (
        ("/v1/snapshots/{snapshot_id}", snapshot, SnapshotPatch),
        ("/v1/conversations/{conversation_id}", conversation, ConversationPatch),
    ):
        router.add_api_route(
            path,
            answering(handler),
            methods=["PATCH"],
            summary=(handler.__doc__ or "").strip(),
            openapi_extra=body_of(schema),
        )
    return described(router)
