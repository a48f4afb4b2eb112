"""The five routes of the published Engram fork, done right; `docs/compatibility.md` says how.

`POST` and JSON all of them.  Success is 200 with ``success: true``; a failure has ``success:
false``, ``error``, ``message`` and ``hint``, and the status of its kind of error.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from engram.catalog.rows import SnapshotRow
from engram.core.ids import DEFAULT_TENANT
from engram.server.metadata import listed, metadata_of
from engram.server.schemas import ListBody, Place, RestoreBody, SaveBody
from engram.server.wire import answering, body_of, read_body
from engram.service import SnapshotService
from engram.service.restores import Continuation
from engram.service.results import RestoreResult, SaveResult


def compatible_router(service: SnapshotService) -> APIRouter:
    """`/save_snapshot`, `/restore_snapshot`, `/list_snapshots`, `/get_snapshot_info`,
    `/delete_snapshot`."""
    routes = _Routes(service)
    router = APIRouter(tags=["snapshots"])
    for path, handler, schema in (
        ("/save_snapshot", routes.save, SaveBody),
        ("/restore_snapshot", routes.restore, RestoreBody),
        ("/list_snapshots", routes.list, ListBody),
        ("/get_snapshot_info", routes.info, Place),
        ("/delete_snapshot", routes.delete, Place),
    ):
        router.add_api_route(
            path,
            answering(handler),
            methods=["POST"],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            openapi_extra=body_of(schema),
        )
    return router


class _Routes:
    def __init__(self, service: SnapshotService) -> None:
        self._service = service

    async def save(self, request: Request) -> dict[str, Any]:
        """Save a turn of a conversation, or a finished request, as a snapshot."""
        body = await read_body(request, SaveBody)
        result = await self._service.save(
            tenant=DEFAULT_TENANT,
            conversation_id=body.conversation_id,
            rid=body.rid,
            snapshot_id=body.snapshot_id,
            turn_number=body.turn_number,
            branch_name=body.branch_name,
            durability=body.durability,
        )
        return _save_reply(result)

    async def restore(self, request: Request) -> dict[str, Any]:
        """Bring a snapshot into memory, verified; with create_new_request, generate from it."""
        body = await read_body(request, RestoreBody)
        row = await self._service.find(
            tenant=DEFAULT_TENANT,
            conversation_id=body.conversation_id,
            rid=body.rid,
            turn_number=body.turn_number,
            branch_name=body.branch_name,
        )
        continuation = None
        if body.create_new_request:
            assert body.continuation_ids is not None
            params = {**(body.sampling_params or {}), "max_new_tokens": body.max_new_tokens}
            continuation = Continuation(body.continuation_ids, params, body.request_id)
        return _restore_reply(await self._service.restore(row, continuation))

    async def list(self, request: Request) -> dict[str, Any]:
        """List the snapshots of a conversation, oldest first."""
        body = await read_body(request, ListBody)
        rows = await self._service.list(DEFAULT_TENANT, body.conversation_id)
        return {"success": True, "snapshots": [await listed(self._service, row) for row in rows]}

    async def info(self, request: Request) -> dict[str, Any]:
        """Describe one snapshot, its recorded tokens included."""
        row = await self._at(await read_body(request, Place))
        tokens = await self._service.tokens(row)
        return {
            "success": True,
            "metadata": metadata_of(row, tokens, await self._service.tier(row)),
        }

    async def delete(self, request: Request) -> dict[str, Any]:
        """Delete one snapshot, and the bytes that no other snapshot shares."""
        row = await self._at(await read_body(request, Place))
        await self._service.delete(row)
        return {
            "success": True,
            "snapshot_id": row.snapshot_id,
            "message": f"deleted {_shown(row)}",
        }

    async def _at(self, place: Place) -> SnapshotRow:
        return await self._service.find(
            tenant=DEFAULT_TENANT,
            conversation_id=place.conversation_id,
            turn_number=place.turn_number,
            branch_name=place.branch_name,
        )


def _save_reply(result: SaveResult) -> dict[str, Any]:
    place = f"turn {result.turn_number} of {result.conversation_id}/{result.branch_name}"
    if result.existing:
        message = f"{place} was saved already"
    elif result.durability == "async":
        message = f"{place} is being saved"
    else:
        message = f"saved {place}: {result.token_count} tokens"
    if result.recomputed:
        message += "; its state was gone and was computed again from the recorded tokens"
    return {
        "success": True,
        "snapshot_id": result.snapshot_id,
        "message": message,
        "conversation_id": result.conversation_id,
        "branch_name": result.branch_name,
        "turn_number": result.turn_number,
        "token_count": result.token_count,
        "recompute_tokens": result.recompute_tokens,
        "bytes": result.bytes,
        "unique_bytes": result.unique_bytes,
        "durability": result.durability,
        "recomputed": result.recomputed,
        "elapsed_ms": round(result.elapsed_ms, 3),
    }


def _restore_reply(result: RestoreResult) -> dict[str, Any]:
    generation = result.generation
    return {
        "success": True,
        "rid": generation.rid if generation else None,
        "mamba_pool_idx": result.state_slot,
        "message": f"restored {_shown(result.snapshot)}: {result.token_count} tokens, "
        f"from {result.source_tier}",
        "token_count": result.token_count,
        "recompute_tokens": result.recompute_tokens,
        "output_ids": generation.output_ids if generation else None,
        "output_text": generation.text if generation else None,
        "finish_reason": generation.meta.get("finish_reason") if generation else None,
        "cached_tokens": generation.cached_tokens if generation else None,
        "snapshot_id": result.snapshot.snapshot_id,
        "conversation_id": result.snapshot.conversation_id,
        "branch_name": result.snapshot.branch_name,
        "turn_number": result.snapshot.turn_number,
        "source_tier": result.source_tier,
        "tier": result.tier,
        "verified": result.verified,
        "bytes": result.bytes,
        "elapsed_ms": round(result.elapsed_ms, 3),
    }


def _shown(row: SnapshotRow) -> str:
    return f"turn {row.turn_number} of {row.conversation_id}/{row.branch_name}"
