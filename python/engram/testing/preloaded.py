"""SGLang servers that start in seconds: its modules are imported once, and each start is a fork.

For tests that start the same server again and again.  From the fork on it is what
`python -m sglang.launch_server` does, but for one thing: its processes are forked where SGLang
spawns them, so that they need not import anything either.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from engram.testing.server import ServerError, ServerProcess

END_S: Final = 30.0
LAUNCHER: Final = "sglang.launch_server"
MODULES: Final = (
    LAUNCHER,
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "engram.sglang_plugin.http",
    "engram.sglang_plugin.cache",
)
"""What all servers import sooner or later, and what takes the time."""


class PreloadedServer(ServerProcess):
    """A `ServerProcess` whose starts after the first import nothing; `close` ends its helper."""

    _helper: subprocess.Popen[bytes] | None = None

    def _launch(self, env: Mapping[str, str], log: IO[bytes]) -> Any:
        if self._helper is None:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env={**os.environ, **self.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        return _Forked(self._helper, self.command()[3:], env, self.log_path)

    def kill(self) -> None:
        """Kill every process of the server, and wait until none is left.

        All have what the first had open when it was forked, the lock of the store too.
        """
        group = None if self.process is None else self.process.pid
        super().kill()
        deadline = time.monotonic() + END_S
        while group is not None:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            if time.monotonic() > deadline:
                raise ServerError(f"processes of the server are left after {END_S:g} s")
            time.sleep(0.01)

    def close(self) -> None:
        """Kill the server and the process that has everything imported."""
        super().close()
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.kill()
            helper.communicate()


class _Forked:
    """What `ServerProcess` needs of a `subprocess.Popen`, of a grandchild."""

    def __init__(
        self,
        helper: subprocess.Popen[bytes],
        arguments: list[str],
        env: Mapping[str, str],
        log: Path,
    ) -> None:
        assert helper.stdin is not None
        assert helper.stdout is not None
        self._answers = helper.stdout
        wanted = {"arguments": arguments, "env": dict(env), "log": str(log)}
        helper.stdin.write(json.dumps(wanted).encode() + b"\n")
        helper.stdin.flush()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status with which it ended, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The status with which it ended; `subprocess.TimeoutExpired` if it does not in time."""
        if self.returncode is None:
            # One line for each process, so nothing of an answer is in Python's buffer.
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(LAUNCHER, timeout or 0.0)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            os.kill(self.pid, 15)


def main() -> None:
    """Import everything; then start a server for each line, and say its id and how it ended."""
    # Before the models, as every process of SGLang does: some cannot be imported on a CPU without.
    importlib.import_module("sglang.srt.plugins").load_plugins()
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        wanted = json.loads(line)
        process = os.fork()
        if process == 0:
            _serve(wanted)
        _, status = os.waitpid(process, 0)
        _answer(os.waitstatus_to_exitcode(status))


def _serve(wanted: dict[str, Any]) -> None:
    """Be a server; never returns."""
    status = 1
    try:
        os.setsid()
        _answer(os.getpid())
        with open(os.devnull, "rb") as nothing, open(wanted["log"], "ab") as log:
            for given, place in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(given.fileno(), place)
        os.environ.update(wanted["env"])
        _draw_other_numbers()
        multiprocessing.set_start_method("fork", force=True)
        # SGLang asks for "spawn" before it starts its processes.
        multiprocessing.set_start_method = lambda method, force=False: None
        sys.argv = [LAUNCHER, *wanted["arguments"]]
        runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _draw_other_numbers() -> None:
    """Seed what every process is seeded by itself otherwise: all forks would draw the same."""
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()


def _answer(number: int) -> None:
    os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    main()
