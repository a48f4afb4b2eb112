"""One way to run any tool: checked, bounded in time and in size, with an error that says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core

from engram.agents.pool import ToolOutput, WorkerPool
from engram.agents.tool import Tool, ToolContext, ToolSpec
from engram.core.waiting import within
from engram.errors import (
    AgentsBusyError,
    AlreadyExistsError,
    EngramError,
    NotFoundError,
    ToolError,
    ToolResultTooLargeError,
    ToolTimeoutError,
)

MAX_RESULT_BYTES: Final = 1 << 20
"""Of a result, written as JSON."""
MAX_WAITING_CALLS: Final = 256


@dataclass(frozen=True)
class ToolResult:
    """A call that succeeded; `value` is JSON, `output` the end of what the tool printed."""

    value: Any
    output: str
    elapsed_ms: float


@dataclass
class ToolCounters:
    """What became of the calls since the start."""

    calls: int = 0
    failures: int = 0
    running: int = 0


class ToolExecutor:
    """The tools there are, and their calls.  Used on one event loop.

    A tool of the server's own runs here and is trusted; every other in a process of the pool.
    """

    def __init__(
        self,
        own: Iterable[Tool],
        *,
        timeout: float,
        pool: WorkerPool | None = None,
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        self._own = {one.spec.name: one for one in own}
        self._specs = {name: one.spec for name, one in self._own.items()}
        self._pool = pool
        self._timeout = timeout
        self._limit = max_result_bytes
        self.counters = ToolCounters()

    async def load(self) -> None:
        """Learn the tools of the operator's module.

        `InvalidRequestError` if it cannot be imported, `AlreadyExistsError` for a name that one of
        the server's own tools has.
        """
        if self._pool is None:
            return
        for spec in await self._pool.describe():
            if spec.name in self._specs:
                raise AlreadyExistsError(f"a tool {spec.name!r} exists already", hint="rename it")
            self._specs[spec.name] = spec

    def close(self) -> None:
        """End every process."""
        if self._pool is not None:
            self._pool.close()

    def specs(self, tag: str | None = None) -> list[ToolSpec]:
        """All tools, or those with a tag, by name."""
        found = sorted(self._specs.values(), key=lambda spec: spec.name)
        return [spec for spec in found if tag is None or tag in spec.tags]

    def spec(self, name: str) -> ToolSpec:
        """One tool.  `NotFoundError`."""
        try:
            return self._specs[name]
        except KeyError:
            raise NotFoundError(
                f"no tool {name[:100]!r}",
                hint=f"there are: {', '.join(sorted(self._specs))}"[:2000],
                details={"tool": name[:100]},
            ) from None

    async def execute(
        self, name: str, arguments: Mapping[str, Any], context: ToolContext
    ) -> ToolResult:
        """Run a tool.

        Raises `NotFoundError` for an unknown one, `InvalidRequestError` for arguments that do not
        fit its schema, a `ToolError` for what went wrong in it, and what the server's own raise.
        """
        spec = self.spec(name)
        if self.counters.running >= MAX_WAITING_CALLS:
            raise AgentsBusyError(
                f"{MAX_WAITING_CALLS} tool calls run or wait already", hint="try again later"
            )
        timeout = spec.timeout or self._timeout
        began = time.perf_counter()
        self.counters.calls += 1
        self.counters.running += 1
        try:
            own = self._own.get(name)
            if own is not None:
                output = await self._run_here(own, arguments, context, timeout)
            else:
                assert self._pool is not None
                output = await self._pool.call(name, arguments, context, timeout)
        except BaseException:
            self.counters.failures += 1
            raise
        finally:
            self.counters.running -= 1
        elapsed = (time.perf_counter() - began) * 1000
        return ToolResult(output.value, output.output, elapsed)

    async def _run_here(
        self, tool: Tool, arguments: Mapping[str, Any], context: ToolContext, timeout: float
    ) -> ToolOutput:
        name = tool.spec.name
        bound = tool.bind(arguments, context)
        try:
            value = await within(timeout, tool.function(**bound))
        except asyncio.TimeoutError:
            raise ToolTimeoutError(
                f"{name} took longer than {timeout:g} s", details={"tool": name, "timeout": timeout}
            ) from None
        except EngramError:
            raise
        except Exception as error:
            raise ToolError(
                f"{name}: {type(error).__name__}: {error}", details={"tool": name}
            ) from error
        written = pydantic_core.to_json(value)
        if len(written) > self._limit:
            raise ToolResultTooLargeError(
                f"{name}: the result has {len(written)} bytes, {self._limit} may be",
                hint="ask for less, such as with a smaller limit",
                details={"tool": name, "bytes": len(written), "limit": self._limit},
            )
        return ToolOutput(pydantic_core.from_json(written))
