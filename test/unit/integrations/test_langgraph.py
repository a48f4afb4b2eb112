"""Graphs and their models go back and forth together, over the real routes and client."""

from __future__ import annotations

import asyncio
import json
import operator
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, Response

pytest.importorskip("langgraph", reason="the extra langgraph is not installed")

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from engram.client import AsyncEngramClient, EngramClient
from engram.conversation.turns import RunningRequest
from engram.core.tokens import to_tokens
from engram.errors import ConversationBusyError, InvalidRequestError, NotFoundError
from engram.integrations.langgraph import (
    BRANCH,
    METADATA,
    EngramSaver,
    ModelState,
    asay,
    extra_body,
    model_states,
    say,
)
from engram.server.chat import chat_router
from engram.server.stateful import CURRENT_STATEFUL
from engram.server.tagging import CURRENT_TAG
from engram.testing.samples import seeded_random
from unit.client.live import Live, app_of, serving
from unit.service.engine import Server

CAPABILITIES = {"delete_for_runs", "copy_thread", "prune"}
"""Those that neither of LangGraph's own checkpointers here has."""


class Echo:
    """A model that answers with all it has heard (`engram.server.chat.ChatEngine`)."""

    fields = frozenset({"messages", "max_tokens"})

    def __init__(self, server: Server) -> None:
        self._server = server
        self._count = 0
        self.crowd: asyncio.Event | None = None
        """Set when a request was refused because another is under way; the other waits for it."""

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        service = self._server.service
        tag, asked = CURRENT_TAG.get(), CURRENT_STATEFUL.get()
        assert tag is not None
        assert asked is not None
        start = await service.recorded.start(
            tag.tenant, tag.conversation_id, asked.branch_name, asked.source
        )
        try:
            service.recorded.hold(start.tag)
        except ConversationBusyError:
            assert self.crowd is not None
            self.crowd.set()
            raise
        try:
            if self.crowd is not None:
                await self.crowd.wait()
            before = [] if start.source is None else start.source.tokens.tolist()
            new = "".join(f"<{message['content']}>" for message in body["messages"])
            prompt = [*before, *new.encode()]
            self._count += 1
            rid = f"reply-{self._count}"
            await service.gate.admit(RunningRequest(rid, to_tokens(prompt), start.tag))
            heard = "".join(map(chr, prompt)).replace("!", "")
            self._server.engine.computed([*prompt, ord("!")])
            service.gate.finished(rid, [ord("!")])
        finally:
            service.recorded.release(start.tag)
        message = {"role": "assistant", "content": heard}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": rid, "object": "chat.completion", "choices": [choice]})


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[tuple[Live, Echo]]:
    server = Server.start(tmp_path / "store", seeded_random())
    echo = Echo(server)
    app = app_of(server)
    app.include_router(chat_router(echo))
    with serving(server, app) as live:
        yield live, echo
    server.stop()


@pytest.fixture
def client(echo: tuple[Live, Echo]) -> Iterator[EngramClient]:
    with EngramClient(echo[0].url) as client:
        yield client


class State(TypedDict, total=False):
    ask: str
    answer: str
    model: ModelState


def graph_of(client: EngramClient, saver: BaseCheckpointSaver[Any]) -> Any:
    def ask(state: State) -> State:
        reply, model = say(client, state.get("model"), state["ask"])
        return {"answer": reply.content, "model": model}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    builder.add_edge("ask", END)
    return builder.compile(checkpointer=saver)


def of(thread: str, checkpoint: str | None = None) -> Any:
    named = {} if checkpoint is None else {"checkpoint_id": checkpoint}
    return {"configurable": {"thread_id": thread, **named}}


