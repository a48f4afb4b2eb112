"""The I/O of the client: once for threads, once for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

import httpx

from engram.client.exchange import Call, Retries, exchange
from engram.client.files import pieces_of, pieces_of_async
from engram.errors import InvalidRequestError, ServerUnreachableError
from engram.version import __version__

T = TypeVar("T")

DEFAULT_URL: Final = "http://localhost:30000"
DEFAULT_TIMEOUT: Final = httpx.Timeout(600.0, connect=5.0)
"""Generating can take minutes; reaching a server cannot."""


def headers_of(api_key: str | None) -> dict[str, str]:
    """What every request carries."""
    headers = {"user-agent": f"engram/{__version__}"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    return headers


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into an error of the tree."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerUnreachableError(
            f"no answer from {url} in time ({type(error).__name__})",
            hint="the server may still be at work; raise the client's timeout",
            details={"url": url},
        ) from error
    except (httpx.RequestError, httpx.StreamError, httpx.InvalidURL) as error:
        raise ServerUnreachableError(
            f"{url} cannot be reached: {str(error) or type(error).__name__}",
            hint="does the server run, and is this its address?",
            details={"url": url},
        ) from error


@contextmanager
def _written() -> Iterator[None]:
    """What cannot be written as JSON is not sent, and is the caller's to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"the call cannot be written as JSON: {error}") from error


class BlockingTransport(Protocol):
    """What a client needs to send its calls."""

    url: str

    def run(self, call: Call[T]) -> T:
        """The result of a call; raises an `EngramError`."""
        ...

    def parts(self, response: httpx.Response) -> Iterator[bytes]:
        """The body of a streamed response as it comes."""
        ...

    def end(self, response: httpx.Response) -> None:
        """Read no more of a streamed response."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class Transport:
    """Calls of one server, on the caller's thread.  Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout: float | httpx.Timeout,
        retries: Retries,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        self._sleep = sleep
        with reaching(self.url):
            self._http = httpx.Client(
                base_url=self.url, headers=headers_of(api_key), timeout=timeout, transport=transport
            )

    def run(self, call: Call[T]) -> T:
        """The result of a call; raises an `EngramError`."""
        steps = exchange(call, self._retries)
        step = next(steps)
        while True:
            answer = None
            if isinstance(step, Call):
                answer = self._send(step)
            else:
                self._sleep(step.seconds)
            try:
                step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    def _send(self, call: Call[T]) -> httpx.Response:
        with reaching(self.url):
            with _written():
                request = self._http.build_request(
                    call.method,
                    call.path,
                    json=call.body,
                    content=None if call.file is None else pieces_of(call.file),
                    params=dict(call.query) or None,
                )
            response = self._http.send(request, stream=True)
            try:
                if not (call.stream and response.is_success):
                    response.read()
            except BaseException:
                response.close()
                raise
        return response

    def parts(self, response: httpx.Response) -> Iterator[bytes]:
        """The body of a streamed response as it comes."""
        with reaching(self.url):
            yield from response.iter_bytes()

    def end(self, response: httpx.Response) -> None:
        """Read no more of a streamed response."""
        response.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncTransport:
    """The same on an event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout: float | httpx.Timeout,
        retries: Retries,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        self._sleep = sleep
        with reaching(self.url):
            self._http = httpx.AsyncClient(
                base_url=self.url, headers=headers_of(api_key), timeout=timeout, transport=transport
            )

    async def run(self, call: Call[T]) -> T:
        """The result of a call; raises an `EngramError`."""
        steps = exchange(call, self._retries)
        step = next(steps)
        while True:
            answer = None
            if isinstance(step, Call):
                answer = await self._send(step)
            else:
                await self._sleep(step.seconds)
            try:
                step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    async def _send(self, call: Call[T]) -> httpx.Response:
        with reaching(self.url):
            with _written():
                request = self._http.build_request(
                    call.method,
                    call.path,
                    json=call.body,
                    content=None if call.file is None else pieces_of_async(call.file),
                    params=dict(call.query) or None,
                )
            response = await self._http.send(request, stream=True)
            try:
                if not (call.stream and response.is_success):
                    await response.aread()
            except BaseException:
                await response.aclose()
                raise
        return response

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body of a streamed response as it comes."""
        with reaching(self.url):
            async for part in response.aiter_bytes():
                yield part

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
