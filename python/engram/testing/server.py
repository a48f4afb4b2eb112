"""An SGLang server as a child process, for end-to-end tests and the demo."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx

HOST = "127.0.0.1"

# Below the range that Linux hands out (net.ipv4.ip_local_port_range, from 32768) and clear of the
# one that SGLang draws its own ports from (22000 to 29999, get_free_port_below_ephemeral).
PORTS = range(10_000, 22_000)


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the tail of its log."""


class ServerProcess:
    """One `python -m sglang.launch_server` in a process group of its own, on a free local port.

        with ServerProcess(model, ["--device", "cpu"], log_path=path) as server:
            httpx.post(f"{server.url}/generate", json=...)

    The arguments are passed through; only host and port are set here. Entering the context starts
    the server and waits until it serves; leaving it kills the server (call `stop` before for an
    orderly end, which takes SGLang some seconds). A server that was killed or stopped can be
    started again: it keeps its port, its arguments and its log, which is appended to.
    """

    def __init__(
        self,
        model: str | Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: str | Path = "server.log",
        timeout: float = 300.0,
    ) -> None:
        """Describe a server; nothing is started.

        Args:
            model: model directory or name.
            args: more arguments of `sglang.launch_server`.
            env: variables added to this process's environment.
            log_path: file that takes the server's output.
            timeout: seconds until the server has to serve.
        """
        self.model = str(model)
        self.args = list(args)
        self.env = dict(env or {})
        self.log_path = Path(log_path)
        self.timeout = timeout
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._temporary: tempfile.TemporaryDirectory[str]

    @property
    def url(self) -> str:
        """Base address of the server, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Return the command line that `start` runs."""
        launch = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        return [*launch, "--host", HOST, "--port", str(self.port), *self.args]

    def start(self) -> None:
        """Start the server and wait until it serves.

        Raises:
            ServerError: it ended or did not serve within the timeout; it is killed by then.
        """
        if self.process is not None:
            raise ServerError("the server is already started")
        # SGLang leaves its sockets and locks behind, killed or not: they get a directory that goes.
        self._temporary = tempfile.TemporaryDirectory(prefix="sglang-")
        env = {**os.environ, "TMPDIR": self._temporary.name, **self.env}
        with self.log_path.open("ab") as log:
            self.process = self._launch(env, log)
        try:
            self._wait_until_serving(self.process)
        except BaseException:
            self.kill()
            raise

    def _launch(self, env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The leader of a process group that writes to `log`."""
        return subprocess.Popen(
            self.command(),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def close(self) -> None:
        """Kill the server, which will not be started again."""
        self.kill()

    def kill(self) -> None:
        """Kill every process of the server at once (SIGKILL), as a crash would."""
        self._signal_group(signal.SIGKILL)
        self._reap(timeout=30.0)

    def stop(self, grace: float = 20.0) -> None:
        """Ask the server to end (SIGTERM); kill what is left of it after `grace` seconds."""
        if self.process is None:
            return
        # To the leader alone: it drains requests and ends its workers; a worker that ended first
        # would look like a crash to it.
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self.kill()

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the server's log."""
        if not self.log_path.exists():
            return "(no log)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_until_serving(self, process: subprocess.Popen[bytes]) -> None:
        # /health_generate runs a token through the model, so a 200 says that all processes work.
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(
                    f"the server ended with status {process.returncode} before it served\n"
                    f"{self.log_tail()}"
                )
            try:
                if httpx.get(f"{self.url}/health_generate", timeout=30.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise ServerError(f"the server did not serve in {self.timeout:g} s\n{self.log_tail()}")

    def _signal_group(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        # The group outlives its leader as long as any worker process is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _reap(self, timeout: float) -> None:
        if self.process is None:
            return
        self.process.wait(timeout)
        self.process = None
        self._temporary.cleanup()


def _free_port() -> int:
    """Return a port that is free now and that nobody is given unasked.

    A server binds its port seconds after it was chosen here, and again after a restart. Ports that
    the system hands out (bind to 0, the near end of a connection) could be gone by then: to a
    socket of the server's own collectives, even to the connection of a client that asks whether
    the server is there yet.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As uvicorn binds: connections of a server that was killed may linger on its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServerError(f"none of the ports {PORTS.start} to {PORTS.stop - 1} is free")
