"""`/v1/agent/ws`: tools and events over one connection.

A client that does not read costs a bounded amount: events that find no room are left out and told
of, and a tool call that is answered frees its place only when the answer was taken.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import TypeAdapter, ValidationError

from engram.agents.events import TOPICS, Interest, Subscriber
from engram.agents.host import AgentHost
from engram.errors import AgentsBusyError, EngramError, InternalError
from engram.server.agent_schemas import (
    ExecuteMessage,
    PingMessage,
    SocketMessage,
    SubscribeMessage,
)
from engram.server.origins import is_foreign
from engram.server.wire import invalid, parse_json
from engram.version import __version__

MAX_CONNECTIONS: Final = 256
MAX_CALLS: Final = 16
"""Tool calls of one connection that run, or whose answer was not taken yet."""
MAX_MESSAGE_BYTES: Final = 1 << 20
HEARTBEAT_S: Final = 30.0

UNAUTHORIZED: Final = 4401
FORBIDDEN: Final = 4403
TOO_LARGE: Final = 1009
TRY_LATER: Final = 1013

_MESSAGE: Final[TypeAdapter[ExecuteMessage | SubscribeMessage | PingMessage]] = TypeAdapter(
    SocketMessage
)

Authorize = Callable[[str | None], bool]
"""Whether a request with this Authorization header may come in."""


class AgentSocket:
    """Serves the connections."""

    def __init__(
        self, host: AgentHost, authorize: Authorize, *, heartbeat: float = HEARTBEAT_S
    ) -> None:
        self._host = host
        self._authorize = authorize
        self._heartbeat = heartbeat
        self._connections = 0

    async def serve(self, socket: WebSocket) -> None:
        """One connection, from its request to its end."""
        authorization = socket.headers.get("authorization")
        # SGLang's middleware for keys passes WebSockets by.
        if not self._authorize(authorization):
            await socket.close(UNAUTHORIZED, "an API key is needed")
            return
        if is_foreign(socket.scope["headers"], keyed=self._host.keyed):
            # Browsers let any page connect to any server: a page of another site may not.
            await socket.close(FORBIDDEN, "the page is of another origin")
            return
        if self._connections >= MAX_CONNECTIONS:
            await socket.close(TRY_LATER, f"{MAX_CONNECTIONS} connections are open")
            return
        self._connections += 1
        try:
            await socket.accept()
            owner = self._host.owner_of(authorization)
            await _Connection(self._host, socket, owner, self._heartbeat).serve()
        finally:
            self._connections -= 1


class _Connection:
    def __init__(self, host: AgentHost, socket: WebSocket, owner: str, heartbeat: float) -> None:
        self._host = host
        self._socket = socket
        self._owner = owner
        self._heartbeat = heartbeat
        self._sending = asyncio.Lock()
        self._calls: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        subscriber = self._host.bus.subscribe(self._owner)
        tasks = [
            asyncio.create_task(work)
            for work in (self._events(subscriber), self._beat(), self._read(subscriber))
        ]
        try:
            await self._send({"type": "connected", "version": __version__})
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._host.bus.unsubscribe(subscriber)
            for task in (*tasks, *self._calls):
                task.cancel()
            ended = await asyncio.gather(*tasks, *self._calls, return_exceptions=True)
        for one in ended:
            if isinstance(one, Exception) and not isinstance(
                one, (WebSocketDisconnect, RuntimeError)
            ):
                raise one

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_json({"timestamp": time.time(), **message})

    async def _events(self, subscriber: Subscriber) -> None:
        while True:
            await self._send(await subscriber.next())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat)
            await self._send({"type": "heartbeat"})

    async def _read(self, subscriber: Subscriber) -> None:
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            data = received.get("bytes") or (received.get("text") or "").encode()
            if len(data) > MAX_MESSAGE_BYTES:
                await self._socket.close(TOO_LARGE, f"more than {MAX_MESSAGE_BYTES} bytes")
                return
            try:
                await self._take(_parsed(data), subscriber)
            except EngramError as error:
                await self._send({"type": "error", **error.to_dict()})

    async def _take(
        self, message: ExecuteMessage | SubscribeMessage | PingMessage, subscriber: Subscriber
    ) -> None:
        if isinstance(message, PingMessage):
            await self._send({"type": "heartbeat", **_echo(message.request_id)})
        elif isinstance(message, SubscribeMessage):
            topics = sorted(TOPICS if message.events is None else message.events)
            subscriber.interest = Interest(
                frozenset(topics),
                None if message.conversation_ids is None else frozenset(message.conversation_ids),
                None if message.run_ids is None else frozenset(message.run_ids),
            )
            told = message.model_dump(exclude={"type"}) | {"events": topics}
            await self._send({"type": "subscription_updated", **told})
        elif len(self._calls) >= MAX_CALLS:
            error = AgentsBusyError(
                f"{MAX_CALLS} tool calls of this connection run already",
                hint="wait for their results",
            )
            where = {"tool": message.tool, **_echo(message.request_id)}
            await self._send({"type": "tool_error", **where, **error.to_dict()})
        else:
            task = asyncio.create_task(self._execute(message, subscriber))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _execute(self, message: ExecuteMessage, subscriber: Subscriber) -> None:
        call_id = f"call-{uuid.uuid4().hex}"
        where = {"tool": message.tool, "call_id": call_id, **_echo(message.request_id)}
        if message.conversation_id is not None:
            where["conversation_id"] = message.conversation_id
        newest: list[dict[str, Any]] = []
        there = asyncio.Event()

        def progress(fraction: float, text: str) -> None:
            # Of what was not taken yet only the newest counts.
            newest[:] = [{"type": "tool_progress", "fraction": fraction, "message": text}]
            there.set()

        async def report() -> None:
            while True:
                await there.wait()
                there.clear()
                await self._send({**newest[0], **where})

        await self._send({"type": "tool_start", **where})
        reporting = asyncio.create_task(report())
        try:
            result = await self._host.execute(
                self._owner,
                message.tool,
                message.arguments,
                call_id=call_id,
                conversation_id=message.conversation_id,
                caller=subscriber,
                on_progress=progress,
            )
            answer = {"type": "tool_result", "result": result.value, "output": result.output}
        except EngramError as error:
            answer = {"type": "tool_error", **error.to_dict()}
        except Exception as error:
            told = InternalError(f"{type(error).__name__}: {error}")
            answer = {"type": "tool_error", **told.to_dict()}
        finally:
            reporting.cancel()
        if there.is_set():
            await self._send({**newest[0], **where})
        await self._send({**answer, **where})


def _parsed(data: bytes) -> ExecuteMessage | SubscribeMessage | PingMessage:
    try:
        return _MESSAGE.validate_python(parse_json(data))
    except ValidationError as error:
        raise invalid(error) from None


def _echo(request_id: str | None) -> dict[str, Any]:
    return {} if request_id is None else {"request_id": request_id}
