"""A graph of LangGraph's whose thread is forked, beside one that goes straight on."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, TypedDict

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

from engram.client import EngramClient
from engram.integrations.langgraph import EngramSaver, ModelState, say


class State(TypedDict, total=False):
    question: str
    answer: str
    cached: int
    model: ModelState


def forked(url: str, key: str, path: Path) -> dict[str, Any]:
    """Ask two questions, go back to the first one's checkpoint, ask a third one there."""
    with EngramClient(url, api_key=key) as client:

        def ask(state: State) -> State:
            options = {"max_tokens": 12, "temperature": 0}
            reply, model = say(client, state.get("model"), state["question"], **options)
            assert reply.usage is not None
            return {"answer": reply.content, "cached": reply.usage.cached_tokens, "model": model}

        builder = StateGraph(State)
        builder.add_node("ask", ask)
        builder.add_edge(START, "ask")
        builder.add_edge("ask", END)
        connection = sqlite3.connect(path, check_same_thread=False)
        saver = EngramSaver(SqliteSaver(connection), client)
        graph = builder.compile(checkpointer=saver)

        def invoke(config: Any, question: str) -> State:
            answer: State = graph.invoke({"question": question}, config)
            return answer

        thread, other = ({"configurable": {"thread_id": name}} for name in ("t", "other"))
        invoke(thread, "Name a town.")
        first = graph.get_state(thread)
        invoke(thread, "And one by the sea?")
        fork = invoke(first.config, "And one in the hills?")
        invoke(other, "Name a town.")
        straight = invoke(other, "And one in the hills?")
        saver.delete_thread("t")
        saver.delete_thread("other")
        connection.close()
        return {
            "forked": fork["answer"],
            "straight": straight["answer"],
            "cached": fork["cached"],
            "covered": first.values["model"]["token_count"],
        }
