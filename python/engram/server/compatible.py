"""The five routes of the published Engram fork, done right; `docs/compatibility.md` says how.

`POST` and JSON all of them.  Success is 200 with ``success: true``; a failure has ``success:
false``, a ``message``, the object ``error``, and the status of its kind of error.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from engram.catalog.rows import SnapshotRow
from engram.core.ids import DEFAULT_TENANT
from engram.errors import NotFoundError, SnapshotCorruptError, StoreError
from engram.server.examples import described
from engram.server.replies import metadata, restore_reply, save_reply, shown
from engram.server.schemas import ListBody, Place, RestoreBody, SaveBody
from engram.server.wire import answering, body_of, read_body
from engram.service import SnapshotService
from engram.service.restores import Continuation


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
    return described(router)


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
        return save_reply(result)

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
        return restore_reply(await self._service.restore(row, continuation))

    async def list(self, request: Request) -> dict[str, Any]:
        """List the snapshots of a conversation, oldest first."""
        body = await read_body(request, ListBody)
        rows = await self._service.list(DEFAULT_TENANT, body.conversation_id)
        return {"success": True, "snapshots": [await self._listed(row) for row in rows]}

    async def info(self, request: Request) -> dict[str, Any]:
        """Describe one snapshot, its recorded tokens included."""
        row = await self._at(await read_body(request, Place))
        tokens = await self._service.tokens(row)
        return {"success": True, "metadata": metadata(row, tokens, await self._service.tier(row))}

    async def delete(self, request: Request) -> dict[str, Any]:
        """Delete one snapshot, and the bytes that no other snapshot shares."""
        row = await self._at(await read_body(request, Place))
        await self._service.delete(row)
        return {
            "success": True,
            "snapshot_id": row.snapshot_id,
            "message": f"deleted {shown(row)}",
        }

    async def _at(self, place: Place) -> SnapshotRow:
        return await self._service.find(
            tenant=DEFAULT_TENANT,
            conversation_id=place.conversation_id,
            turn_number=place.turn_number,
            branch_name=place.branch_name,
        )

    async def _listed(self, row: SnapshotRow) -> dict[str, Any]:
        """The metadata of one snapshot among others, which its damage must not hide."""
        try:
            tokens = await self._service.tokens(row)
            return metadata(row, tokens, await self._service.tier(row))
        except (SnapshotCorruptError, NotFoundError, StoreError) as error:
            return metadata(row, None, "disk", damaged=error.message)
