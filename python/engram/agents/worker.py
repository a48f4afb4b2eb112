"""The process that tools of an operator's module run in: ``python -m engram.agents.worker``.

It holds nothing of the server's but one socket.  It says which tools there are, then runs one call
after another.  It ends with the server, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from typing import Any, Final

import pydantic_core

from engram.agents import framing
from engram.agents.tool import MARK, Tool, ToolContext
from engram.errors import EngramError

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
MAX_TRACE: Final = 4_000


def tools_of(module: Any) -> dict[str, Tool]:
    """The tools a module has by any name, its own and imported ones."""
    found: dict[str, Tool] = {}
    for value in vars(module).values():
        made = getattr(value, MARK, None)
        if not isinstance(made, Tool):
            continue
        other = found.setdefault(made.spec.name, made)
        if other is not made:
            raise ValueError(f"two tools are called {made.spec.name!r}")
    return found


class _Calls:
    """Runs calls, and writes what comes of them."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.tools: dict[str, Tool] = {}

    def send(self, body: bytes) -> None:
        if os.getpid() != self._process:
            # A tool has forked, and its child came back here: only one of them may answer.
            os._exit(0)
        with self._lock:
            self._connection.sendall(body)

    def run(self, call: dict[str, Any]) -> None:
        threads = threading.active_count()
        try:
            context = ToolContext(**call["context"], on_progress=self._progress)
            made = self.tools[call["tool"]]
            bound = made.bind(call["arguments"], context)
            outcome = self._result(_finished(made.function(**bound)))
        except EngramError as error:
            outcome = {"type": "error", **error.to_dict()}
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: a tool that calls exit() has failed, no more.
            outcome = {
                "type": "error",
                "error": "tool_failed",
                "message": f"{type(error).__name__}: {_text(error)}",
                "details": {"traceback": "".join(traceback.format_exception(error))[-MAX_TRACE:]},
            }
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a tool may have closed them
                stream.flush()
        value = outcome.pop("value", None)
        clean = threading.active_count() <= threads
        head = {**outcome, "clean": clean, "children": _has_children()}
        if value is None:
            self.send(framing.encode(head))
        else:
            start = framing.encode(head)[framing.HEADER.size : -1]
            self.send(framing.frame(start + b', "value": ' + value + b"}"))

    def _result(self, value: Any) -> dict[str, Any]:
        # NaN and infinity are no JSON: as text they are at least seen.
        written = pydantic_core.to_json(value, inf_nan_mode="strings")
        if len(written) > self._limit:
            return {
                "type": "error",
                "error": "tool_result_too_large",
                "message": f"the result has {len(written)} bytes, {self._limit} may be",
                "hint": "ask for less, or have the tool return where the rest is",
                "details": {"bytes": len(written), "limit": self._limit},
            }
        return {"type": "result", "value": written}

    def _progress(self, fraction: float, message: str) -> None:
        self.send(framing.encode({"type": "progress", "fraction": fraction, "message": message}))


def _has_children() -> bool:
    """Whether anything is left that was started here: orphans are adopted, so it is a child."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _finished(value: Any) -> Any:
    if inspect.iscoroutine(value):
        return asyncio.run(value)
    return value


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2_000]
    except Exception:
        return "(it cannot be shown)"


def _bind_to(parent: int) -> None:
    """Die with the server, keep its orphans at hand, and be the first to go if memory ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def main(arguments: list[str]) -> None:
    """Serve calls until the server is gone: socket, its process, bytes of a result, module."""
    fd, parent, limit, name = int(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3]
    _bind_to(parent)
    connection = socket.socket(fileno=fd)
    # Not for what a tool starts: a process that outlives its tool must not hold the socket open.
    connection.set_inheritable(False)
    calls = _Calls(connection, limit)
    try:
        calls.tools = tools_of(importlib.import_module(name))
    except BaseException as error:
        told = f"{type(error).__name__}: {_text(error)}"
        calls.send(framing.encode({"type": "failed", "message": told}))
        return
    specs = [made.spec.model_dump(mode="json") for made in calls.tools.values()]
    calls.send(framing.encode({"type": "ready", "tools": specs}))
    while (call := framing.receive(connection)) is not None:
        calls.run(call)


if __name__ == "__main__":
    main(sys.argv[1:])
