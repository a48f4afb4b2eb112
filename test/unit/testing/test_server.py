"""The server process, with a small stand-in for SGLang: it has a worker and takes time to serve."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from e2e import worlds
from engram.testing.server import ServerError, ServerProcess

STAND_IN = """
import http.server, os, signal, subprocess, sys, time

port, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print("launched with", *sys.argv[4:], os.environ.get("EXTRA"), flush=True)
if mode == "broken":
    print("no such model", flush=True)
    sys.exit(3)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.path.join(folder, "worker"), "w") as file:
    file.write(str(worker.pid))
with open(os.path.join(os.environ["TMPDIR"], "left-behind"), "w") as file:
    file.write("x")

def end(number, frame):
    with open(os.path.join(folder, "asked"), "w") as file:
        file.write("to end")
    if mode != "stubborn":
        sys.exit(0)

signal.signal(signal.SIGTERM, end)
served_from = time.monotonic() + (600 if mode == "silent" else 0.5)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > served_from else 503)
        self.end_headers()
    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class StandIn(ServerProcess):
    """A server process whose `model` is a mode of the stand-in."""

    def command(self) -> list[str]:
        folder = str(self.log_path.parent)
        return [sys.executable, "-c", STAND_IN, str(self.port), self.model, folder, *self.args]


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., StandIn]:
    def make(mode: str, timeout: float = 60.0) -> StandIn:
        return StandIn(
            mode, ["--flag", "x"], {"EXTRA": "variable"}, tmp_path / "server.log", timeout
        )

    return make


def is_alive(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/status")
    # A zombie has ended; its parent has only not asked for its status yet.
    return status.exists() and "State:\tZ" not in status.read_text()


def assert_ends(process_id: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(process_id):
        assert time.monotonic() < deadline, f"process {process_id} is still there"
        time.sleep(0.05)


def worker_of(server: StandIn) -> int:
    return int((server.log_path.parent / "worker").read_text())


def test_it_waits_until_it_serves_and_leaves_nothing_behind(
    stand_in: Callable[..., StandIn],
) -> None:
    server = stand_in("usual")
    with server:
        assert httpx.get(f"{server.url}/health_generate").status_code == 200
        assert "launched with --flag x variable" in server.log_tail()
        assert server.process is not None
        leader, worker = server.process.pid, worker_of(server)
        assert os.getpgid(worker) == leader != os.getpgid(0)
    assert_ends(worker)
    assert server.process is None
    assert not (server.log_path.parent / "asked").exists()


def test_a_world_that_cannot_be_made_leaves_no_server_behind(tmp_path: Path) -> None:
    """Or each failure keeps a core and a gigabyte from what is run after it."""
    started: list[int] = []

    def make(stage: worlds.Stage, folder: Path) -> worlds.World:
        folder.mkdir()
        server = stage.server(folder, [], model=Path("usual"), kind=StandIn)
        server.start()
        started.append(int((folder / "worker").read_text()))
        raise ValueError("a reply was not as expected")

    with pytest.raises(ValueError, match="not as expected"):
        worlds.Stage(tmp_path).world("broken", make)
    assert_ends(started[0])


def test_stop_asks_before_it_kills(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("usual")
    server.start()
    worker = worker_of(server)
    server.stop()
    assert (server.log_path.parent / "asked").read_text() == "to end"
    assert_ends(worker)


def test_stop_kills_what_does_not_end(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("stubborn")
    server.start()
    worker = worker_of(server)
    server.stop(grace=0.5)
    assert (server.log_path.parent / "asked").exists()
    assert_ends(worker)


def test_a_killed_server_starts_again_on_its_port(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("usual")
    server.start()
    first_url = server.url
    server.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health_generate")
    server.kill()
    with server:
        assert server.url == first_url
        assert httpx.get(f"{server.url}/health_generate").status_code == 200
        with pytest.raises(ServerError, match="already started"):
            server.start()
    assert server.log_tail().count("launched") == 2


def test_no_port_is_one_that_the_system_hands_out_or_that_is_taken(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if handed_out.exists():
        assert stand_in("serving").port < int(handed_out.read_text().split()[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("engram.testing.server.PORTS", range(port, port + 1))
        with pytest.raises(ServerError, match=f"none of the ports {port} to {port} is free"):
            stand_in("serving")
    assert stand_in("serving").port == port


def test_a_server_that_ends_early_shows_its_log(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("broken")
    with pytest.raises(
        ServerError, match=r"ended with status 3 before it served\n.*\nno such model"
    ):
        server.start()
    assert server.process is None


def test_a_server_that_never_serves_is_killed(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("silent", timeout=2.0)
    with pytest.raises(ServerError, match="did not serve in 2 s\nlaunched with"):
        server.start()
    assert_ends(worker_of(server))


def test_the_temporary_directory_goes(
    stand_in: Callable[..., StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with stand_in("usual"):
        assert len(list(tmp_path.glob("sglang-*/left-behind"))) == 1
    assert list(tmp_path.glob("sglang-*")) == []
