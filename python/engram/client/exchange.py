"""One call with its retries, without any I/O: what to send next, and what to make of the answer.

Whoever drives it sends the `Call`s and waits the `Wait`s that it yields.  So there is one body for
threads and asyncio.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from engram.client.failures import failure_of, unexpected

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)

BUSY: Final = HTTPStatus.SERVICE_UNAVAILABLE


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and what a success of it is."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    """Hand over the response when its head is there."""
    file: Path | None = None
    """What is in it is the body, instead of JSON."""


@dataclass(frozen=True)
class Wait:
    """Do nothing for so long."""

    seconds: float


@dataclass(frozen=True)
class Retries:
    """How often and when a call is repeated that was answered with 503, which is: nothing was done.

    Nothing else is repeated, not even a lost connection: the server may have done its work.

    The n-th wait is what the reply's Retry-After says; without one, a random time between half and
    all of ``first_s`` doubled n times, at most ``longest_s``. A server that asks for more than
    ``patience_s`` is not asked again.
    """

    count: int = 4
    first_s: float = 0.5
    longest_s: float = 8.0
    patience_s: float = 60.0
    random: Callable[[], float] = random.random

    def wait(self, attempt: int, retry_after: str | None) -> Wait | None:
        """The wait after this attempt, the first being 0; None to give up."""
        if attempt >= self.count:
            return None
        told = None if retry_after is None else seconds_of(retry_after)
        if told is not None:
            return Wait(told) if told <= self.patience_s else None
        most = min(self.first_s * 2**attempt, self.longest_s)
        return Wait(most * (0.5 + self.random() / 2))


def seconds_of(retry_after: str) -> float | None:
    """The value of a Retry-After header, seconds or a date; None for one that is neither."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        # By its length first: Python refuses to convert thousands of digits.
        return float(text) if len(text) < 10 else float("inf")
    try:
        moment = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, moment - time.time())


def exchange(
    call: Call[T], retries: Retries
) -> Generator[Call[T] | Wait, httpx.Response | None, T]:
    """Yields what is to be done; to be sent the response of each call.

    Returns the parsed result. Raises the `EngramError` that the last reply stands for.
    """
    attempt = 0
    while True:
        response = yield call
        assert response is not None
        if response.is_success:
            return call.parse(response)
        wait = None
        if response.status_code == BUSY:
            wait = retries.wait(attempt, response.headers.get("retry-after"))
        if wait is None:
            raise failure_of(response.status_code, response.content)
        yield wait
        attempt += 1


def reply_as(schema: type[R], part: str | None = None) -> Callable[[httpx.Response], R]:
    """Parses a JSON reply, or the part of it under a name."""

    def parse(response: httpx.Response) -> R:
        try:
            body = response.json()
            return schema.model_validate(body if part is None else body[part])
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        raise unexpected(response.status_code, why, response.content)

    return parse


def reply_as_json(response: httpx.Response) -> dict[str, Any]:
    """Parses a JSON object."""
    try:
        body = response.json()
    except ValueError as error:
        raise unexpected(response.status_code, str(error), response.content) from None
    if not isinstance(body, dict):
        raise unexpected(response.status_code, "it is no JSON object", response.content)
    return body
