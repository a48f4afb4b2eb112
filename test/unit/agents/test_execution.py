"""Whatever a tool does, its caller is told clearly and the process of the server goes on."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from engram.agents import pool
from engram.agents.execution import ToolExecutor, ToolResult
from engram.agents.pool import OUTPUT_BYTES, WorkerPool
from engram.agents.tool import ToolContext, make_tool
from engram.errors import (
    AlreadyExistsError,
    EngramError,
    InvalidRequestError,
    NotFoundError,
    ToolCrashedError,
    ToolError,
    ToolResultTooLargeError,
    ToolTimeoutError,
)

T = TypeVar("T")
LIMIT = 1 << 20


async def add(x: int, y: int = 1) -> int:
    return x + y


async def wait() -> None:
    await asyncio.sleep(600)


async def much() -> str:
    return "x" * LIMIT


async def broken() -> None:
    raise KeyError("gone")


OWN = [
    make_tool(f, isolated=False, timeout=t)
    for f, t in ((add, None), (wait, 0.05), (much, None), (broken, None))
]


def using(
    work: Callable[[ToolExecutor], Awaitable[T]],
    module: str | None = "hostile_tools",
    size: int = 1,
) -> T:
    """What `work` returns with an executor; afterwards no process is left."""

    async def run() -> T:
        made = module and WorkerPool(module, size=size, max_result_bytes=LIMIT)
        executor = ToolExecutor(OWN, timeout=60.0, pool=made or None, max_result_bytes=LIMIT)
        await executor.load()
        try:
            return await work(executor)
        finally:
            executor.close()

    before = set(psutil.Process().children(recursive=True))
    found = asyncio.run(run())
    assert set(psutil.Process().children(recursive=True)) <= before
    return found


async def refused(
    executor: ToolExecutor, kind: type[EngramError], name: str, **arguments: Any
) -> EngramError:
    with pytest.raises(kind) as raised:
        await executor.execute(name, arguments, ToolContext())
    assert raised.value.code == kind.code
    return raised.value


async def call(executor: ToolExecutor, name: str, **arguments: Any) -> ToolResult:
    return await executor.execute(name, arguments, ToolContext(conversation_id="c", call_id="k"))


def test_results_of_sync_and_async_tools() -> None:
    async def work(executor: ToolExecutor) -> None:
        assert (await call(executor, "total", orders=[{"article": "a"}], price=2)).value == 2
        assert (await call(executor, "later", word="red")).value == {"word": "red"}
        assert (await call(executor, "add", x=1)).value == 2
        assert [s.name for s in executor.specs("fine")] == ["later", "total"]
        assert executor.spec("add").isolated is False
        await refused(executor, NotFoundError, "none")
        error = await refused(executor, InvalidRequestError, "later", word="green")
        assert error.details["field"] == "word"
        await refused(executor, InvalidRequestError, "add", x="one")
        counters = executor.counters
        assert (counters.calls, counters.failures, counters.running) == (5, 2, 0)

    using(work)


def test_progress_and_context_reach_both_sides() -> None:
    told: list[tuple[float, str]] = []

    async def work(executor: ToolExecutor) -> Any:
        context = ToolContext("k", "", "c", None, lambda *step: told.append(step))
        return (await executor.execute("steps", {}, context)).value

    assert using(work) == {"conversation": "c", "call": "k"}
    assert told == [(0.0, "step 0"), (0.5, "step 1"), (1.0, "step 2")]


def test_a_process_serves_many_calls_and_those_of_others_at_once() -> None:
    async def work(executor: ToolExecutor) -> list[int]:
        return [(await call(executor, "pid")).value for _ in range(3)]

    first, *others = using(work)
    assert others == [first, first]

    async def at_once(executor: ToolExecutor) -> None:
        results = await asyncio.gather(
            *(call(executor, "pid") for _ in range(4)),
            refused(executor, ToolTimeoutError, "hang"),
        )
        assert len(results) == 5

    using(at_once, size=2)


def test_a_tool_that_hangs_is_ended_with_what_it_started() -> None:
    async def work(executor: ToolExecutor) -> None:
        before = (await call(executor, "pid")).value
        error = await refused(executor, ToolTimeoutError, "hang", with_child=True)
        assert "0.5 s" in error.message
        assert not psutil.pid_exists(before)
        assert (await call(executor, "pid")).value != before

    using(work)


def test_a_tool_that_raises() -> None:
    async def work(executor: ToolExecutor) -> None:
        error = await refused(executor, ToolError, "fail", message="no bread")
        assert error.message == "fail: RuntimeError: no bread"
        assert "hostile_tools.py" in str(error.details["traceback"])
        error = await refused(executor, ToolError, "no_json")
        assert "object" in error.message
        error = await refused(executor, ToolError, "broken")
        assert error.message == "broken: KeyError: 'gone'"

    using(work)


def test_what_a_tool_says_can_be_sent_on() -> None:
    """Half a surrogate pair is in no UTF-8: neither a reply nor a run could be shown with it."""
    told: list[str] = []

    async def work(executor: ToolExecutor) -> None:
        context = ToolContext("k", "", None, None, lambda fraction, text: told.append(text))
        with pytest.raises(ToolError) as raised:
            await executor.execute("odd_name", {}, context)
        assert raised.value.message == "odd_name: RuntimeError: odd ?"
        json.dumps(raised.value.to_reply(), ensure_ascii=False).encode()

    using(work)
    assert told == ["odd ?"]


def test_a_process_that_ended_while_it_waited_is_replaced() -> None:
    """As the kernel ends tools first if memory ends: the next call has not failed."""

    async def work(executor: ToolExecutor) -> None:
        before = (await call(executor, "pid")).value
        process = psutil.Process(before)
        process.kill()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0)
        assert (await call(executor, "pid")).value != before

    using(work)


def test_a_call_that_started_nothing_is_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for what a process has started means to read of every process of the machine."""

    def look(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        raise AssertionError("the server looks while every request waits")

    async def work(executor: ToolExecutor) -> None:
        with monkeypatch.context() as watched:
            watched.setattr(psutil.Process, "children", look)
            first = (await call(executor, "pid")).value
            await refused(executor, ToolError, "fail", message="no bread")
            assert (await call(executor, "pid")).value == first

    using(work)


def test_a_process_that_cannot_be_started_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def work(executor: ToolExecutor) -> None:
        before = (await call(executor, "pid")).value
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nonexistent/python")
            await refused(executor, ToolCrashedError, "leave", status=3, hard=True)
            open_files = files()
            for _ in range(3):
                error = await refused(executor, ToolError, "pid")
                assert "hostile_tools" in error.message
                assert error.hint
            assert files() == open_files
        assert (await call(executor, "pid")).value != before

    using(work)


def test_a_process_that_is_slow_to_end_does_not_hold_up_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes a second for some gigabytes, and for ever in a file system that is gone."""

    async def work(executor: ToolExecutor) -> None:
        await call(executor, "pid")
        assert executor._pool is not None
        (worker,) = executor._pool._idle
        others, ticking = 0, asyncio.Event()

        async def other() -> None:
            nonlocal others
            await ticking.wait()
            while True:
                await asyncio.sleep(0)
                others += 1

        poll, wait = worker._process.poll, worker._process.wait

        def slow_poll() -> int | None:
            ticking.set()
            return poll() if others >= 50 else None

        def slow_wait(timeout: float | None = None) -> int:
            raise AssertionError("nothing else runs meanwhile")

        task = asyncio.create_task(call(executor, "hang"))
        while executor._pool._idle:
            await asyncio.sleep(0)
        worker._process.poll, worker._process.wait = slow_poll, slow_wait  # type: ignore[method-assign]
        ticks = asyncio.create_task(other())
        with pytest.raises(ToolTimeoutError):
            await task
        ticks.cancel()
        assert others >= 50
        assert wait(60) == -9
        monkeypatch.setattr(pool, "END_TIMEOUT_S", 0.0)
        (await call(executor, "pid"))
        stuck = executor._pool._idle[0]._process
        stuck.poll = lambda: None  # type: ignore[method-assign]
        await refused(executor, ToolTimeoutError, "hang")
        assert stuck.wait(60) == -9

    using(work)


def test_output_without_end_does_not_hold_up_the_server() -> None:
    async def work(executor: ToolExecutor) -> None:
        await call(executor, "pid")
        assert executor._pool is not None
        (worker,) = executor._pool._idle
        said = os.dup(worker._said)
        endless = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(endless, worker._said)
        assert len(worker.output()) == OUTPUT_BYTES
        os.dup2(said, worker._said)
        os.close(endless)
        os.close(said)

    using(work)


def test_a_result_that_is_too_large_does_not_reach_the_server() -> None:
    async def work(executor: ToolExecutor) -> None:
        assert len((await call(executor, "large", size=LIMIT - 2)).value) == LIMIT - 2
        error = await refused(executor, ToolResultTooLargeError, "large", size=LIMIT - 1)
        assert error.details["bytes"] == LIMIT + 1
        error = await refused(executor, ToolResultTooLargeError, "large", size=50 << 20)
        assert error.details["bytes"] == (50 << 20) + 2
        assert error.hint
        assert (await refused(executor, ToolResultTooLargeError, "much")).hint

    using(work)


def test_a_tool_that_forks_answers_once() -> None:
    async def work(executor: ToolExecutor) -> None:
        for _ in range(3):
            assert (await call(executor, "fork")).value == "parent"

    using(work)


def test_what_a_tool_leaves_behind_is_ended(tmp_path: Path) -> None:
    async def work(executor: ToolExecutor) -> None:
        before = (await call(executor, "pid")).value
        left = (await call(executor, "leave_child", folder=str(tmp_path))).value
        assert not psutil.pid_exists(left) or psutil.Process(left).status() == "zombie"
        threaded = (await call(executor, "leave_thread")).value
        assert threaded != before
        assert (await call(executor, "pid")).value not in (before, threaded)

    using(work)


def test_a_tool_that_calls_exit() -> None:
    async def work(executor: ToolExecutor) -> None:
        error = await refused(executor, ToolError, "leave", status=3, hard=False)
        assert error.message == "leave: SystemExit: 3"
        error = await refused(executor, ToolCrashedError, "leave", status=3, hard=True)
        assert "exit status 3" in error.message
        await refused(executor, ToolCrashedError, "close_all")
        assert (await call(executor, "later", word="red")).value == {"word": "red"}

    using(work)


def test_a_tool_that_writes(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(executor: ToolExecutor) -> None:
        result = await call(executor, "write", text="hello")
        assert result.value == "written"
        assert sorted(result.output.split()) == ["error", "hello"]
        assert (await call(executor, "raw_write", text="raw")).output == "raw"
        much = await call(executor, "write", text="x" * 1000, times=1000)
        assert len(much.output) == OUTPUT_BYTES

    using(work)
    assert capfd.readouterr() == ("", "")


def test_a_caller_that_goes_away_ends_its_call() -> None:
    async def work(executor: ToolExecutor) -> None:
        task = asyncio.create_task(call(executor, "hang"))
        before = set(psutil.Process().children())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert executor.counters.running == 0
        assert not any(one.is_running() for one in before)

    using(work)


def test_own_tools_have_a_time_limit() -> None:
    async def work(executor: ToolExecutor) -> None:
        await refused(executor, ToolTimeoutError, "wait")

    using(work, module=None)


def test_a_process_ends_with_its_server(tmp_path: Path) -> None:
    """As kill -9 would: the parent is gone, and nobody closes anything."""
    child = os.fork()
    if child == 0:
        try:

            async def work() -> None:
                pool = WorkerPool("hostile_tools", size=1, max_result_bytes=LIMIT)
                await pool.describe()
                found = (await pool.call("pid", {}, ToolContext(), 60.0)).value
                (tmp_path / "pid").write_text(str(found))

            asyncio.run(work())
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    worker = int((tmp_path / "pid").read_text())
    if psutil.pid_exists(worker):
        with_end = psutil.Process(worker)
        psutil.wait_procs([with_end], timeout=30)
        assert not with_end.is_running() or with_end.status() == "zombie"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_like_it", "nothing_like_it"),
        ("raise RuntimeError('no')", "no"),
        ("import os; os._exit(4)", "cannot be loaded"),
        ("raise SystemExit(5)", "SystemExit: 5"),
        ("from engram.agents import tool\n@tool\ndef f(x): pass", "x has no type"),
        (
            "from engram.agents import tool\n"
            "@tool\ndef f() -> None: pass\n"
            "@tool(name='f')\ndef g() -> None: pass",
            "two tools",
        ),
    ],
)
def test_a_module_that_cannot_be_loaded(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tools.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")

    async def work(executor: ToolExecutor) -> None:
        raise AssertionError("loaded")

    with pytest.raises(InvalidRequestError, match=told):
        using(work, module="broken_tools")


def test_a_module_may_not_take_an_own_tools_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from engram.agents import tool\n@tool\ndef add() -> None: pass"
    (tmp_path / "taking_tools.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")

    async def work(executor: ToolExecutor) -> None:
        raise AssertionError("loaded")

    with pytest.raises(AlreadyExistsError, match="add"):
        using(work, module="taking_tools")
