"""`AsyncEngramClient`: `EngramClient` for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

import httpx

from engram.client import calls, talking
from engram.client.binding import Place, awaiting, awaiting_at
from engram.client.chat import Assembly, Message, Reply
from engram.client.exchange import Call, Retries
from engram.client.files import Download
from engram.client.results import Exported, Tree
from engram.client.transport import DEFAULT_TIMEOUT, DEFAULT_URL, AsyncTransport
from engram.core.ids import DEFAULT_BRANCH

T = TypeVar("T")


class AsyncEngramClient:
    """A client of one server, on one event loop; `EngramClient` has the words.

    async with AsyncEngramClient("http://localhost:30000") as client:
        chat = client.conversation("tour")
        print((await chat.send("Name a colour.")).content)
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """Describe a server; nothing is sent.  The arguments are `EngramClient`'s."""
        self._transport = AsyncTransport(
            url,
            api_key=api_key,
            timeout=timeout,
            retries=retries or Retries(),
            transport=transport,
            sleep=sleep,
        )

    def conversation(
        self, conversation_id: str, branch_name: str = DEFAULT_BRANCH
    ) -> AsyncConversation:
        """A branch of a conversation, there or not; nothing is sent."""
        return AsyncConversation(self, Place(conversation_id, branch_name))

    list_conversations = awaiting(calls.list_conversations)
    get_conversation = awaiting(calls.get_conversation)
    delete_conversation = awaiting(calls.delete_conversation)
    set_priority = awaiting(calls.set_priority)
    tree_page = awaiting(calls.tree_page)
    list_snapshots = awaiting(calls.list_snapshots)
    get_snapshot = awaiting(calls.get_snapshot)
    find_snapshot = awaiting(calls.find_snapshot)
    delete_snapshot = awaiting(calls.delete_snapshot)
    update_snapshot = awaiting(calls.update_snapshot)
    compare = awaiting(calls.compare)
    save = awaiting(calls.save)
    restore = awaiting(calls.restore)
    restore_snapshot = awaiting(calls.restore_snapshot)
    import_snapshots = awaiting(calls.import_snapshots)
    branch = awaiting(calls.branch)
    create_prefix = awaiting(calls.create_prefix)
    list_prefixes = awaiting(calls.list_prefixes)
    get_prefix = awaiting(calls.get_prefix)
    delete_prefix = awaiting(calls.delete_prefix)
    promote = awaiting(calls.promote)
    demote = awaiting(calls.demote)
    pin = awaiting(calls.pin)
    unpin = awaiting(calls.unpin)
    explain = awaiting(calls.explain)
    tiers = awaiting(calls.tiers)
    health = awaiting(calls.health)
    texts = awaiting(calls.texts)

    async def tree(self, conversation_id: str) -> Tree:
        """The turns and branches of a conversation, all of them."""
        page = await self.tree_page(conversation_id)
        turns = list(page.turns)
        while page.after is not None:
            page = await self.tree_page(conversation_id, after=page.after)
            turns += page.turns
        return Tree(conversation_id=conversation_id, branches=page.branches, snapshots=turns)

    async def export_snapshot(
        self, snapshot_id: str, path: str | os.PathLike[str], *, replace: bool = False
    ) -> Exported:
        """Write a snapshot, with all it stands on, to a file, which `import_snapshots` takes.

        The file is there when all of it is. `AlreadyExistsError` for one that is there already, if
        it is not to be replaced.
        """
        with Download(path, replace=replace) as download:
            response = await self._run(calls.exported(snapshot_id))
            try:
                async for piece in self._transport.parts(response):
                    await asyncio.to_thread(download.write, piece)
            finally:
                await response.aclose()
        return Exported(path=download.path, bytes=download.bytes)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncEngramClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        return await self._transport.run(call)


class AsyncConversation:
    """One branch of a conversation; `id` and `branch_name` say which."""

    def __init__(self, client: AsyncEngramClient, place: Place) -> None:
        self._client = client
        self.place = place

    @property
    def id(self) -> str:
        """The conversation's id."""
        return self.place.conversation_id

    @property
    def branch_name(self) -> str:
        """The branch that `send` goes on with."""
        return self.place.branch_name

    send = awaiting_at(talking.send)
    regenerate = awaiting_at(talking.regenerate)
    extend = awaiting_at(talking.extend)
    save = awaiting_at(talking.save)
    restore = awaiting_at(talking.restore)
    info = awaiting_at(talking.info)
    snapshots = awaiting_at(talking.snapshots)
    details = awaiting_at(talking.details)
    delete = awaiting_at(talking.delete)
    set_priority = awaiting_at(talking.set_priority)
    pin = awaiting_at(talking.pin)
    unpin = awaiting_at(talking.unpin)

    async def stream(
        self, message: Message, *, from_turn: int | None = None, **options: Any
    ) -> AsyncChatStream:
        """Say something and read the reply as it comes; `send` has the arguments.

        async with await chat.stream("Hello") as stream:
            async for text in stream:
                print(text, end="", flush=True)
            print((await stream.reply()).usage)
        """
        response = await self._run(talking.streamed(self.place, message, from_turn, options))
        return AsyncChatStream(self._client._transport, response)

    async def stream_regenerate(self, **options: Any) -> AsyncChatStream:
        """`regenerate` as a stream."""
        response = await self._run(talking.streamed_again(self.place, "regenerate", options))
        return AsyncChatStream(self._client._transport, response)

    async def stream_extend(self, **options: Any) -> AsyncChatStream:
        """`extend` as a stream."""
        response = await self._run(talking.streamed_again(self.place, "continue", options))
        return AsyncChatStream(self._client._transport, response)

    async def tree(self) -> Tree:
        """The turns and branches of the whole conversation."""
        return await self._client.tree(self.id)

    async def branch(self, name: str, *, turn: int | None = None) -> AsyncConversation:
        """A new branch that starts at a turn, the newest if not said otherwise.

        The turn is saved if it is not yet; no state is copied.
        """
        saved = await self.save(turn=turn)
        await self._client.branch(saved.snapshot_id, branch_name=name)
        return AsyncConversation(self._client, Place(self.id, name))

    async def fork(self, conversation_id: str, *, turn: int | None = None) -> AsyncConversation:
        """The same as a new conversation."""
        saved = await self.save(turn=turn)
        await self._client.branch(saved.snapshot_id, conversation_id=conversation_id)
        return AsyncConversation(self._client, Place(conversation_id))

    async def _run(self, call: Call[T]) -> T:
        return await self._client._run(call)

    def __repr__(self) -> str:
        return f"AsyncConversation({self.id!r}, {self.branch_name!r})"


class AsyncChatStream:
    """A reply that is coming: iterate over its text; to close it early stops the generation."""

    def __init__(self, transport: AsyncTransport, response: httpx.Response) -> None:
        self._response = response
        self._assembly = Assembly()
        self._reply: Reply | None = None
        self._texts = self._read(transport)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts

    async def reply(self) -> Reply:
        """The whole reply; what is still to come is read."""
        async for _ in self._texts:
            pass
        if self._reply is None:
            self._reply = self._assembly.finish()
        return self._reply

    async def _read(self, transport: AsyncTransport) -> AsyncIterator[str]:
        try:
            async for part in transport.parts(self._response):
                for text in self._assembly.feed(part):
                    yield text
            self._reply = self._assembly.finish()
        finally:
            await self._response.aclose()

    async def close(self) -> None:
        """Read no further."""
        await self._response.aclose()

    async def __aenter__(self) -> AsyncChatStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
