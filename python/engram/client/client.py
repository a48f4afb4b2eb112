"""`EngramClient`: everything a server can be asked, typed; and one of its conversations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import httpx

from engram.client import calls, talking
from engram.client.binding import Place, blocking, blocking_at
from engram.client.chat import Assembly, Message, Reply
from engram.client.exchange import Call, Retries
from engram.client.files import Download
from engram.client.results import Exported, Tree
from engram.client.transport import DEFAULT_TIMEOUT, DEFAULT_URL, BlockingTransport, Transport
from engram.core.ids import DEFAULT_BRANCH

T = TypeVar("T")


class EngramClient:
    """A client of one server.  Threads may share it.

        with EngramClient("http://localhost:30000") as client:
            chat = client.conversation("tour")
            print(chat.send("Name a colour.").content)

    Methods raise an `engram.errors.EngramError`: what the server refused as the class it was
    raised as there, with `message`, `hint` and `details`; `ServerUnreachableError` if there is no
    answer; `UpstreamError` for what SGLang itself refused.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Describe a server; nothing is sent.

        Args:
            url: its address, with its root path if it has one.
            api_key: its API key; for most methods the admin API key if it has one.
            timeout: seconds, for each phase of a request.
            retries: of what was answered with 503.
            transport: for tests: what carries the requests.
            sleep: for tests: what waits between retries.
        """
        self._transport: BlockingTransport = Transport(
            url,
            api_key=api_key,
            timeout=timeout,
            retries=retries or Retries(),
            transport=transport,
            sleep=sleep,
        )

    @classmethod
    def over(cls, transport: BlockingTransport) -> EngramClient:
        """A client whose calls go another way than over a network."""
        client = cls.__new__(cls)
        client._transport = transport
        return client

    def conversation(self, conversation_id: str, branch_name: str = DEFAULT_BRANCH) -> Conversation:
        """A branch of a conversation, there or not; nothing is sent."""
        return Conversation(self, Place(conversation_id, branch_name))

    list_conversations = blocking(calls.list_conversations)
    get_conversation = blocking(calls.get_conversation)
    delete_conversation = blocking(calls.delete_conversation)
    set_priority = blocking(calls.set_priority)
    tree_page = blocking(calls.tree_page)
    list_snapshots = blocking(calls.list_snapshots)
    get_snapshot = blocking(calls.get_snapshot)
    find_snapshot = blocking(calls.find_snapshot)
    delete_snapshot = blocking(calls.delete_snapshot)
    update_snapshot = blocking(calls.update_snapshot)
    compare = blocking(calls.compare)
    save = blocking(calls.save)
    restore = blocking(calls.restore)
    restore_snapshot = blocking(calls.restore_snapshot)
    import_snapshots = blocking(calls.import_snapshots)
    branch = blocking(calls.branch)
    create_prefix = blocking(calls.create_prefix)
    list_prefixes = blocking(calls.list_prefixes)
    get_prefix = blocking(calls.get_prefix)
    delete_prefix = blocking(calls.delete_prefix)
    promote = blocking(calls.promote)
    demote = blocking(calls.demote)
    pin = blocking(calls.pin)
    unpin = blocking(calls.unpin)
    explain = blocking(calls.explain)
    tiers = blocking(calls.tiers)
    health = blocking(calls.health)
    texts = blocking(calls.texts)

    def tree(self, conversation_id: str) -> Tree:
        """The turns and branches of a conversation, all of them."""
        page = self.tree_page(conversation_id)
        turns = list(page.turns)
        while page.after is not None:
            page = self.tree_page(conversation_id, after=page.after)
            turns += page.turns
        return Tree(conversation_id=conversation_id, branches=page.branches, snapshots=turns)

    def export_snapshot(
        self, snapshot_id: str, path: str | os.PathLike[str], *, replace: bool = False
    ) -> Exported:
        """Write a snapshot, with all it stands on, to a file, which `import_snapshots` takes.

        The file is there when all of it is. `AlreadyExistsError` for one that is there already, if
        it is not to be replaced.
        """
        with Download(path, replace=replace) as download:
            response = self._run(calls.exported(snapshot_id))
            try:
                for piece in self._transport.parts(response):
                    download.write(piece)
            finally:
                self._transport.end(response)
        return Exported(path=download.path, bytes=download.bytes)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> EngramClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        return self._transport.run(call)


class Conversation:
    """One branch of a conversation; `id` and `branch_name` say which."""

    def __init__(self, client: EngramClient, place: Place) -> None:
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

    send = blocking_at(talking.send)
    regenerate = blocking_at(talking.regenerate)
    extend = blocking_at(talking.extend)
    save = blocking_at(talking.save)
    restore = blocking_at(talking.restore)
    info = blocking_at(talking.info)
    snapshots = blocking_at(talking.snapshots)
    details = blocking_at(talking.details)
    delete = blocking_at(talking.delete)
    set_priority = blocking_at(talking.set_priority)
    pin = blocking_at(talking.pin)
    unpin = blocking_at(talking.unpin)

    def stream(
        self, message: Message, *, from_turn: int | None = None, **options: Any
    ) -> ChatStream:
        """Say something and read the reply as it comes; `send` has the arguments.

        with chat.stream("Hello") as stream:
            for text in stream:
                print(text, end="", flush=True)
        print(stream.reply.usage)
        """
        response = self._run(talking.streamed(self.place, message, from_turn, options))
        return ChatStream(self._client._transport, response)

    def stream_regenerate(self, **options: Any) -> ChatStream:
        """`regenerate` as a stream."""
        response = self._run(talking.streamed_again(self.place, "regenerate", options))
        return ChatStream(self._client._transport, response)

    def stream_extend(self, **options: Any) -> ChatStream:
        """`extend` as a stream."""
        response = self._run(talking.streamed_again(self.place, "continue", options))
        return ChatStream(self._client._transport, response)

    def tree(self) -> Tree:
        """The turns and branches of the whole conversation."""
        return self._client.tree(self.id)

    def branch(self, name: str, *, turn: int | None = None) -> Conversation:
        """A new branch that starts at a turn, the newest if not said otherwise.

        The turn is saved if it is not yet; no state is copied.
        """
        saved = self.save(turn=turn)
        self._client.branch(saved.snapshot_id, branch_name=name)
        return Conversation(self._client, Place(self.id, name))

    def fork(self, conversation_id: str, *, turn: int | None = None) -> Conversation:
        """The same as a new conversation."""
        saved = self.save(turn=turn)
        self._client.branch(saved.snapshot_id, conversation_id=conversation_id)
        return Conversation(self._client, Place(conversation_id))

    def _run(self, call: Call[T]) -> T:
        return self._client._run(call)

    def __repr__(self) -> str:
        return f"Conversation({self.id!r}, {self.branch_name!r})"


class ChatStream:
    """A reply that is coming: iterate over its text; to close it early stops the generation."""

    def __init__(self, transport: BlockingTransport, response: httpx.Response) -> None:
        self._transport = transport
        self._response = response
        self._assembly = Assembly()
        self._reply: Reply | None = None
        self._texts = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._texts

    @property
    def reply(self) -> Reply:
        """The whole reply; what is still to come is read."""
        for _ in self._texts:
            pass
        if self._reply is None:
            self._reply = self._assembly.finish()
        return self._reply

    def _read(self) -> Iterator[str]:
        try:
            for part in self._transport.parts(self._response):
                yield from self._assembly.feed(part)
            self._reply = self._assembly.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Read no further."""
        self._transport.end(self._response)

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
