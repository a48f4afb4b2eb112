"""`GET /v1/memory/health`: what the subsystem has done and where it failed, since start."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from engram.server.wire import answering
from engram.service import SnapshotService


def memory_router(service: SnapshotService) -> APIRouter:
    """The routes that let an operator look inside."""

    async def health(request: Request) -> dict[str, Any]:
        """Counters of saves, restores, held requests and tiers, and the newest failures."""
        return {"success": True, **await service.stats()}

    router = APIRouter(tags=["memory"])
    router.add_api_route(
        "/v1/memory/health",
        answering(health),
        methods=["GET"],
        summary=(health.__doc__ or "").strip(),
    )
    return router