def sqlite(path: Path) -> SqliteSaver:
    return SqliteSaver(sqlite3.connect(path, check_same_thread=False))


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_going_back_takes_the_model_along(
    client: EngramClient, tmp_path: Path, durability: str
) -> None:
    saver = EngramSaver(sqlite(tmp_path / "graph.sqlite"), client)
    graph = graph_of(client, saver)
    ids = []
    for number in range(3):
        said = graph.invoke({"ask": str(number)}, of("t"), durability=durability)
        ids.append(graph.get_state(of("t")).config["configurable"]["checkpoint_id"])
    assert said["answer"] == "<0><1><2>"
    back = graph.invoke({"ask": "x"}, of("t", ids[0]), durability=durability)
    assert back["answer"] == "<0><x>"
    again = graph.invoke({"ask": "y"}, of("t", ids[2]), durability=durability)
    assert again["answer"] == "<0><1><2><y>"
    once_more = graph.invoke({"ask": "z"}, of("t", ids[0]), durability=durability)
    assert once_more["answer"] == "<0><z>"
    on = graph.invoke({"ask": "!"}, of("t"), durability=durability)
    assert on["answer"] == "<0><z><>"
    # Each checkpoint says which snapshot it stands on, and that is there.
    for number, checkpoint in enumerate(ids, 1):
        found = saver.get_tuple(of("t", checkpoint))
        assert found is not None
        (model,) = found.metadata[METADATA]  # type: ignore[typeddict-item]
        assert model == found.checkpoint["channel_values"]["model"]
        snapshot = client.get_snapshot(model["snapshot_id"])
        assert snapshot.turn_number == model["turn_number"] == number
        assert (snapshot.branch_name, snapshot.token_count) == (BRANCH, model["token_count"])


def test_a_killed_process_finds_both(client: EngramClient, tmp_path: Path) -> None:
    """The graph's state is in a file, the model's on the server; nothing else is needed."""
    path = tmp_path / "graph.sqlite"
    graph_of(client, EngramSaver(sqlite(path), client)).invoke({"ask": "a"}, of("t"))
    with EngramClient(client.url) as other:
        graph = graph_of(other, EngramSaver(sqlite(path), other))
        assert graph.invoke({"ask": "b"}, of("t"))["answer"] == "<a><b>"


def test_a_node_that_fails_behind_its_reply_is_run_again_from_where_it_began(
    client: EngramClient, tmp_path: Path
) -> None:
    fail = threading.Event()

    def ask(state: State) -> State:
        reply, model = say(client, state.get("model"), state["ask"])
        if fail.is_set():
            raise RuntimeError("no bread")
        return {"answer": reply.content, "model": model}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph = builder.compile(checkpointer=EngramSaver(sqlite(tmp_path / "g.sqlite"), client))
    graph.invoke({"ask": "a"}, of("t"))
    fail.set()
    with pytest.raises(RuntimeError):
        graph.invoke({"ask": "b"}, of("t"))
    fail.clear()
    assert graph.invoke(None, of("t"))["answer"] == "<a><b>"


class Models(TypedDict, total=False):
    model: ModelState
    answers: Annotated[list[str], operator.add]
    models: Annotated[list[ModelState], operator.add]


def test_nodes_side_by_side_get_branches_of_their_own(
    echo: tuple[Live, Echo], client: EngramClient
) -> None:
    live, model = echo

    def first(state: Models) -> Models:
        return {"model": say(client, None, "first")[1]}

    def node(name: str) -> Any:
        def ask(state: Models) -> Models:
            reply, after = say(client, state["model"], name)
            return {"answers": [reply.content], "models": [after]}

        return ask

    builder = StateGraph(Models)
    builder.add_node("first", first)
    builder.add_edge(START, "first")
    for name in ("one", "two"):
        builder.add_node(name, node(name))
        builder.add_edge("first", name)
    builder.add_node("crowd", lambda state: {})
    graph = builder.compile(checkpointer=EngramSaver(InMemorySaver(), client))
    whole = graph.stream({"answers": [], "models": []}, of("t"), stream_mode="values")
    for state in whole:
        if state.get("model") is not None and model.crowd is None:
            model.crowd = live.run(_event())
    assert sorted(state["answers"]) == ["<first><one>", "<first><two>"]
    branches = [one["branch_name"] for one in state["models"]]
    assert len(set(branches)) == 2
    assert BRANCH in branches
    found = graph.get_state(of("t")).metadata[METADATA]
    assert {one["snapshot_id"] for one in found} == {
        one["snapshot_id"] for one in (*state["models"], state["model"])
    }


async def _event() -> asyncio.Event:
    return asyncio.Event()


