"""LangGraph: graphs whose state and whose model's state are one.

A `ModelState` is a value of a graph's own state: it names the turn that the model has reached.  So
whatever moves the graph's state moves the model's with it: a resumed thread, a fork from an earlier
checkpoint, a copied thread, branches that run side by side.  `say` goes on from it and returns the
next one; `EngramSaver`, around any other checkpointer, writes with each checkpoint which snapshots
it stands on, and removes them with the last thread that does::

    class State(TypedDict, total=False):
        answer: str
        model: ModelState

    def ask(state: State) -> State:
        reply, model = say(client, state.get("model"), "And then?", max_tokens=64)
        return {"answer": reply.content, "model": model}

    saver = EngramSaver(SqliteSaver(connection), client)

Needs ``pip install "sglang-engram[langgraph]"``.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, TypedDict, TypeGuard

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)

from engram.client import AsyncEngramClient, EngramClient
from engram.client.chat import Message, Reply
from engram.client.results import Saved
from engram.errors import ConversationBusyError, InvalidRequestError, NotFoundError

KIND: Final = "engram.model_state"
BRANCH: Final = "graph"
"""A branch with a name: retention keeps what is on one, as checkpoints are kept."""
METADATA: Final = "engram"
"""Of a checkpoint: the model states that it stands on."""
MAX_DEPTH: Final = 8
"""Model states are looked for in lists and mappings up to here."""


class ModelState(TypedDict):
    """The turn of a conversation that a model has reached; plain JSON, for every serializer.

    `token_count` is how many tokens its stored state covers.
    """

    kind: str
    conversation_id: str
    branch_name: str
    turn_number: int
    snapshot_id: str
    token_count: int


def say(
    client: EngramClient, model: ModelState | None, message: Message, **options: Any
) -> tuple[Reply, ModelState]:
    """Say something to a model in a state, None for a new one; its reply and its state then.

    The reply's turn is durable when this returns. Of several that go on from one state at the same
    time each gets a branch of its own.

    Args:
        client: of the server that has the state.
        model: what the graph's state holds.
        message: what the user says; or messages in OpenAI's form, for other roles.
        options: more fields of a chat completion: `max_tokens`, `temperature`, `tools`, ...

    Raises `NotFoundError` for a state whose snapshot is gone, and as the client's methods do.
    """
    where, branch = _place(model)
    turn = None if model is None else model["turn_number"]
    try:
        reply = client.conversation(where, branch).send(message, from_turn=turn, **options)
    except ConversationBusyError:
        if model is None:
            raise
        branch = _fresh()
        client.branch(model["snapshot_id"], branch_name=branch)
        reply = client.conversation(where, branch).send(message, from_turn=turn, **options)
    return reply, saved(client, where, reply.id)


async def asay(
    client: AsyncEngramClient, model: ModelState | None, message: Message, **options: Any
) -> tuple[Reply, ModelState]:
    """`say` for an async client."""
    where, branch = _place(model)
    turn = None if model is None else model["turn_number"]
    try:
        reply = await client.conversation(where, branch).send(message, from_turn=turn, **options)
    except ConversationBusyError:
        if model is None:
            raise
        branch = _fresh()
        await client.branch(model["snapshot_id"], branch_name=branch)
        reply = await client.conversation(where, branch).send(message, from_turn=turn, **options)
    return reply, await asaved(client, where, reply.id)


def extra_body(model: ModelState | None) -> dict[str, Any]:
    """What an OpenAI client sends as `extra_body` to go on from a state, with only new messages.

    The reply's state is `saved(client, body["conversation_id"], reply.id)`.
    """
    where, branch = _place(model)
    body = {"conversation_id": where, "stateful": True, "branch_name": branch}
    return body if model is None else {**body, "continue_from": _turn(model)}


def saved(client: EngramClient, conversation_id: str, rid: str) -> ModelState:
    """The state after a reply, made durable; `rid` is the reply's `id`."""
    return _state(client.save(conversation_id, rid=rid))


async def asaved(client: AsyncEngramClient, conversation_id: str, rid: str) -> ModelState:
    """`saved` for an async client."""
    return _state(await client.save(conversation_id, rid=rid))


