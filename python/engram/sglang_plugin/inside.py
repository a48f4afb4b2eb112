"""An httpx transport to an application in the same process, streams included.

httpx has one of its own, but it hands a reply over when it is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx


class InsideTransport(httpx.AsyncBaseTransport):
    """Calls an ASGI application; whoever closes a reply early has gone away."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Serve a request until its reply begins."""
        body = await request.aread()
        exchange = _Exchange(body)
        url = request.url
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.split(b"?")[0],
            "query_string": url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("in-process", 0),
            "server": (url.host, url.port or 80),
            "state": {},
        }
        exchange.begin(self._app, scope)
        start = await exchange.next()
        return httpx.Response(start["status"], headers=start["headers"], stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request under way, and its reply's body."""

    def __init__(self, body: bytes) -> None:
        self._request = [{"type": "http.request", "body": body, "more_body": False}]
        self._messages: asyncio.Queue[Any] = asyncio.Queue(maxsize=16)
        self._gone = asyncio.Event()
        self._task: asyncio.Task[None]

    def begin(self, app: Any, scope: dict[str, Any]) -> None:
        """Start the application."""
        self._task = asyncio.get_running_loop().create_task(self._serve(app, scope))

    async def _serve(self, app: Any, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            await self._put(error)
        else:
            await self._put({"type": "http.response.body", "more_body": False})

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self._put(message)

    async def _put(self, message: Any) -> None:
        """Wait for the reader; what nobody reads any more is left."""
        if self._gone.is_set():
            return
        putting = asyncio.ensure_future(self._messages.put(message))
        gone = asyncio.ensure_future(self._gone.wait())
        await asyncio.wait((putting, gone), return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()
        gone.cancel()

    async def next(self) -> Any:
        """The application's next message; raises what it raised."""
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            message = await self.next()
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        """Go away, and wait until the application has seen it."""
        self._gone.set()
        await asyncio.wait((self._task,))
