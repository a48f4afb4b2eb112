"""Reading a bounded, strict body; writing a reply or an error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from engram.errors import (
    BodyTooLargeError,
    EngramError,
    InternalError,
    InvalidRequestError,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 << 20
"""Of Engram's own routes; the largest legitimate body is a list of continuation tokens."""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body]) -> Body:
    """The request's JSON body as `schema`.  Raises `InvalidRequestError` naming the field."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes")
    try:
        return schema.model_validate_json(bytes(data))
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> InvalidRequestError:
    """The first problem of a validation, with the field it is in."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = f"{field}: {problem['msg']}" if field else str(problem["msg"])
    return InvalidRequestError(message, details={"field": field} if field else {})


def error_response(error: EngramError) -> JSONResponse:
    """The reply to a request that failed."""
    return JSONResponse(error.to_dict(), status_code=error.http_status)


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
