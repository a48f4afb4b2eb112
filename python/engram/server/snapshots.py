"""`/v1/snapshots` and `/v1/conversations`: what is stored, as resources."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from engram.catalog.rows import SnapshotRow
from engram.core.ids import DEFAULT_TENANT, check_id
from engram.errors import BodyTooLargeError, EngramError, InternalError, NotFoundError
from engram.server.examples import ERROR_REPLY, LISTED, METADATA, SAVED, described, reply
from engram.server.replies import metadata, restore_reply, save_reply, shown, summary
from engram.server.schemas import SaveBody, SnapshotBranch, SnapshotRestore
from engram.server.tagging import HELD
from engram.server.wire import answering, body_of, error_response, page_of, paged, read_body
from engram.service import SnapshotService
from engram.service.finder import check_not_reserved
from engram.service.restores import Continuation
from engram.upkeep.importing import Names

logger = logging.getLogger(__name__)

MAX_ARCHIVE_BYTES: Final = 1 << 40
"""Of an archive that is imported; the room on the disk is what bounds it before."""
ARCHIVE: Final = "application/octet-stream"

CONVERSATION: Final = {
    "conversation_id": "trip",
    "snapshots": 3,
    "branches": 1,
    "newest_turn": 3,
    "created_at": 1760000000.5,
    "updated_at": 1760000100.5,
    "bytes": 2097152,
}


def snapshots_router(service: SnapshotService) -> APIRouter:
    """The routes of snapshots and conversations as resources, all but what `PATCH` changes."""
    routes = _Routes(service)
    router = APIRouter(tags=["snapshots"])
    done = {"success": True, "message": "done"}
    one, all_of = "/v1/snapshots/{snapshot_id}", "/v1/conversations/{conversation_id}"
    snapshots = {"success": True, "snapshots": [LISTED], "after": None}
    for method, path, handler, schema, example in (
        ("POST", "/v1/snapshots", routes.save, SaveBody, SAVED),
        ("GET", "/v1/snapshots", routes.list, None, snapshots),
        ("GET", one, routes.info, None, {"success": True, "snapshot": METADATA}),
        ("DELETE", one, routes.delete, None, done),
        ("POST", one + "/restore", routes.restore, SnapshotRestore, done),
        ("POST", one + "/branch", routes.branch, SnapshotBranch, SAVED),
        (
            "GET",
            "/v1/conversations",
            routes.conversations,
            None,
            {"success": True, "conversations": [CONVERSATION], "after": None},
        ),
        ("GET", all_of, routes.conversation, None, {"success": True, **CONVERSATION}),
        ("DELETE", all_of, routes.forget, None, {**done, "snapshots": 3}),
        (
            "GET",
            all_of + "/tree",
            routes.tree,
            None,
            {"success": True, "conversation_id": "trip", "turns": [LISTED], "after": None},
        ),
    ):
        extra = None if schema is None else body_of(schema)
        if handler in (routes.list, routes.conversations, routes.tree):
            extra = {"parameters": [*PARAMETERS.get(path, ()), *paged()]}
        router.add_api_route(
            path,
            answering(handler),
            methods=[method],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            responses={200: reply("Success.", example), 404: ERROR_REPLY, 422: ERROR_REPLY},
            openapi_extra=extra,
        )

    async def export(request: Request) -> Response:
        # A function: SGLang marks endpoints with their level of authentication.
        return await routes.export(request)

    router.add_api_route(
        one + "/export",
        export,
        methods=["GET"],
        summary="Download a snapshot, with all it stands on, as one file.",
        response_class=Response,
        responses={200: {"content": {ARCHIVE: {}}}, 404: ERROR_REPLY, 409: ERROR_REPLY},
    )
    router.add_api_route(
        "/v1/snapshots/import",
        answering(routes.take),
        methods=["POST"],
        summary=(routes.take.__doc__ or "").strip().splitlines()[0],
        responses={
            200: reply("Success.", {"success": True, "snapshots": [LISTED], "new_bytes": 2097152}),
            409: ERROR_REPLY,
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {ARCHIVE: {}}},
            "parameters": [_query("conversation_id"), _query("snapshot_id")],
        },
    )
    return described(router)


def _query(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "string"}}


PARAMETERS: Final = {"/v1/snapshots": [_query("conversation_id"), _query("branch")]}


class _Routes:
    def __init__(self, service: SnapshotService) -> None:
        self._service = service

    async def _named(self, request: Request) -> SnapshotRow:
        snapshot_id = check_id("snapshot_id", request.path_params["snapshot_id"])
        return await self._service.get(DEFAULT_TENANT, snapshot_id)

    async def save(self, request: Request) -> dict[str, Any]:
        """Save a turn of a conversation, or a finished request, as a snapshot."""
        body = await read_body(request, SaveBody)
        return save_reply(await self._service.save(tenant=DEFAULT_TENANT, **dict(body)))

    async def list(self, request: Request) -> dict[str, Any]:
        """List snapshots, of a conversation or branch if given, oldest first."""
        limit, after = page_of(request, frozenset({"conversation_id", "branch"}))
        ids = {
            name: check_id(name, request.query_params[name])
            for name in ("conversation_id", "branch")
            if name in request.query_params
        }
        page = await self._service.page(
            DEFAULT_TENANT, ids.get("conversation_id"), ids.get("branch"), limit, after
        )
        rows = [summary(row) for row in page.snapshots]
        return {"success": True, "snapshots": rows, "after": page.after}

    async def info(self, request: Request) -> dict[str, Any]:
        """Describe one snapshot, its recorded tokens included."""
        row = await self._named(request)
        tokens = await self._service.tokens(row)
        found = metadata(row, tokens, await self._service.tier(row))
        return {"success": True, "snapshot": found}

    async def delete(self, request: Request) -> dict[str, Any]:
        """Delete one snapshot, and the bytes that no other snapshot shares."""
        row = await self._named(request)
        await self._service.delete(row)
        return {
            "success": True,
            "snapshot_id": row.snapshot_id,
            "message": f"deleted {shown(row)}",
        }

    async def restore(self, request: Request) -> dict[str, Any]:
        """Bring a snapshot into memory, verified; with create_new_request, generate from it."""
        body = await read_body(request, SnapshotRestore)
        row = await self._named(request)
        continuation = None
        if body.create_new_request:
            assert body.continuation_ids is not None
            params = {**(body.sampling_params or {}), "max_new_tokens": body.max_new_tokens}
            continuation = Continuation(body.continuation_ids, params, body.request_id)
        return restore_reply(await self._service.restore(row, continuation))

    async def branch(self, request: Request) -> dict[str, Any]:
        """Begin a branch, or a conversation, at a snapshot; no state is copied."""
        body = await read_body(request, SnapshotBranch)
        row = await self._named(request)
        return save_reply(
            await self._service.branch(
                row, body.conversation_id, body.branch_name, body.snapshot_id
            )
        )

    async def conversations(self, request: Request) -> dict[str, Any]:
        """List the saved conversations by id."""
        limit, after = page_of(request)
        if after is not None:
            check_id("after", after)
        rows = await self._service.conversations(DEFAULT_TENANT, limit + 1, after)
        more = len(rows) > limit
        return {
            "success": True,
            "conversations": [vars(row) for row in rows[:limit]],
            "after": rows[limit - 1].conversation_id if more else None,
        }

    async def conversation(self, request: Request) -> dict[str, Any]:
        """Describe one conversation, with its branches and what it is worth."""
        name = check_id("conversation_id", request.path_params["conversation_id"])
        row, branches = await self._service.conversation(DEFAULT_TENANT, name)
        context = self._service.context
        empty = {"snapshots": 0, "newest_turn": 0, "created_at": None, "updated_at": None}
        return {
            "success": True,
            **({"conversation_id": name, **empty, "bytes": 0} if row is None else vars(row)),
            "branches": [vars(branch) for branch in branches],
            "priority": await context.conversations.priority(DEFAULT_TENANT, name),
        }

    async def forget(self, request: Request) -> dict[str, Any]:
        """Delete a conversation: all its snapshots, and what is remembered of it."""
        name = check_id("conversation_id", request.path_params["conversation_id"])
        count = await self._service.delete_conversation(DEFAULT_TENANT, name)
        return {
            "success": True,
            "conversation_id": name,
            "snapshots": count,
            "message": f"deleted {name} with {count} snapshots",
        }

    async def tree(self, request: Request) -> dict[str, Any]:
        """The saved turns of a conversation, each with the one it stands on."""
        name = check_id("conversation_id", request.path_params["conversation_id"])
        limit, after = page_of(request)
        _, branches = await self._service.conversation(DEFAULT_TENANT, name)
        page = await self._service.page(DEFAULT_TENANT, name, None, limit, after)
        return {
            "success": True,
            "conversation_id": name,
            "branches": [vars(branch) for branch in branches],
            "turns": [summary(row) for row in page.snapshots],
            "after": page.after,
        }

    async def export(self, request: Request) -> Response:
        """Download a snapshot, with all it stands on, as one file."""
        try:
            row = await self._named(request)
            archive = await self._service.transfer.export(row)
        except EngramError as error:
            return error_response(error)
        except Exception as error:
            logger.exception("Engram: %s failed", request.url.path)
            return error_response(InternalError(f"{type(error).__name__}: {error}"))
        if HELD in request.scope:
            # A client that goes away ends the reply before what is in its background.
            request.scope[HELD].callback(archive.remove)
        return FileResponse(
            archive.path,
            media_type=ARCHIVE,
            filename=archive.path.name,
            background=BackgroundTask(archive.remove),
        )

    async def take(self, request: Request) -> dict[str, Any]:
        """Store the snapshots of a file that an export has made, verified."""
        page_of(request, frozenset({"conversation_id", "snapshot_id"}))
        ids = {
            name: check_id(name, request.query_params[name])
            for name in ("conversation_id", "snapshot_id")
            if name in request.query_params
        }
        if "conversation_id" in ids:
            check_not_reserved("conversation_id", ids["conversation_id"])
        received = await self._service.transfer.receive(_bounded(request))
        names = Names(DEFAULT_TENANT, ids.get("conversation_id"), ids.get("snapshot_id"))
        report = await self._service.transfer.take(received, names)
        rows = []
        for manifest in report.manifests:
            try:
                rows.append(await self._service.get(DEFAULT_TENANT, manifest.snapshot_id))
            except NotFoundError:
                continue  # deleted already
        return {
            "success": True,
            "snapshots": [summary(row) for row in rows],
            "bytes": report.bytes,
            "new_bytes": report.new_bytes,
            "message": f"imported {len(report.manifests)} snapshots",
        }


async def _bounded(request: Request) -> AsyncIterator[bytes]:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_ARCHIVE_BYTES:
            raise BodyTooLargeError(
                f"the archive has more than {MAX_ARCHIVE_BYTES} bytes",
                details={"limit": MAX_ARCHIVE_BYTES},
            )
        yield part