def test_a_deleted_thread_takes_its_conversations_along(
    client: EngramClient, tmp_path: Path
) -> None:
    saver = EngramSaver(sqlite(tmp_path / "graph.sqlite"), client)
    graph = graph_of(client, saver)
    for thread in ("one", "other"):
        graph.invoke({"ask": "a"}, of(thread))
    shared = graph.get_state(of("one")).values["model"]
    graph.update_state(of("copy"), {"ask": "b", "answer": "", "model": shared}, as_node="ask")
    assert len(client.list_conversations().conversations) == 2
    saver.delete_thread("one")
    # The copy still stands on it.
    assert graph.invoke({"ask": "c"}, of("copy"))["answer"] == "<a><c>"
    assert len(client.list_conversations().conversations) == 2
    saver.delete_thread("copy")
    (left,) = client.list_conversations().conversations
    assert left.conversation_id == graph.get_state(of("other")).values["model"]["conversation_id"]
    client.delete_conversation(left.conversation_id)
    saver.delete_thread("other")
    assert list(saver.list(None)) == []
    graph.invoke({"ask": "a"}, of("one"))
    lonely = EngramSaver(saver._saver)
    with pytest.raises(InvalidRequestError, match="without a client"):
        lonely.delete_thread("one")


def test_a_state_whose_snapshot_is_gone_is_told(client: EngramClient) -> None:
    _, model = say(client, None, "a")
    client.delete_conversation(model["conversation_id"])
    with pytest.raises(NotFoundError):
        say(client, model, "b")


def test_what_is_no_model_state(client: EngramClient) -> None:
    with pytest.raises(InvalidRequestError, match="no ModelState"):
        say(client, {"conversation_id": "c"}, "b")  # type: ignore[typeddict-item]
    _, model = say(client, None, "a")
    assert list(model_states({"a": [model], "b": 1, "c": ({"d": model},)})) == [model, model]
    deep: Any = model
    for _ in range(100):
        deep = [deep]
    assert list(model_states(deep)) == []
    assert json.loads(json.dumps(model)) == model


def test_what_an_openai_client_sends(client: EngramClient) -> None:
    first, second = extra_body(None), extra_body(None)
    assert first["conversation_id"] != second["conversation_id"]
    assert first["stateful"] is True
    _, model = say(client, None, "a")
    assert extra_body(model) == {
        "conversation_id": model["conversation_id"],
        "stateful": True,
        "branch_name": BRANCH,
        "continue_from": {"branch_name": BRANCH, "turn_number": 1},
    }


def test_the_same_for_asyncio(echo: tuple[Live, Echo], tmp_path: Path) -> None:
    async def run() -> None:
        path = str(tmp_path / "graph.sqlite")
        async with (
            AsyncEngramClient(echo[0].url) as client,
            AsyncSqliteSaver.from_conn_string(path) as within,
        ):

            async def ask(state: State) -> State:
                reply, model = await asay(client, state.get("model"), state["ask"])
                return {"answer": reply.content, "model": model}

            builder = StateGraph(State)
            builder.add_node("ask", ask)
            builder.add_edge(START, "ask")
            saver = EngramSaver(within, aclient=client)
            graph = builder.compile(checkpointer=saver)
            await graph.ainvoke({"ask": "a"}, of("t"))
            first = (await graph.aget_state(of("t"))).config["configurable"]["checkpoint_id"]
            assert (await graph.ainvoke({"ask": "b"}, of("t")))["answer"] == "<a><b>"
            assert (await graph.ainvoke({"ask": "x"}, of("t", first)))["answer"] == "<a><x>"
            await saver.adelete_thread("t")
            assert (await client.list_conversations()).conversations == []
            await graph.ainvoke({"ask": "a"}, of("t"))
            with EngramClient(client.url) as blocking:
                await EngramSaver(within, blocking).adelete_thread("t")
            assert (await client.list_conversations()).conversations == []

    asyncio.run(run())


async def _memory() -> AsyncIterator[BaseCheckpointSaver[Any]]:
    yield EngramSaver(InMemorySaver())


async def _sqlite() -> AsyncIterator[BaseCheckpointSaver[Any]]:
    async with AsyncSqliteSaver.from_conn_string(":memory:") as within:
        yield EngramSaver(within)


@pytest.mark.parametrize("factory", [_memory, _sqlite])
def test_the_conformance_suite(factory: Any) -> None:
    """LangGraph's own, for whatever the checkpointer within can do."""
    registered = checkpointer_test(factory.__name__, skip_capabilities=CAPABILITIES)(factory)
    report = asyncio.run(validate(registered))
    assert report.passed_all_base()
    done = {name: result for name, result in report.results.items() if name not in CAPABILITIES}
    assert all(result.passed for result in done.values()), {
        name: result.failures for name, result in done.items()
    }
    assert sum(result.tests_passed for result in done.values()) > 30
