"""The loop of a run, and what its journal makes of a kill at any point."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engram.agents import database, runs
from engram.agents.database import AgentDatabase
from engram.agents.events import Interest
from engram.agents.execution import ToolExecutor
from engram.agents.journal import Retention, Run
from engram.agents.requests import RunRequest
from engram.agents.runs import RunManager
from engram.agents.tool import ToolContext, make_tool
from engram.errors import (
    InvalidRequestError,
    NotFoundError,
    RunConflictError,
    StoreFullError,
    UnsupportedError,
)
from unit.agents.scripted import END, Script, ScriptedChat, calling, host_of, server_in

T = TypeVar("T")
HELLO = [{"role": "user", "content": "hello"}]


def counting(folder: Path) -> list[Any]:
    """A tool that counts, and one that counts each call once, however often it is made."""

    def written(context: ToolContext) -> None:
        with (folder / "counts").open("a") as file:
            file.write(context.call_id + "\n")

    async def count(context: ToolContext, by: int) -> int:
        """Count."""
        written(context)
        return by

    async def careful(context: ToolContext, by: int) -> int:
        """Count once."""
        if context.call_id not in counted(folder):
            written(context)
        return by

    return [make_tool(count, isolated=False), make_tool(careful, isolated=False, idempotent=True)]


def counted(folder: Path) -> list[str]:
    path = folder / "counts"
    return path.read_text().splitlines() if path.exists() else []


def hanging(folder: Path) -> Any:
    async def hang() -> None:
        """Never end."""
        (folder / "hanging").touch()
        await asyncio.sleep(600)

    return make_tool(hang, isolated=False)


def using(
    folder: Path,
    script: Script,
    work: Callable[[RunManager, ScriptedChat], Awaitable[T]],
    *,
    at_write: Callable[[int], None] = lambda number: None,
    save: Exception | None = None,
) -> T:
    """What `work` returns with the runs of a server that begins and ends for it."""

    async def run() -> T:
        server = server_in(folder, agent_max_iterations=5, agent_max_tool_calls_per_iteration=2)
        host, chat = host_of(server, script, folder / "agents.sqlite")
        _hook(host._database, at_write)
        await host.start()
        host.executor = ToolExecutor([*counting(folder), hanging(folder)], timeout=60.0)
        host.runs._executor = host.executor
        if save is not None:

            async def failing(conversation_id: str, rid: str, lasts: float | None) -> str:
                raise save

            host.runs._save_turn = failing
        try:
            return await work(host.runs, chat)
        finally:
            await host.close()
            server.stop()

    return asyncio.run(run())


def _hook(database: AgentDatabase, at_write: Callable[[int], None]) -> None:
    """Have `at_write` called before (2n) and after (2n + 1) the n-th transaction."""
    do, number = database._do, 0

    def watched(work: Any) -> Any:
        nonlocal number
        at_write(number)
        found = do(work)
        at_write(number + 1)
        number += 2
        return found

    database._do = watched  # type: ignore[method-assign]


async def over(runs: RunManager, run: Run) -> Run:
    async for _ in runs.stream("", run.run_id):
        pass
    return await runs.get("", run.run_id)


def request(**fields: Any) -> RunRequest:
    return RunRequest.model_validate({"messages": HELLO, **fields})


def two_steps(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
    return [
        calling(("count", {"by": 1}), ("count", {"by": 2})),
        calling(("count", {"by": 3})),
        "done",
    ][number]


def outcomes(run: Run) -> list[list[Any]]:
    return [[call.outcome for call in step.calls] for step in run.steps]


def test_a_run_to_its_end(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> Run:
        run = await over(runs, await runs.create("", request(conversation_id="c")))
        events = [event async for _, event in runs.stream("", run.run_id)]
        assert [event["event"] for event in events if event["event"][:4] == "run_"] == [
            "run_started",
            *("run_step", "run_checkpoint") * 3,
            "run_finished",
        ]
        assert {event["run_id"] for event in events} == {run.run_id}
        rest = [event async for _, event in runs.stream("", run.run_id, after=len(events) - 1)]
        assert [event["event"] for event in rest] == ["run_finished"]
        assert [one.run_id for one in await runs.newest("", 10)] == [run.run_id]
        return run

    run = using(tmp_path, two_steps, work)
    assert (run.status, run.conversation_id) == ("completed", "c")
    assert outcomes(run) == [[{"result": 1}, {"result": 2}], [{"result": 3}], []]
    assert run.result == {
        "content": "done",
        "finish_reason": "stop",
        "iterations": 3,
        "tool_calls": 3,
    }
    assert all(step.reply["snapshot_id"] for step in run.steps)


def test_a_reply_continues_the_tokens_of_the_last(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await over(runs, await runs.create("", request(conversation_id="c")))
        first, second, third = chat.asked
        assert "input_ids" not in first
        written = json.dumps(run.steps[0].reply["message"]).encode()
        assert second["input_ids"] == [
            *b"<user>hello<assistant>",
            *written,
            END,
            *b"<tool>1<tool>2<assistant>",
        ]
        again = json.dumps(run.steps[1].reply["message"]).encode()
        assert third["input_ids"] == [*second["input_ids"], *again, END, *b"<tool>3<assistant>"]
        assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool", "tool"]

    using(tmp_path, two_steps, work)


def test_a_template_that_depends_on_what_follows_is_rendered_anew(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        chat.forgetful = True
        run = await over(runs, await runs.create("", request()))
        assert run.status == "completed"
        assert not any("input_ids" in asked for asked in chat.asked)
        assert all(step.reply["rendered"] for step in run.steps)

    using(tmp_path, two_steps, work)


def test_choices_tools_and_sampling_reach_the_model(tmp_path: Path) -> None:
    named = {"type": "function", "function": {"name": "count"}}

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        asked = request(
            tools=["count"],
            tool_choice=[named, "required", "none"],
            temperature=0,
            max_tokens=7,
            seed=3,
            response_format={"type": "json_object"},
            parallel_tool_calls=False,
        )
        await over(runs, await runs.create("", asked))
        assert [body["tool_choice"] for body in chat.asked] == [named, "required", "none"]
        assert [("response_format" in body) for body in chat.asked] == [False, False, True]
        for body in chat.asked:
            assert [tool["function"]["name"] for tool in body["tools"]] == ["count"]
            assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 7, 3)
            assert body["parallel_tool_calls"] is False

    using(tmp_path, two_steps, work)


def test_what_a_model_gets_wrong_is_told_to_it(tmp_path: Path) -> None:
    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        return [
            calling(("sing", {}), ("count", "{")),
            calling(("count", "[1]"), ("count", {"by": "x"}), ("count", {"by": 1})),
            calling(("count", '{"by": NaN}'), ("count", '{"by": "\\ud800"}')),
            "done",
        ][number]

    async def work(runs: RunManager, chat: ScriptedChat) -> Run:
        return await over(runs, await runs.create("", request()))

    run = using(tmp_path, script, work)
    assert run.status == "completed"
    messages = [call.outcome["error"]["message"] for step in run.steps for call in step.calls]  # type: ignore[index]
    for message, told in zip(
        messages,
        (
            *("no tool 'sing'", "not JSON", "no JSON object", "by:", "only 2"),
            *("not JSON: Out of range", "not JSON: 'utf-8'"),
        ),
        strict=True,
    ):
        assert told in message
    assert not (tmp_path / "counts").exists()


def test_a_run_ends_at_its_limit(tmp_path: Path) -> None:
    def for_ever(number: int, body: Mapping[str, Any]) -> dict[str, Any]:
        return calling(("count", {"by": number}))

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await over(runs, await runs.create("", request(max_iterations=2)))
        assert (run.status, len(run.steps)) == ("limit_reached", 2)
        run = await over(runs, await runs.create("", request()))
        assert (run.status, len(run.steps)) == ("limit_reached", 5)
        with pytest.raises(RunConflictError):
            await runs.resume("", run.run_id, repeat=False)
        with pytest.raises(InvalidRequestError, match="--agent-max-iterations"):
            await runs.create("", request(max_iterations=6))
        with pytest.raises(NotFoundError):
            await runs.create("", request(tools=["sing"]))
        chat.parses_tool_calls = False
        with pytest.raises(UnsupportedError, match="tool calls"):
            await runs.create("", request())

    using(tmp_path, for_ever, work)


def test_a_checkpoint_that_fails_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await over(runs, await runs.create("", request()))
        assert run.status == "completed"
        assert run.steps[0].reply["checkpoint_error"]["error"] == "store_full"
        events = [event async for _, event in runs.stream("", run.run_id)]
        failed = [event for event in events if event["event"] == "run_checkpoint"]
        assert [event["error"]["error"] for event in failed] == ["store_full"] * 3
        quiet = await over(runs, await runs.create("", request(checkpoint=False)))
        assert "checkpoint_error" not in quiet.steps[0].reply

    using(tmp_path, two_steps, work, save=StoreFullError("full"))


def test_cancelled_and_resumed(tmp_path: Path) -> None:
    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        return [calling(("hang", {}), ("count", {"by": 1})), "done"][number]

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await runs.create("", request(conversation_id="c"))
        while not (tmp_path / "hanging").exists():
            await asyncio.sleep(0)
        with pytest.raises(RunConflictError, match="another run"):
            await runs.create("", request(conversation_id="c"))
        with pytest.raises(RunConflictError):
            await runs.resume("", run.run_id, repeat=False)
        for action in (runs.get, runs.cancel):
            with pytest.raises(NotFoundError):
                await action("somebody", run.run_id)
        assert (await runs.cancel("", run.run_id)).status == "cancelled"
        with pytest.raises(RunConflictError):
            await runs.cancel("", run.run_id)
        await runs.resume("", run.run_id, repeat=False)
        run = await over(runs, run)
        assert run.status == "completed"
        hung, counted = run.steps[0].calls
        assert hung.outcome is not None
        assert hung.outcome["error"]["error"] == "outcome_unknown"
        assert counted.outcome == {"result": 1}
        assert runs.active == 0

    using(tmp_path, script, work)


def test_a_reply_that_was_not_saved_when_its_run_ended_is_saved_then(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        save, saving = runs._save_turn, asyncio.Event()

        async def hangs(conversation_id: str, rid: str, lasts: float | None) -> str:
            saving.set()
            await asyncio.sleep(600)
            raise AssertionError

        runs._save_turn = hangs
        run = await runs.create("", request())
        await saving.wait()
        stopped = await runs.cancel("", run.run_id)
        assert "snapshot_id" not in stopped.steps[0].reply
        runs._save_turn = save
        run = await over(runs, await runs.resume("", run.run_id, repeat=False))
        assert run.status == "completed"
        assert all("snapshot_id" in step.reply for step in run.steps)

    using(tmp_path, two_steps, work)


def test_a_run_is_cancelled_as_its_tool_ends(tmp_path: Path) -> None:
    """A cancellation that comes in the very moment is not lost."""

    def for_ever(number: int, body: Mapping[str, Any]) -> dict[str, Any]:
        return calling(("last_moment", {}))

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        stopping: list[asyncio.Task[Run]] = []

        async def last_moment(context: ToolContext) -> None:
            """Have its run cancelled, and end."""
            assert context.run_id is not None
            stopping.append(asyncio.ensure_future(runs.stop("", context.run_id)))

        runs._executor._own["last_moment"] = tool = make_tool(last_moment, isolated=False)
        runs._executor._specs["last_moment"] = tool.spec
        run = await over(runs, await runs.create("", request()))
        assert (run.status, len(run.steps)) == ("cancelled", 1)
        assert len(stopping) == 1

    using(tmp_path, for_ever, work)


def test_calls_are_told_apart_that_the_model_calls_the_same(tmp_path: Path) -> None:
    """Some models number the calls of a reply, and begin anew with the next one."""

    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        if number == 2:
            return "done"
        message = calling(("careful", {"by": 1}), ("careful", {"by": 1}))
        for position, call in enumerate(message["tool_calls"]):
            call["id"] = f"functions.careful:{position}"
        return message

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await over(runs, await runs.create("", request()))
        ids = [call.call_id for step in run.steps for call in step.calls]
        assert counted(tmp_path) == ids
        assert len(set(ids)) == 4
        told = [one for one in chat.asked[-1]["messages"] if one["role"] == "tool"]
        assert [one["tool_call_id"] for one in told] == [
            "functions.careful:0",
            "functions.careful:1",
        ] * 2

    using(tmp_path, script, work)


def careful_steps(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
    first = calling(("careful", {"by": 1}), ("count", {"by": 2}))
    return [first, calling(("careful", {"by": 3})), "done"][number]


def killed_at(folder: Path, point: int) -> bool:
    """Run in a process that kills itself at a point of its journal; whether it got so far."""
    child = os.fork()
    if child == 0:
        status = 1
        try:

            def die(number: int) -> None:
                if number == point:
                    os.kill(os.getpid(), 9)

            async def work(runs: RunManager, chat: ScriptedChat) -> None:
                run = await runs.create("", request(conversation_id="c"))
                assert (await over(runs, run)).status == "completed"

            using(folder, careful_steps, work, at_write=die)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def ended(folder: Path) -> Run:
    """The run as the next server finds and ends it."""

    async def work(runs: RunManager, chat: ScriptedChat) -> Run:
        (run,) = await runs.newest("", 10)
        if run.status != "completed":
            assert run.status == "interrupted"
            run = await runs.resume("", run.run_id, repeat=False)
        return await over(runs, run)

    return using(folder, careful_steps, work)


FIRST_WRITES = 5
"""Points before a run exists."""


def test_killed_at_any_point_a_run_ends_right(tmp_path: Path) -> None:
    """Every result is the unkilled run's or reported as unknown; nothing is counted twice."""
    point, unknown = FIRST_WRITES, 0
    while True:
        folder = tmp_path / str(point)
        folder.mkdir()
        if not killed_at(folder, point):
            break
        run, counts = ended(folder), counted(folder)
        assert run.status == "completed"
        calls = [call for step in run.steps for call in step.calls]
        assert [call.tool for call in calls] == ["careful", "count", "careful"]
        assert len(run.steps) == 3
        for step in run.steps:
            assert ("snapshot_id" in step.reply) != ("checkpoint_error" in step.reply)
        assert len(counts) == len(set(counts))
        for number, call in enumerate(calls, 1):
            assert call.outcome is not None
            if call.outcome == {"result": number}:
                assert call.call_id in counts
                continue
            assert call.tool == "count"
            assert call.outcome["error"]["error"] == "outcome_unknown"
            unknown += 1
        assert set(counts) <= {call.call_id for call in calls}
        point += 1
    assert point > FIRST_WRITES + 20
    assert unknown > 0


