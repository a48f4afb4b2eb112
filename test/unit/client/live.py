"""A service of a test's own behind real HTTP: the server's routers, served by a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request

from engram.server.compatible import compatible_router
from engram.server.explaining import explaining_router
from engram.server.memory import memory_router
from engram.server.prefixes import prefixes_router
from engram.server.resources import resources_router
from engram.server.snapshots import snapshots_router
from unit.service.engine import Server

T = TypeVar("T")
ROUTERS = (
    compatible_router,
    snapshots_router,
    resources_router,
    explaining_router,
    memory_router,
)


class Live:
    """A server on a port; `run` does something on its event loop."""

    def __init__(self, server: Server, web: uvicorn.Server) -> None:
        self.server = server
        self.web = web
        self.loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        port = self.web.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def chat(self, name: str, turns: int = 1, **fields: Any) -> list[int]:
        return self.run(self.server.chat(name, turns, **fields))


class Prompts:
    """A prompt's tokens are its characters."""

    async def prefix_of_messages(self, request: Request, messages: Any, tools: Any) -> list[int]:
        return [ord(one) for message in messages for one in message["content"]]

    async def prefix_of_text(self, request: Request, text: str) -> list[int]:
        return [ord(one) for one in text]


def app_of(server: Server) -> FastAPI:
    app = FastAPI()
    for make in ROUTERS:
        app.include_router(make(server.service))
    app.include_router(prefixes_router(server.service, Prompts()))

    @app.post("/v1/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        # Stands for SGLang's: the engine of these tests has no tokenizer.
        body = await request.json()
        return {"text": ["".join(f"<{token}>" for token in ids) for ids in body["tokens"]]}

    return app


@contextmanager
def serving(server: Server, app: FastAPI | None = None) -> Iterator[Live]:
    config = uvicorn.Config(app or app_of(server), host="127.0.0.1", port=0, log_level="warning")
    live = Live(server, uvicorn.Server(config))

    def serve() -> None:
        live.loop = asyncio.new_event_loop()
        live.loop.run_until_complete(live.web.serve())
        live.loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    while not live.web.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield live
    finally:
        live.web.should_exit = True
        thread.join(30)
