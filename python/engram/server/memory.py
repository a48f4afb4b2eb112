"""`/v1/memory/*`: what the tiers hold, what was done, and what is moved by request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH, DEFAULT_TENANT
from engram.server.examples import described
from engram.server.schemas import BranchPlace, MemoryPlace
from engram.server.wire import answering, body_of, known_query, read_body
from engram.service import SnapshotService


def memory_router(service: SnapshotService) -> APIRouter:
    """The routes that let an operator look inside, and move what is in memory."""
    routes = _Routes(service)
    router = APIRouter(tags=["memory"])
    for path, handler, schema in (
        ("/v1/memory/tiers", routes.tiers, None),
        ("/v1/memory/health", routes.health, None),
        ("/v1/memory/promote", routes.promote, MemoryPlace),
        ("/v1/memory/demote", routes.demote, MemoryPlace),
        ("/v1/memory/pin", routes.pin, BranchPlace),
        ("/v1/memory/unpin", routes.unpin, BranchPlace),
    ):
        router.add_api_route(
            path,
            answering(handler),
            methods=["GET"] if schema is None else ["POST"],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            openapi_extra=None if schema is None else body_of(schema),
        )
    return described(router)


class _Routes:
    def __init__(self, service: SnapshotService) -> None:
        self._service = service

    async def health(self, request: Request) -> dict[str, Any]:
        """Counters of saves, restores, held requests and tiers, and the newest failures."""
        known_query(request)
        return {"success": True, **await self._service.stats()}

    async def tiers(self, request: Request) -> dict[str, Any]:
        """What VRAM, RAM and disk hold now, as it is found there."""
        known_query(request)
        return {"success": True, "tiers": await self._service.tiers()}

    async def promote(self, request: Request) -> dict[str, Any]:
        """Bring snapshots into RAM, verified: of a conversation the newest."""
        body = await read_body(request, MemoryPlace)
        rows = await self._rows(body)
        result = await self._service.restore(rows[-1])
        return {
            "success": True,
            "snapshot_id": result.snapshot.snapshot_id,
            "source_tier": result.source_tier,
            "tier": result.tier,
            "bytes": result.bytes,
            "message": f"{result.snapshot.snapshot_id} is in {result.tier}",
        }

    async def demote(self, request: Request) -> dict[str, Any]:
        """Let snapshots leave RAM, all of a conversation or of a branch; they stay on disk."""
        body = await read_body(request, MemoryPlace)
        rows = await self._rows(body)
        freed = await self._service.demote(rows)
        return {
            "success": True,
            "snapshots": len(rows),
            "bytes": freed,
            "message": f"{freed} bytes left RAM",
        }

    async def _rows(self, place: MemoryPlace) -> list[SnapshotRow]:
        """The snapshots that are meant, the newest last."""
        if place.snapshot_id is not None:
            return [await self._service.get(DEFAULT_TENANT, place.snapshot_id)]
        assert place.conversation_id is not None
        if place.turn_number is not None:
            return [
                await self._service.find(
                    tenant=DEFAULT_TENANT,
                    conversation_id=place.conversation_id,
                    turn_number=place.turn_number,
                    branch_name=place.branch_name,
                )
            ]
        rows = await self._service.list(DEFAULT_TENANT, place.conversation_id)
        if place.branch_name is None:
            return rows
        newest = await self._service.find(
            tenant=DEFAULT_TENANT,
            conversation_id=place.conversation_id,
            branch_name=place.branch_name,
        )
        return [row for row in rows if row.branch_name == newest.branch_name]

    async def pin(self, request: Request) -> dict[str, Any]:
        """Keep the newest state of a branch in VRAM, turn after turn."""
        tag = _tag(await read_body(request, BranchPlace))
        result = await self._service.pin(tag)
        where = "is" if result.resident else "will be, from its next turn on,"
        return {
            "success": True,
            "conversation_id": tag.conversation_id,
            "branch_name": tag.branch_name,
            "resident": result.resident,
            "message": f"{tag.conversation_id}/{tag.branch_name} {where} kept in VRAM",
        }

    async def unpin(self, request: Request) -> dict[str, Any]:
        """Let a branch leave VRAM again."""
        tag = _tag(await read_body(request, BranchPlace))
        unpinned = await self._service.unpin(tag)
        return {
            "success": True,
            "unpinned": unpinned,
            "message": f"{tag.conversation_id}/{tag.branch_name} is not pinned in VRAM",
        }


def _tag(place: BranchPlace) -> Tag:
    return Tag(place.conversation_id, place.branch_name or DEFAULT_BRANCH, DEFAULT_TENANT)