class EngramSaver(BaseCheckpointSaver[Any]):
    """A checkpointer around another one, which keeps the graph's state.

    Each checkpoint's metadata say under ``engram`` which model states it stands on. When a thread
    is deleted, so are the conversations that no checkpoint of another thread stands on.
    """

    def __init__(
        self,
        saver: BaseCheckpointSaver[Any],
        client: EngramClient | None = None,
        aclient: AsyncEngramClient | None = None,
    ) -> None:
        """Describe it; nothing is sent.

        Args:
            saver: keeps the graph's state, such as LangGraph's `SqliteSaver`.
            client: of the server that keeps the model's, for `delete_thread`.
            aclient: the same for `adelete_thread`; the other is used in a thread otherwise.
        """
        super().__init__(serde=saver.serde)
        self._saver = saver
        self._client = client
        self._aclient = aclient

    # ---- what ties the two together ----

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint, with the model states it stands on."""
        return self._saver.put(config, checkpoint, _tied(checkpoint, metadata), new_versions)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """`put`, asynchronously."""
        tied = _tied(checkpoint, metadata)
        return await self._saver.aput(config, checkpoint, tied, new_versions)

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread, and the conversations that only its checkpoints stand on.

        If it fails in between, the thread is gone and its conversations may be left; what the
        client raises says so.
        """
        named = _conversations(self._saver.list(_thread(thread_id)))
        self._saver.delete_thread(thread_id)
        for one in named:
            if next(self._saver.list(None, filter={one: True}, limit=1), None) is None:
                _delete(self._require_client(), one)

    async def adelete_thread(self, thread_id: str) -> None:
        """`delete_thread`, asynchronously."""
        found = [one async for one in self._saver.alist(_thread(thread_id))]
        named = _conversations(found)
        await self._saver.adelete_thread(thread_id)
        for one in named:
            others = self._saver.alist(None, filter={one: True}, limit=1)
            if await anext(others, None) is None:
                await self._adelete(one)

    def _require_client(self) -> EngramClient:
        if self._client is None:
            raise InvalidRequestError(
                "an EngramSaver without a client cannot delete what a thread stands on",
                hint="EngramSaver(saver, client)",
            )
        return self._client

    async def _adelete(self, conversation_id: str) -> None:
        if self._aclient is None:
            await asyncio.to_thread(_delete, self._require_client(), conversation_id)
            return
        with contextlib.suppress(NotFoundError):  # somebody was quicker
            await self._aclient.delete_conversation(conversation_id)

    # ---- the rest is the other checkpointer's ----

    @property
    def config_specs(self) -> list[Any]:
        """As the checkpointer within."""
        return self._saver.config_specs

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As the checkpointer within."""
        return self._saver.get_tuple(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As the checkpointer within."""
        return await self._saver.aget_tuple(config)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """As the checkpointer within."""
        return self._saver.list(config, filter=filter, before=before, limit=limit)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """As the checkpointer within."""
        async for one in self._saver.alist(config, filter=filter, before=before, limit=limit):
            yield one

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As the checkpointer within."""
        self._saver.put_writes(config, writes, task_id, task_path)

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """As the checkpointer within."""
        await self._saver.aput_writes(config, writes, task_id, task_path)

    def get_next_version(self, current: Any, channel: None) -> Any:
        """As the checkpointer within."""
        return self._saver.get_next_version(current, channel)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, Any]:
        """As the checkpointer within."""
        return self._saver.get_delta_channel_history(config=config, channels=channels)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, Any]:
        """As the checkpointer within."""
        return await self._saver.aget_delta_channel_history(config=config, channels=channels)

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> EngramSaver:
        """As the checkpointer within."""
        within = self._saver.with_allowlist(extra_allowlist)
        return EngramSaver(within, self._client, self._aclient)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """As the checkpointer within; conversations stay until their threads are deleted."""
        self._saver.delete_for_runs(run_ids)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """As the checkpointer within; conversations stay until their threads are deleted."""
        await self._saver.adelete_for_runs(run_ids)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As the checkpointer within; the copy stands on the same model states."""
        self._saver.copy_thread(source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As the checkpointer within; the copy stands on the same model states."""
        await self._saver.acopy_thread(source_thread_id, target_thread_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """As the checkpointer within; conversations stay until their threads are deleted."""
        self._saver.prune(thread_ids, strategy=strategy)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """As the checkpointer within; conversations stay until their threads are deleted."""
        await self._saver.aprune(thread_ids, strategy=strategy)


def model_states(value: Any, depth: int = MAX_DEPTH) -> Iterator[ModelState]:
    """The model states in a value of a graph's state, also inside lists and mappings."""
    if is_model_state(value):
        yield value
    elif depth and isinstance(value, Mapping):
        for one in value.values():
            yield from model_states(one, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for one in value:
            yield from model_states(one, depth - 1)


def is_model_state(value: Any) -> TypeGuard[ModelState]:
    """Whether a value of a graph's state is a model's."""
    return isinstance(value, dict) and value.get("kind") == KIND


def _tied(checkpoint: Checkpoint, metadata: CheckpointMetadata) -> CheckpointMetadata:
    found = {one["snapshot_id"]: one for one in model_states(checkpoint["channel_values"])}
    if not found:
        return metadata
    tied: Any = {**metadata, METADATA: list(found.values())}
    # To be found by: whether any checkpoint stands on a conversation.
    tied |= {one["conversation_id"]: True for one in found.values()}
    return tied  # type: ignore[no-any-return]


def _conversations(checkpoints: Iterator[CheckpointTuple] | Sequence[CheckpointTuple]) -> set[str]:
    return {
        state["conversation_id"]
        for one in checkpoints
        for state in model_states(one.metadata.get(METADATA))
    }


def _thread(thread_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id}}


def _delete(client: EngramClient, conversation_id: str) -> None:
    with contextlib.suppress(NotFoundError):  # somebody was quicker
        client.delete_conversation(conversation_id)


def _place(model: ModelState | None) -> tuple[str, str]:
    """The conversation and the branch that a reply to a state is on."""
    if model is None:
        # A beginning of its own each time: a node that is run again must find nothing there.
        return f"langgraph-{uuid.uuid4().hex}", BRANCH
    if not is_model_state(model):
        raise InvalidRequestError(
            "model is no ModelState", hint="begin with None, then pass what say() returned"
        )
    return model["conversation_id"], model["branch_name"]


def _turn(model: ModelState) -> dict[str, Any]:
    return {"branch_name": model["branch_name"], "turn_number": model["turn_number"]}


def _fresh() -> str:
    return f"{BRANCH}-{uuid.uuid4().hex}"


def _state(saved: Saved) -> ModelState:
    return ModelState(
        kind=KIND,
        conversation_id=saved.conversation_id,
        branch_name=saved.branch_name,
        turn_number=saved.turn_number,
        snapshot_id=saved.snapshot_id,
        token_count=saved.token_count,
    )
