"""`/v1/prefixes`: beginnings of prompts that are computed once."""

from __future__ import annotations

from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from engram.core.ids import DEFAULT_TENANT, check_id
from engram.errors import EngramError
from engram.server.examples import described, reply
from engram.server.schemas import MAX_CONTINUATION, TokenId
from engram.server.tagging import MAX_GENERATION_BODY_BYTES
from engram.server.wire import answering, body_of, page_of, read_body
from engram.service import SnapshotService
from engram.service.prefixes import MARKED, Prefix

MAX_NAME: Final = 240


def _name(value: str) -> str:
    try:
        check_id("name", value)
    except EngramError as error:
        raise ValueError(error.hint or error.message) from None
    if value.startswith(MARKED):
        raise ValueError(f"names that begin with {MARKED} are those of marks in chats")
    return value


class PrefixBody(BaseModel):
    """`POST /v1/prefixes`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Strict(), Field(max_length=MAX_NAME), AfterValidator(_name)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    text: Annotated[str, Strict(), Field(min_length=1)] | None = None
    input_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CONTINUATION)] | None = (
        None
    )
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> PrefixBody:
        given = [self.messages is not None, self.text is not None, self.input_ids is not None]
        if sum(given) != 1:
            raise ValueError("give one of messages, text and input_ids")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools: only with messages")
        return self


class Prompts(Protocol):
    """The engine's way from messages and texts to the tokens of prompts."""

    async def prefix_of_messages(
        self, request: Request, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        """The tokens with which every prompt begins whose messages begin with these."""
        ...

    async def prefix_of_text(self, request: Request, text: str) -> list[int]:
        """The tokens with which every prompt begins that begins with `text`."""
        ...


EXAMPLE: Final = {
    "name": "manual",
    "token_count": 7912,
    "bytes": 41943040,
    "unique_bytes": 41943040,
    "snapshot_id": "snap-0f3c",
    "created_at": 1760000000.5,
    "expires_at": None,
    "usable": True,
}


def prefixes_router(service: SnapshotService, prompts: Prompts) -> APIRouter:
    """`POST` and `GET /v1/prefixes`, `GET` and `DELETE /v1/prefixes/{name}`."""
    routes = _Routes(service, prompts)
    router = APIRouter(tags=["prefixes"])
    one = {"success": True, **EXAMPLE}
    for method, path, handler, example in (
        ("POST", "/v1/prefixes", routes.keep, one),
        ("GET", "/v1/prefixes", routes.list, {"prefixes": [EXAMPLE], "after": None}),
        ("GET", "/v1/prefixes/{name}", routes.get, one),
        ("DELETE", "/v1/prefixes/{name}", routes.delete, {"success": True, "message": "deleted"}),
    ):
        router.add_api_route(
            path,
            answering(handler),
            methods=[method],
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            responses={200: reply("Success.", example)},
            openapi_extra=body_of(PrefixBody) if method == "POST" else None,
        )
    return described(router)


class _Routes:
    def __init__(self, service: SnapshotService, prompts: Prompts) -> None:
        self._service = service
        self._prompts = prompts

    async def keep(self, request: Request) -> dict[str, Any]:
        """Compute and store a prefix; the same one again is answered as it is."""
        body = await read_body(request, PrefixBody, MAX_GENERATION_BODY_BYTES)
        if body.messages is not None:
            ids = await self._prompts.prefix_of_messages(request, body.messages, body.tools)
        elif body.text is not None:
            ids = await self._prompts.prefix_of_text(request, body.text)
        else:
            assert body.input_ids is not None
            ids = body.input_ids
        kept = await self._service.prefixes.keep(DEFAULT_TENANT, body.name, ids)
        verb = "was stored already" if kept.existing else "is stored"
        return {
            "success": True,
            **_shown(kept),
            "message": f"{body.name} {verb}: {kept.row.token_count} tokens",
        }

    async def list(self, request: Request) -> dict[str, Any]:
        """List prefixes by name."""
        limit, after = page_of(request)
        found, last = await self._service.prefixes.list(DEFAULT_TENANT, limit, after)
        return {"success": True, "prefixes": [_shown(one) for one in found], "after": last}

    async def get(self, request: Request) -> dict[str, Any]:
        """Describe one prefix."""
        name = check_id("name", request.path_params["name"])
        return {"success": True, **_shown(await self._service.prefixes.get(DEFAULT_TENANT, name))}

    async def delete(self, request: Request) -> dict[str, Any]:
        """Delete a prefix, and the bytes that nothing else shares."""
        name = check_id("name", request.path_params["name"])
        await self._service.prefixes.delete(DEFAULT_TENANT, name)
        return {"success": True, "name": name, "message": f"deleted {name}"}


def _shown(prefix: Prefix) -> dict[str, Any]:
    row = prefix.row
    return {
        "name": prefix.name,
        "token_count": row.token_count,
        "bytes": row.bytes,
        "unique_bytes": row.unique_bytes,
        "snapshot_id": row.snapshot_id,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "usable": prefix.usable,
    }
