"""Explorations: runs from one turn on branches of their own, of which one is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engram.agents import runs
from engram.agents.host import AgentHost
from engram.agents.requests import ExploreRequest, RunRequest
from engram.conversation.turns import Tag
from engram.errors import (
    AgentsBusyError,
    InvalidRequestError,
    NotFoundError,
    RunConflictError,
    StoreFullError,
    UnsupportedError,
)
from unit.agents.scripted import END, ScriptedChat, calling, host_of, server_in
from unit.service.engine import Server

T = TypeVar("T")


def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
    asked = body["messages"][0]["content"]
    if asked == "sum" and number == 0:
        return calling(("calculator", {"expression": "6 * 7"}))
    return f"re: {asked}"


def using(
    folder: Path,
    work: Callable[[Server, AgentHost, ScriptedChat], Awaitable[T]],
    script: Any = script,
) -> T:
    async def run() -> T:
        server = server_in(folder)
        host, chat = host_of(server, script, folder / "agents.sqlite")
        await host.start()
        try:
            return await work(server, host, chat)
        finally:
            await host.close()
            server.stop()

    return asyncio.run(asyncio.wait_for(run(), 120))


def asking(*contents: str, **fields: Any) -> ExploreRequest:
    tasks = [
        {"messages": [{"role": "user", "content": content}], "tools": ["calculator"]}
        for content in contents
    ]
    return ExploreRequest.model_validate({"conversation_id": "c", "branches": tasks, **fields})


async def explored(host: AgentHost, request: ExploreRequest) -> dict[str, Any]:
    made = await host.explorations.create("", request)
    await host.explorations.ended("", made)
    return await host.explorations.get("", made)


async def branches_of(server: Server) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in await server.service.list("", "c"):
        found.setdefault(row.branch_name, []).append(row.turn_number)
    return found


def test_branches_begin_at_one_turn_and_one_is_kept(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c", turns=2)
        begins = await server.service.recorded.find(Tag("c"), 1)
        assert begins is not None
        found = await explored(host, asking("walk", "sum", "wait", turn_number=1))
        names = [branch["branch_name"] for branch in found["branches"]]
        assert found["status"] == "over"
        assert [b["status"] for b in found["branches"]] == ["completed"] * 3
        assert [b["result"]["content"] for b in found["branches"]] == [
            "re: walk",
            "re: sum",
            "re: wait",
        ]
        assert [b["iterations"] for b in found["branches"]] == [1, 2, 1]
        # All begin with the tokens of turn 1 and part at the first letter that differs.
        assert found["common_tokens"] == len(begins.tokens) + len(b"<user>")
        assert [branch["text"][:4] for branch in found["branches"]] == ["walk", "sum<", "wait"]
        for asked in chat.asked:
            prompt = asked.get("input_ids")
            assert prompt is None or prompt[: len(begins.tokens)] == begins.tokens.tolist()
        saved = await branches_of(server)
        assert saved == {"main": [1], names[0]: [2], names[1]: [2, 3], names[2]: [2]}
        rows = await server.service.list("", "c")
        assert {row.branch_name for row in rows if row.expires_at is not None} == set(names)

        kept = await host.explorations.keep("", found["exploration_id"], names[1])
        assert sorted(kept.dropped) == sorted([names[0], names[2]])
        assert (kept.snapshot.branch_name, kept.snapshot.turn_number) == (names[1], 3)
        assert await branches_of(server) == {"main": [1], names[1]: [2, 3]}
        rows = await server.service.list("", "c")
        assert all(row.expires_at is None for row in rows)
        assert [run.run_id for run in await host.runs.newest("", 10)] == [kept.run_id]
        for again in (host.explorations.get, host.explorations.drop):
            with pytest.raises(NotFoundError, match="no exploration"):
                await again("", found["exploration_id"])
        # The conversation goes on from it, on its main branch.
        request = RunRequest.model_validate(
            {
                "conversation_id": "c",
                "continue_from": {"branch_name": names[1]},
                "messages": [{"role": "user", "content": "go on"}],
            }
        )
        run = await host.runs.create("", request)
        await host.runs.ended(run.run_id)
        turn = await server.service.recorded.find(Tag("c"))
        whole = await server.service.recorded.find(Tag("c", names[1]))
        assert turn is not None
        assert whole is not None
        assert turn.number == 4
        assert turn.tokens[: len(whole.tokens)].tolist() == whole.tokens.tolist()

    using(tmp_path, work)


def test_all_are_dropped(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        found = await explored(host, asking("a", "b"))
        assert len(await host.explorations.drop("", found["exploration_id"])) == 2
        assert await branches_of(server) == {"main": [1]}
        assert await host.runs.newest("", 10) == []
        for branch in found["branches"]:
            assert await server.service.recorded.find(Tag("c", branch["branch_name"])) is None

    using(tmp_path, work)


def test_what_cannot_be_explored(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        explorations = host.explorations
        with pytest.raises(NotFoundError, match="no turn is recorded"):
            await explorations.create("", asking("a", "b"))
        await server.chat("c")
        for wrong in ({"turn_number": 7}, {"branch_name": "none"}):
            with pytest.raises(NotFoundError, match="recorded"):
                await explorations.create("", asking("a", "b", **wrong))
        request = asking("a", "b")
        request.branches[1].tools = ["none"]
        with pytest.raises(NotFoundError, match="no tool"):
            await explorations.create("", request)
        request = asking("a", "b")
        request.branches[1].checkpoint = False
        with pytest.raises(InvalidRequestError, match="checkpoint"):
            await explorations.create("", request)
        assert await host.runs.newest("", 10) == []
        found = await explored(host, asking("a", "b"))
        name = found["exploration_id"]
        with pytest.raises(NotFoundError, match="no branch"):
            await explorations.keep("", name, "main")
        with pytest.raises(NotFoundError, match="no exploration"):
            await explorations.keep("somebody", name, found["branches"][0]["branch_name"])
        request = RunRequest.model_validate(
            {"continue_from": {"turn_number": 1}, "messages": [{"role": "user", "content": "x"}]}
        )
        with pytest.raises(InvalidRequestError, match="conversation_id"):
            await host.runs.create("", request)

    using(tmp_path, work)


def test_what_cannot_begin_as_a_whole_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        monkeypatch.setattr(runs, "MAX_ACTIVE_RUNS", 2)
        with pytest.raises(AgentsBusyError):
            await host.explorations.create("", asking("a", "b", "c"))
        assert host.runs.active == 0
        assert await host.runs.newest("", 10) == []
        assert await branches_of(server) == {"main": [1]}
        assert (await explored(host, asking("a", "b")))["status"] == "over"

    using(tmp_path, work)


def test_a_branch_under_way_is_not_kept_and_is_ended_when_dropped(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        complete = chat.complete

        async def gated(body: Any, *more: Any) -> Any:
            if body["messages"][0]["content"] == "slow":
                await gate.wait()
            return await complete(body, *more)

        chat.complete = gated  # type: ignore[method-assign]
        made = await host.explorations.create("", asking("quick", "slow"))
        quick, slow = (await host.explorations.get("", made))["branches"]
        await host.runs.ended(quick["run_id"])
        assert (await host.explorations.get("", made))["status"] == "running"
        with pytest.raises(RunConflictError, match="under way"):
            await host.explorations.keep("", made, slow["branch_name"])
        kept = await host.explorations.keep("", made, quick["branch_name"])
        assert kept.dropped == [slow["branch_name"]]
        assert host.runs.active == 0
        assert set(await branches_of(server)) == {"main", quick["branch_name"]}

    using(tmp_path, work)


@pytest.mark.parametrize("failing", range(4))
def test_a_decision_that_fails_in_between_is_made_when_it_is_asked_for_again(
    tmp_path: Path, failing: int
) -> None:
    """Wherever it stops, the branch that is to be kept is there, and so is the exploration."""

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        found = await explored(host, asking("a", "b", "c"))
        made, names = found["exploration_id"], [b["branch_name"] for b in found["branches"]]
        places: list[tuple[Any, str]] = [
            (host.service, "change"),
            (host.service, "delete_branch"),
            (host.explorations._journal, "remove"),
            (host.explorations._journal, "explored_no_more"),
        ]
        place, method = places[failing]
        original, calls = getattr(place, method), []

        async def once(*arguments: Any, **named: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 1:
                raise StoreFullError("full")
            return await original(*arguments, **named)

        setattr(place, method, once)
        with pytest.raises(StoreFullError):
            await host.explorations.keep("", made, names[1])
        again = await host.explorations.get("", made)
        assert names[1] in [branch["branch_name"] for branch in again["branches"]]
        assert names[1] in await branches_of(server)
        kept = await host.explorations.keep("", made, names[1])
        assert kept.snapshot.branch_name == names[1]
        assert await branches_of(server) == {"main": [1], names[1]: [2]}
        assert [run.run_id for run in await host.runs.newest("", 10)] == [kept.run_id]

    using(tmp_path, work)


def test_of_two_decisions_at_the_same_time_one_holds(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        found = await explored(host, asking("a", "b"))
        names = [branch["branch_name"] for branch in found["branches"]]
        keep = [host.explorations.keep("", found["exploration_id"], name) for name in names]
        first, second = await asyncio.gather(*keep, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert first.snapshot.branch_name == names[0]
        assert isinstance(second, RunConflictError)
        assert await branches_of(server) == {"main": [1], names[0]: [2]}

    using(tmp_path, work)


def test_after_a_restart_it_is_kept_as_before(tmp_path: Path) -> None:
    async def first(server: Server, host: AgentHost, chat: ScriptedChat) -> dict[str, Any]:
        await server.chat("c")
        return await explored(host, asking("a", "b"))

    async def second(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        again = await host.explorations.get("", found["exploration_id"])
        assert again == found
        name = found["branches"][0]["branch_name"]
        kept = await host.explorations.keep("", found["exploration_id"], name)
        assert kept.snapshot.turn_number == 2
        assert await branches_of(server) == {"main": [1], name: [2]}

    found = using(tmp_path, first)
    using(tmp_path, second)


def test_a_template_that_cannot_go_on_is_refused(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        chat.forgetful = True
        found = await explored(host, asking("sum", "walk"))
        failed, done = found["branches"]
        assert (failed["status"], failed["result"]["error"]) == ("failed", UnsupportedError.code)
        assert done["status"] == "completed"

    using(tmp_path, work)


def test_the_tools(tmp_path: Path) -> None:
    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        chat.parses_tool_calls = False
        where = {"call_id": "x", "conversation_id": "c"}
        arguments = {"prompts": ["a", "b", "c"], "max_tokens": 9}
        found = (await host.execute("", "conversation_explore", arguments, **where)).value
        assert [branch["result"]["content"] for branch in found["branches"]] == [
            "re: a",
            "re: b",
            "re: c",
        ]
        assert all("tools" not in asked and asked["max_tokens"] == 9 for asked in chat.asked)
        chosen = {
            "exploration_id": found["exploration_id"],
            "branch_name": found["branches"][2]["branch_name"],
        }
        kept = (await host.execute("", "conversation_keep", chosen, **where)).value
        assert kept["kept"]["branch_name"] == chosen["branch_name"]
        assert len(kept["dropped"]) == 2

    using(tmp_path, work)


def test_tokens_end_with_the_reply(tmp_path: Path) -> None:
    """The tokens of a branch are those that the next reply would go on from."""

    async def work(server: Server, host: AgentHost, chat: ScriptedChat) -> None:
        await server.chat("c")
        found = await explored(host, asking("a", "b"))
        for branch in found["branches"]:
            turn = await server.service.recorded.find(Tag("c", branch["branch_name"]))
            assert turn is not None
            assert branch["tokens"] == len(turn.tokens)
            assert turn.tokens[-1] == END

    using(tmp_path, work)
