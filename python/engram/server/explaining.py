"""Where two snapshots part, and why so many tokens of a request were cached."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from engram.core.ids import DEFAULT_TENANT, check_id
from engram.server.examples import described
from engram.server.replies import summary
from engram.server.wire import answering, page_of
from engram.service import SnapshotService


def explaining_router(service: SnapshotService) -> APIRouter:
    """`GET /v1/snapshots/{snapshot_id}/compare` and `GET /v1/requests/{rid}`."""
    routes = _Routes(service)
    router = APIRouter(tags=["snapshots"])
    to = {"name": "to", "in": "query", "required": True, "schema": {"type": "string"}}
    for path, handler, extra in (
        ("/v1/snapshots/{snapshot_id}/compare", routes.compare, {"parameters": [to]}),
        ("/v1/requests/{rid}", routes.explain, None),
    ):
        router.add_api_route(
            path,
            answering(handler),
            methods=["GET"],
            summary=(handler.__doc__ or "").strip(),
            openapi_extra=extra,
        )
    return described(router)


class _Routes:
    def __init__(self, service: SnapshotService) -> None:
        self._service = service

    async def compare(self, request: Request) -> dict[str, Any]:
        """Say where two snapshots part, and how many bytes they share."""
        page_of(request, frozenset({"to"}))
        names = (request.path_params["snapshot_id"], request.query_params.get("to"))
        one, other = [
            await self._service.get(DEFAULT_TENANT, check_id(field, name))
            for field, name in zip(("snapshot_id", "to"), names, strict=True)
        ]
        found = await self._service.explainer.compare(one, other)
        return {
            "success": True,
            "common_tokens": found.common_tokens,
            "shared_bytes": found.shared_bytes,
            "snapshots": [summary(one), summary(other)],
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
