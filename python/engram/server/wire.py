"""Reading a bounded, strict body; writing a reply or an error."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from engram.core.canonical import canonical_json
from engram.errors import (
    BodyTooLargeError,
    EngramError,
    InternalError,
    InvalidRequestError,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 << 20
"""Of Engram's own routes; the largest legitimate body is a list of continuation tokens."""

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 500
"""Entries of a list in one reply."""

RETRY_AFTER_S: Final = 1
"""What clients are told that were refused because of too much work: a save takes about as long."""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body], limit: int | None = None) -> Body:
    """The request's JSON body as `schema`.  Raises `InvalidRequestError` naming the field."""
    limit = MAX_BODY_BYTES if limit is None else limit
    data = await bounded(request.stream(), request.headers.get("content-length"), limit)
    try:
        return schema.model_validate(parse_json(data))
    except ValidationError as error:
        raise invalid(error) from None


async def bounded(parts: AsyncIterator[bytes], announced: str | None, limit: int) -> bytes:
    """A body of at most `limit` bytes; `BodyTooLargeError` as soon as it is known to be larger.

    `announced` is the header content-length, None for a body in chunks.
    """
    too_large = BodyTooLargeError(f"the body has more than {limit} bytes", details={"limit": limit})
    number = announced if announced is not None and announced.isdecimal() else "0"
    # By its digits first: to convert thousands of them is refused by Python.
    if len(number) > 18 or int(number) > limit:
        raise too_large
    found: list[bytes] = []
    size = 0
    async for part in parts:
        size += len(part)
        if size > limit:
            raise too_large
        found.append(part)
    return b"".join(found)


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, finite numbers, every key once, text that can be written again.

    Raises `InvalidRequestError`.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )
        if "\\u" in text:
            canonical_json(value)  # half a surrogate pair could not even be told in a reply
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {_short(str(error))}") from None
    return value


def known_query(request: Request, fields: frozenset[str] = frozenset()) -> None:
    """Refuse a query with another field than `fields`."""
    unknown = sorted(request.query_params.keys() - fields)
    if unknown:
        name = _short(unknown[0], 80)
        raise InvalidRequestError(f"{name}: no such field here", details={"field": name})


def page_of(request: Request, fields: frozenset[str] = frozenset()) -> tuple[int, str | None]:
    """`limit` and `after` of a listing; every other field but `fields` is refused."""
    known_query(request, fields | {"limit", "after"})
    query = request.query_params
    given = query.get("limit", str(DEFAULT_PAGE))
    limit = int(given) if given.isdecimal() and len(given) < 9 else 0
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(
            f"limit must be an integer from 1 to {MAX_PAGE}", details={"field": "limit"}
        )
    return limit, query.get("after")


def paged() -> list[dict[str, Any]]:
    """What OpenAPI says of `limit` and `after`."""
    return [
        {
            "name": "limit",
            "in": "query",
            "description": "at most so many",
            "schema": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_PAGE,
                "default": DEFAULT_PAGE,
            },
        },
        {
            "name": "after",
            "in": "query",
            "description": "the `after` of the page before",
            "schema": {"type": "string"},
        },
    ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name, 80)!r} is there twice")
        found[name] = value
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{_short(number, 80)} is no finite number")
    return value


def invalid(error: ValidationError) -> InvalidRequestError:
    """The first problem of a validation, with the field it is in."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = _short(".".join(str(part) for part in problem["loc"]))
    message = f"{field}: {problem['msg']}" if field else str(problem["msg"])
    return InvalidRequestError(message, details={"field": field} if field else {})


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class _ErrorResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        # In ASCII: half a surrogate pair, which SGLang's routes let pass, has no UTF-8.
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: EngramError) -> JSONResponse:
    """The reply to a request that failed."""
    busy = error.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    headers = {"retry-after": str(RETRY_AFTER_S)} if busy else None
    return _ErrorResponse(error.to_reply(), status_code=error.http_status, headers=headers)


def body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route with this body."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


Handler = Callable[[Request], Awaitable[dict[str, Any]]]


def answering(handler: Handler) -> Callable[[Request], Awaitable[JSONResponse]]:
    """Turn a handler's result into a 200 and its errors into theirs."""

    @functools.wraps(handler)
    async def route(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await handler(request))
        except EngramError as error:
            return error_response(error)
        except Exception as error:
            logger.exception("Engram: %s failed", request.url.path)
            return error_response(InternalError(f"{type(error).__name__}: {error}"))

    # FastAPI resolves annotations in the handler's module; only the request is a parameter.
    route.__annotations__ = {"request": Request, "return": JSONResponse}
    return route