def test_a_disk_that_hangs_does_not_keep_the_server_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(database, "CLOSE_TIMEOUT_S", 0.2)
    hangs = threading.Event()

    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        return [calling(("hang", {})), "done"][number]

    async def work(manager: RunManager, chat: ScriptedChat) -> None:
        await manager.create("", request())
        while not (tmp_path / "hanging").exists():
            await asyncio.sleep(0)
        file = manager._journal._database
        file._thread.submit(hangs.wait)
        await manager.close()
        file.close()
        assert manager.active == 1
        hangs.set()
        while manager.active:
            await asyncio.sleep(0)

    using(tmp_path, script, work)

    async def after(manager: RunManager, chat: ScriptedChat) -> None:
        (run,) = await manager.newest("", 10)
        assert run.status == "interrupted"

    using(tmp_path, script, after)


def test_the_end_of_a_run_is_told_also_if_it_is_cancelled_then(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        set_status = runs._journal.set_status
        stopping: list[asyncio.Future[Run]] = []

        async def ending(run_id: str, *more: Any) -> None:
            # Begins when this waits for the disk.
            stopping.append(asyncio.ensure_future(runs.stop("", run_id)))
            await set_status(run_id, *more)

        runs._journal.set_status = ending  # type: ignore[method-assign]
        watching = runs._bus.subscribe("")
        watching.interest = Interest({"run_event"})
        run = await runs.create("", request())
        heard = await watching.next()
        while heard["event"] != "run_finished":
            heard = await watching.next()
        assert heard["status"] == (await stopping[0]).status == "completed"
        assert (await over(runs, run)).status == "completed"

    using(tmp_path, lambda number, body: "done", work)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_call_is_of_unknown_outcome_also_if_its_tool_is_gone(
    tmp_path: Path, repeat: bool
) -> None:
    """That there is no such tool would tell the model that nothing was done."""

    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        return [calling(("hang", {})), "done"][number]

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await runs.create("", request())
        while not (tmp_path / "hanging").exists():
            await asyncio.sleep(0)
        await runs.cancel("", run.run_id)
        runs._executor = ToolExecutor(counting(tmp_path), timeout=60.0)
        run = await over(runs, await runs.resume("", run.run_id, repeat=repeat))
        assert run.status == "completed"
        assert run.steps[0].calls[0].outcome is not None
        assert run.steps[0].calls[0].outcome["error"]["error"] == "outcome_unknown"

    using(tmp_path, script, work)


def test_a_call_of_unknown_outcome_is_repeated_if_asked(tmp_path: Path) -> None:
    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        return [calling(("hang", {})), "done"][number]

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await runs.create("", request())
        for _ in range(2):
            while not (tmp_path / "hanging").exists():
                await asyncio.sleep(0)
            (tmp_path / "hanging").unlink()
            assert (await runs.cancel("", run.run_id)).status == "cancelled"
            await runs.resume("", run.run_id, repeat=True)
        await runs.cancel("", run.run_id)

    using(tmp_path, script, work)


def test_a_reply_is_seen_while_it_is_written(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        async def read(tokens: bool) -> list[tuple[int | None, dict[str, Any]]]:
            return [one async for one in runs.stream("", run.run_id, tokens=tokens)]

        run = await runs.create("", request(conversation_id="c"))
        *watching, quiet = await asyncio.gather(read(True), read(True), read(False))
        for heard in watching:
            assert [one for one in heard if one[0] is not None] == quiet
            steps = {}
            for number, event in heard:
                if event["event"] == "run_tokens":
                    assert number is None
                    assert event["run_id"] == run.run_id
                    text = steps.get(event["step"], "")
                    assert event["offset"] == len(text)
                    steps[event["step"]] = text + event["text"]
                elif event["event"] == "run_step":
                    # All of a reply goes before what says that it is complete.
                    assert json.loads(steps[event["step"]]) == _message(event["message"])
            assert set(steps) == {0, 1, 2}
        assert "run_tokens" not in {event["event"] for _, event in quiet}
        # They are in no journal.
        assert [one async for one in runs.stream("", run.run_id, tokens=True)] == quiet

    using(tmp_path, two_steps, work)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", **message}


def test_a_run_is_forgotten(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        run = await over(runs, await runs.create("", request()))
        with pytest.raises(NotFoundError):
            await runs.remove("somebody", run.run_id)
        await runs.remove("", run.run_id)
        for action in (runs.get, runs.cancel, runs.remove):
            with pytest.raises(NotFoundError):
                await action("", run.run_id)
        hanging = await runs.create("", request(tools=["hang"]))
        while not (tmp_path / "hanging").exists():
            await asyncio.sleep(0)
        with pytest.raises(RunConflictError, match="under way"):
            await runs.remove("", hanging.run_id)
        await runs.cancel("", hanging.run_id)
        await runs.remove("", hanging.run_id)
        assert await runs.newest("", 10) == []

        def left(db: Any) -> list[int]:
            tables = ("runs", "steps", "calls", "events")
            return [db.execute(f"SELECT count(*) FROM {one}").fetchone()[0] for one in tables]

        assert await runs._journal._database.run(left) == [0, 0, 0, 0]

    def script(number: int, body: Mapping[str, Any]) -> dict[str, Any] | str:
        names = [tool["function"]["name"] for tool in body["tools"]]
        return calling(("hang", {})) if names == ["hang"] else two_steps(number, body)

    using(tmp_path, script, work)


def test_the_past_does_not_grow_for_ever(tmp_path: Path) -> None:
    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        async def made(count: int) -> list[str]:
            for _ in range(count):
                last = await over(runs, await runs.create("", request()))
            assert last.bytes > 0
            return [run.run_id for run in await runs.newest("", 100)]

        def write(statement: str, *values: Any) -> Awaitable[Any]:
            return runs._journal._database.run(lambda db: db.execute(statement, values).rowcount)

        runs._journal._retention = Retention(runs=3)
        # One more is there while it is under way: nothing of it can go.
        assert len(await made(6)) == 4
        runs._journal._retention = Retention(bytes=1)
        assert len(await made(2)) == 2
        runs._journal._retention = Retention(seconds=600.0)
        new, old = await runs.newest("", 2)
        change = "UPDATE runs SET updated_at = 0, status = 'interrupted' WHERE run_id = ?"
        await write(change, old.run_id)
        found = await made(1)
        assert old.run_id not in found
        assert new.run_id in found
        # What is written is what is counted.
        size = (await runs.get("", found[0])).bytes
        counted = await runs._journal._database.run(
            lambda db: db.execute(
                "SELECT length(request) + (SELECT sum(length(event)) FROM events e WHERE "
                "e.run_id = r.run_id) + (SELECT sum(length(outcome) + length(arguments)) "
                "FROM calls c WHERE c.run_id = r.run_id) FROM runs r WHERE run_id = ?",
                (found[0],),
            ).fetchone()[0]
        )
        replies = (await runs.get("", found[0])).steps
        assert 0 < size - counted <= sum(len(json.dumps(step.reply)) for step in replies)

    using(tmp_path, two_steps, work)


def test_a_run_begins_without_reading_all_that_is_kept(tmp_path: Path) -> None:
    """Requests may have 16 MiB, and 1 GiB of them is kept."""

    async def work(runs: RunManager, chat: ScriptedChat) -> None:
        database = runs._journal._database
        asked: list[str] = []
        database._connection.set_trace_callback(asked.append)
        await over(runs, await runs.create("", request()))
        database._connection.set_trace_callback(None)
        (prune,) = {one for one in asked if "row_number()" in one}

        def plan(db: Any) -> list[str]:
            return [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + prune)]

        looked = [one for one in await database.run(plan) if " runs " in f"{one} "]
        assert len(looked) == 2
        assert all("COVERING INDEX" in one for one in looked), looked

    using(tmp_path, two_steps, work)
