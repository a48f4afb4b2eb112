"""`engram.Engine`: `sglang.Engine` whose conversations are saved and restored, and no server.

The service and its routes are those of the server, on an application that nobody listens for: the
client's calls go to it within the process.  So both have the same rules, errors and results.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import httpx
import msgspec
from fastapi import FastAPI
from sglang.srt.entrypoints.engine import Engine as SglangEngine
from sglang.srt.plugins import load_plugins

from engram.client import AsyncEngramClient, Conversation, EngramClient, Retries
from engram.client.chat import Message, Reply
from engram.client.exchange import Call
from engram.client.results import Restored, Saved
from engram.client.transport import AsyncTransport
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.core.settings import Settings
from engram.errors import UnsupportedError
from engram.server.tagging import CURRENT_TAG, tag_of_chat
from engram.sglang_plugin import compat
from engram.sglang_plugin.args import apply_flags
from engram.sglang_plugin.chat import watch_chats
from engram.sglang_plugin.http import CLOSE_TIMEOUT_S, mount, open_for, service_around
from engram.sglang_plugin.inside import InsideTransport
from engram.sglang_plugin.plugin import HOOKS

T = TypeVar("T")
URL: Final = "http://engram"
"""Stands where an address is asked for."""
POSITIONAL: Final = (
    "prompt",
    "sampling_params",
    "input_ids",
    "image_data",
    "audio_data",
    "video_data",
)
"""What `sglang.Engine.generate` takes by place, as far as a turn's rules ask for it."""


