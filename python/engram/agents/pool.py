"""Processes in which tools run that the server does not trust with itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import psutil

from engram.agents import framing
from engram.agents.tool import OnProgress, ToolContext, ToolSpec
from engram.core.waiting import within
from engram.errors import (
    EngramError,
    InvalidRequestError,
    ToolCrashedError,
    ToolError,
    ToolTimeoutError,
    error_from_dict,
)

START_TIMEOUT_S: Final = 60.0
OUTPUT_BYTES: Final = 8 << 10
"""Of what a tool writes to its standard output and error, the end is kept."""
KILL_ROUNDS: Final = 5
DRAIN_ROUNDS: Final = 16
END_TIMEOUT_S: Final = 10.0
FIRST_PAUSE_S: Final = 0.001
LAST_PAUSE_S: Final = 0.05


@dataclass(frozen=True)
class ToolOutput:
    """What a tool returned, as JSON, and the end of what it wrote to its standard output."""

    value: Any
    output: str = ""


class WorkerPool:
    """At most `size` processes, each with one call at a time; made when needed, replaced when used
    up.  Used on one event loop.

    A process is used up when a call was ended, when it broke, or when it left processes or threads
    behind; it is killed then, with all its descendants.
    """

    def __init__(self, module: str, *, size: int, max_result_bytes: int) -> None:
        self._module = module
        self._limit = max_result_bytes
        self._places = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def describe(self) -> list[ToolSpec]:
        """The tools of the module.  `InvalidRequestError` if it cannot be imported."""
        async with self._places:
            worker = await self._start()
            self._idle.append(worker)
            return worker.specs

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: ToolContext, timeout: float
    ) -> ToolOutput:
        """Run a tool.  Raises as the tools' errors say; the process is gone when it had to be."""
        async with self._places:
            worker = self._waiting() or await self._start()
            kept = False
            try:
                output = await within(timeout, worker.call(name, arguments, context))
                kept = worker.clean()
                return output
            except asyncio.TimeoutError:
                raise ToolTimeoutError(
                    f"{name} was ended: it took longer than {timeout:g} s",
                    hint="give the tool a longer timeout, or less to do",
                    details={"tool": name, "timeout": timeout, "output": worker.output()},
                ) from None
            except EngramError as error:
                kept = not isinstance(error, ToolCrashedError) and worker.clean()
                raise
            finally:
                if kept:
                    self._idle.append(worker)
                else:
                    self._all.discard(worker)
                    worker.kill()
                    await worker.ended()

    def close(self) -> None:
        """Kill every process."""
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.wait()
        self._all.clear()
        self._idle.clear()

    def _waiting(self) -> _Worker | None:
        """A process that waits for a call, if there is one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.lives():
                return worker
            # It has ended meanwhile: the kernel takes tools first if memory ends.
            self._all.discard(worker)
            worker.kill()
        return None

    async def _start(self) -> _Worker:
        try:
            worker = _Worker(self._module, self._limit)
        except OSError as error:
            raise ToolError(
                f"no process can be started for the tools of {self._module}: {error}",
                hint="look whether the machine has memory, processes and open files left",
            ) from error
        self._all.add(worker)
        try:
            await within(START_TIMEOUT_S, worker.ready())
        except BaseException as error:
            self._all.discard(worker)
            worker.kill()
            await worker.ended()
            if isinstance(error, asyncio.TimeoutError):
                raise ToolTimeoutError(
                    f"{self._module} was not imported in {START_TIMEOUT_S:g} s"
                ) from None
            raise
        return worker


class _Worker:
    """One process."""

    def __init__(self, module: str, limit: int) -> None:
        self._module = module
        self._limit = limit
        self._clean = True
        self._children = False
        self.specs: list[ToolSpec] = []
        self._output = bytearray()
        self._ours, theirs = socket.socketpair()
        try:
            self._said, writes = os.pipe()
        except OSError:
            self._ours.close()
            theirs.close()
            raise
        os.set_blocking(self._said, False)
        command = [sys.executable, "-m", "engram.agents.worker", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(limit), module],
                stdin=subprocess.DEVNULL,
                stdout=writes,
                stderr=writes,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            self._ours.close()
            os.close(self._said)
            raise
        finally:
            theirs.close()
            os.close(writes)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        # Drained at all times, or a tool that writes much would wait for ever.
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._said, self._drain)

    async def ready(self) -> None:
        """Wait for the module.  `InvalidRequestError` if it fails."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._ours)
        try:
            message = await framing.read(self._reader, 16 << 20)
        except (EOFError, ValueError, OSError) as error:
            raise InvalidRequestError(
                f"the tools of {self._module} cannot be loaded: the process ended "
                f"({error}): {self.output()}",
                hint="python -c 'import " + self._module + "' must work",
            ) from error
        if message.get("type") != "ready":
            raise InvalidRequestError(
                f"the tools of {self._module} cannot be loaded: {message.get('message')}",
                hint="python -c 'import " + self._module + "' must work",
            )
        self.specs = [ToolSpec.model_validate(one) for one in message["tools"]]

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: ToolContext
    ) -> ToolOutput:
        """Run a tool to its end."""
        assert self._reader is not None
        assert self._writer is not None
        self._output.clear()
        who = asdict(context)
        on_progress: OnProgress = who.pop("on_progress")
        message = {"type": "call", "tool": name, "arguments": dict(arguments), "context": who}
        try:
            self._writer.write(framing.encode(message))
            await self._writer.drain()
            while True:
                answer = await framing.read(self._reader, self._limit + framing.OVERHEAD_BYTES)
                if answer["type"] != "progress":
                    break
                on_progress(float(answer["fraction"]), str(answer["message"]))
            self._clean = bool(answer["clean"])
            self._children = bool(answer["children"])
            if answer["type"] == "result":
                return ToolOutput(answer["value"], self.output())
        except (EOFError, OSError) as error:
            raise ToolCrashedError(
                f"{name} ended its process: {self._status()}",
                hint="the server is not affected; the next call gets a new process",
                details={"tool": name, "output": self.output()},
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ToolCrashedError(
                f"{name} wrote something else than a result to the server: {error}",
                details={"tool": name},
            ) from error
        refusal = error_from_dict(answer)
        refusal.details |= {"tool": name}
        if isinstance(refusal, ToolError):
            refusal.message = f"{name}: {refusal.message}"
            refusal.details |= {"output": self.output()}
        raise refusal

    def output(self) -> str:
        """The end of what was written to the standard output and error since the call began."""
        self._drain()
        return self._output.decode(errors="replace")

    def lives(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def clean(self) -> bool:
        """Whether the last call left nothing behind and the process lives."""
        if not (self._clean and self.lives()):
            return False
        # It knows best that there are none; to look means to look at every process there is.
        return not (self._children and self._descendants())

    async def ended(self) -> None:
        """Return when the killed process is gone; not at once, if it had gigabytes.

        One that the kernel does not let go, as on a file system that is gone, is given up.
        """
        pause = FIRST_PAUSE_S
        until = self._loop.time() + END_TIMEOUT_S
        while self.lives() and self._loop.time() < until:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    def wait(self) -> None:
        """The same, for who has no more to do meanwhile."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    def kill(self) -> None:
        """End the process and everything it has started; it may take a moment to be gone."""
        # As long as it lives it adopts its orphans, so what it started is found below it: the
        # others first, again until none has been started meanwhile.
        for _ in range(KILL_ROUNDS):
            found = self._descendants()
            if not found:
                break
            for one in found:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, 9)
        self._process.kill()
        if self._said >= 0:
            self._loop.remove_reader(self._said)
            os.close(self._said)
            self._said = -1
        if self._writer is not None:
            self._writer.close()
        else:
            self._ours.close()

    def _descendants(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []
        # One that has ended and was not waited for does nothing any more.
        return [one for one in found if _alive(one)]

    def _status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
            return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return "it closed its connection"

    def _drain(self) -> None:
        # Bounded: who writes as fast as this reads would hold up the server. It is more than a pipe
        # holds, so all that was written before is read.
        for _ in range(DRAIN_ROUNDS):
            if self._said < 0:
                return
            try:
                part = os.read(self._said, 64 << 10)
            except BlockingIOError:
                return
            if not part:
                self._loop.remove_reader(self._said)
                os.close(self._said)
                self._said = -1
                return
            self._output += part
            del self._output[:-OUTPUT_BYTES]


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