class Engine(SglangEngine):
    """SGLang's offline engine with memory.

        with Engine(model_path="model", snapshot_dir="./snapshots") as engine:
            print(engine.chat("tour", "Name a colour.", max_tokens=8).content)
            engine.save("tour")

    Takes the arguments of `sglang.Engine`, and Engram's settings by the names of their flags
    (`snapshot_dir`, `max_warm_memory_gb`, ...). As with SGLang's own methods, one thread uses it.
    What is done in the background goes on while a method runs; automatic saves are part of the
    turn (`snapshot_durability` is "sync" if not said otherwise).
    """

    def __init__(self, **kwargs: Any) -> None:
        """Open the store and start the engine.

        Raises `UnsupportedError` for what snapshots cannot be combined with, `StoreError` for a
        store that cannot be used.
        """
        self._engram_closed = True
        load_plugins()
        server_args, settings = self._arguments(kwargs)
        self._opened = open_for(server_args, settings)
        try:
            super().__init__(server_args=server_args)
            self._start()
        except BaseException:
            self._opened.close()
            raise
        self._engram_closed = False

    def _arguments(self, kwargs: dict[str, Any]) -> tuple[Any, Settings]:
        """SGLang's arguments as the command line would have made them."""
        kind = self.server_args_class
        defaults = _defaults(kind)
        own = {name: kwargs.pop(name) for name in Settings.model_fields if name in kwargs}
        own = {"snapshot_durability": "sync", **own, "enable_snapshot_persistence": True}
        given = argparse.Namespace(**{"log_level": "error", **defaults, **own, **kwargs})
        if "log_level" not in kwargs:
            given.log_level = "error"
        try:
            compat.require_whole(HOOKS)
            settings = apply_flags(given)
        except SystemExit as refused:
            message = str(refused.code).removeprefix("engram: error: ")
            raise UnsupportedError(message) from None
        chosen = {
            name: value
            for name, value in vars(given).items()
            if name in kwargs or name not in defaults or value != defaults[name]
        }
        return kind(**chosen), settings

    def _start(self) -> None:
        manager = self.tokenizer_manager
        self._service = service_around(manager, self._opened, self.server_args)
        app = FastAPI()
        app.state.openai_serving_chat = manager.serving_chat_class(manager, self.template_manager)
        mount(app, self._service)
        watch_chats(app.state.openai_serving_chat, self._service)
        inside = InsideTransport(app)
        retries = Retries(count=0)
        self.async_client = AsyncEngramClient(URL, retries=retries, transport=inside)
        """`AsyncEngramClient` for code that runs on the engine's event loop."""
        self.client = EngramClient.over(
            _OnLoop(
                self.loop,
                AsyncTransport(
                    URL,
                    api_key=None,
                    timeout=httpx.Timeout(None),
                    retries=retries,
                    transport=inside,
                ),
            )
        )
        """`EngramClient` of this engine."""

        async def begin() -> None:
            manager.auto_create_handle_loop()
            self._service.start()

        self.loop.run_until_complete(begin())

    def conversation(self, conversation_id: str, branch_name: str = DEFAULT_BRANCH) -> Conversation:
        """A branch of a conversation, there or not."""
        return self.client.conversation(conversation_id, branch_name)

    def chat(self, conversation_id: str, message: Message, **options: Any) -> Reply:
        """Say something in a conversation; `Conversation.send` has the arguments."""
        return self.conversation(conversation_id).send(message, **options)

    def save(self, conversation_id: str | None = None, **place: Any) -> Saved:
        """Make a turn durable; `EngramClient.save` has the arguments."""
        return self.client.save(conversation_id, **place)

    def restore(self, conversation_id: str | None = None, **place: Any) -> Restored:
        """Bring a snapshot into memory, verified; `EngramClient.restore` has the arguments."""
        return self.client.restore(conversation_id, **place)

    def generate(self, *args: Any, conversation_id: str | None = None, **kwargs: Any) -> Any:
        """As `sglang.Engine.generate`; with `conversation_id` it is that conversation's next turn.

        Such a request has one prompt, of text, and one reply: `UnsupportedError` for others, as of
        the server's routes; `InvalidRequestError` for an id that cannot be a conversation's.
        """
        if conversation_id is None:
            return super().generate(*args, **kwargs)
        given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
        for name in ("prompt", "input_ids"):
            if _is_batch(given.get(name)):
                raise UnsupportedError(
                    "a request with a conversation_id must have one prompt",
                    details={"field": name},
                )
        tag = tag_of_chat(conversation_id, given)
        with _tagged(tag):
            made = super().generate(*args, **kwargs)
        return _tagged_stream(tag, made) if kwargs.get("stream") else made

    def shutdown(self) -> None:
        """Finish the saves, then end the engine."""
        if not self._engram_closed:
            self._engram_closed = True
            # What cannot be finished in time is given up, as by a server that is stopped.
            with suppress(asyncio.TimeoutError):
                work = asyncio.wait_for(self._service.close(), CLOSE_TIMEOUT_S)
                self.loop.run_until_complete(work)
            super().shutdown()
            self._opened.close()
        else:
            super().shutdown()


class _OnLoop:
    """Runs an asyncio transport's calls to their end on a loop (`BlockingTransport`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: AsyncTransport) -> None:
        self._loop = loop
        self._transport = transport
        self.url = transport.url

    def run(self, call: Call[T]) -> T:
        return self._loop.run_until_complete(self._transport.run(call))

    def parts(self, response: httpx.Response) -> Iterator[bytes]:
        parts: AsyncIterator[bytes] = self._transport.parts(response)
        while True:
            try:
                yield self._loop.run_until_complete(anext(parts))
            except StopAsyncIteration:
                return

    def end(self, response: httpx.Response) -> None:
        self._loop.run_until_complete(response.aclose())

    def close(self) -> None:
        """Nothing is open: the engine ends by its own `shutdown`."""


def _defaults(kind: Any) -> dict[str, Any]:
    """The defaults of SGLang's arguments."""
    found = {}
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            found[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            found[field.name] = field.default_factory()
    return found


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


@contextmanager
def _tagged(tag: Tag) -> Iterator[None]:
    token = CURRENT_TAG.set(tag)
    try:
        yield
    finally:
        CURRENT_TAG.reset(token)


def _tagged_stream(tag: Tag, chunks: Iterator[Any]) -> Iterator[Any]:
    """A stream is made while it is read: so long it must be known whose it is."""
    while True:
        with _tagged(tag):
            try:
                chunk = next(chunks)
            except StopIteration:
                return
        yield chunk
