"""`engram chat`, as a script and at a terminal.  A server of the test's own writes the replies."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from engram.server.chat import chat_router
from engram.server.stateful import CURRENT_STATEFUL
from engram.server.tagging import CURRENT_TAG
from engram.testing.samples import seeded_random
from unit.client.live import Live, app_of, serving
from unit.service.engine import Server

WORDS = ["You ", "said: "]


class Replies:
    """The engine behind the server's own chat route: streams what was said, keeps the bodies."""

    fields = frozenset(
        ("messages", "max_tokens", "temperature", "stream", "stream_options", "tools")
    )

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.endless = False
        self.stopped = False

    async def complete(self, body: dict[str, Any], request: Request) -> Any:
        tag, stateful = CURRENT_TAG.get(), CURRENT_STATEFUL.get()
        assert tag is not None
        assert stateful is not None
        self.bodies.append(
            {"conversation": tag.conversation_id, "branch": stateful.branch_name, **body}
        )
        if body["messages"][-1]["content"] == "fail":
            return JSONResponse({"message": "too long"}, 400)
        return StreamingResponse(self._events(request), media_type="text/event-stream")

    async def _events(self, request: Request) -> AsyncIterator[str]:
        said = self.bodies[-1]["messages"][-1]["content"]
        try:
            for text in [*WORDS, said]:
                yield self._event({"content": text}, None)
            while self.endless:
                yield self._event({"content": "."}, None)
                await asyncio.sleep(0.02)
            yield self._event({}, "stop")
            yield (
                'data: {"id": "r", "choices": [], "usage": {"prompt_tokens": 9, '
                '"completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}}\n\n'
            )
            yield "data: [DONE]\n\n"
        finally:
            self.stopped = True

    def _event(self, delta: dict[str, str], finish: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({'id': 'r', 'choices': [choice]})}\n\n"


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[tuple[Live, Replies]]:
    server = Server.start(tmp_path / "store", seeded_random())
    app, replies = app_of(server), Replies()
    app.include_router(chat_router(replies))
    with serving(server, app) as live:
        yield live, replies
    server.stop()


def command(live: Live, *words: str) -> list[str]:
    return [sys.executable, "-m", "engram.cli.main", "chat", *words, "--url", live.url]


def run(live: Live, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(live, *words), input=typed, capture_output=True, text=True, timeout=120
    )


def test_lines_are_messages(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    done = run(
        live, "c/other", "--system", "Be brief.", "--max-tokens", "7", typed="one\n\n two \n"
    )
    assert (done.returncode, done.stdout) == (0, "You said: one\nYou said: two\n"), done.stderr
    first, second = replies.bodies
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
    ]
    # Only what is new: the server has the rest.
    assert second["messages"] == [{"role": "user", "content": "two"}]
    assert (first["conversation"], first["branch"], first["max_tokens"]) == ("c", "other", 7)
    assert "temperature" not in first


def test_a_system_message_is_for_a_new_conversation(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    live.chat("c")
    live.run(live.server.service.save(tenant="", conversation_id="c"))
    done = run(live, "c", "--system", "Be brief.", "-m", "hello")
    assert done.returncode == 0
    assert "left out" in done.stderr
    assert replies.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_json_is_one_object_a_reply(talking: tuple[Live, Replies]) -> None:
    live, _ = talking
    done = run(live, "c", "--json", typed="one\ntwo\n")
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["content"] for one in replies] == ["You said: one", "You said: two"]
    assert replies[0]["usage"] == {"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 5}


def test_commands(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    live.chat("c")
    done = run(live, "c", typed="/save named\n/help\n/nonsense\n/quit\nnever said\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert "named: saved turn 1 of c/main" in done.stderr
    assert "/save [NAME]" in done.stderr
    assert "no such command: /nonsense" in done.stderr
    assert replies.bodies == []


def test_a_script_ends_at_a_failure(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    done = run(live, "c", typed="fail\nnever said\n")
    assert (done.returncode, len(replies.bodies)) == (1, 1)
    assert "engram: error: too long" in done.stderr


class Terminal:
    """`engram chat` at a terminal."""

    def __init__(self, live: Live, *words: str) -> None:
        self.master, inner = pty.openpty()
        self.process = subprocess.Popen(
            command(live, *words),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(inner)
        self.seen = ""

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def wait_for(self, text: str) -> None:
        """Read until it is shown, from where it was last."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096).decode()
        self.seen = self.seen.partition(text)[2]

    def wait_until_it_reads(self) -> None:
        """Return when it sleeps at its prompt.

        Python sees a signal that comes between the prompt and the read after the next line only.
        """
        process, asleep = psutil.Process(self.process.pid), 0
        deadline = time.monotonic() + 60
        while asleep < 3:
            assert time.monotonic() < deadline, "it does not read"
            asleep = asleep + 1 if process.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.05)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_ctrl_c_stops_a_reply_and_then_the_command(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    terminal = Terminal(live, "c")
    try:
        terminal.wait_for("a new conversation; /help")
        terminal.wait_for("> ")
        replies.endless = True
        terminal.type("tell me")
        terminal.wait_for("You said: tell me...")
        terminal.interrupt()
        terminal.wait_for("(stopped; this reply is no turn)")
        replies.endless = False
        terminal.wait_for("> ")
        terminal.type("fail")
        terminal.wait_for("engram: error: too long")
        terminal.type("again")
        terminal.wait_for("You said: again")
        terminal.wait_for("(5 of 9 tokens were cached)")
        terminal.wait_for("> ")
        assert replies.stopped
        terminal.wait_until_it_reads()
        terminal.interrupt()
        assert terminal.process.wait(60) == 130
        assert "Traceback" not in terminal.seen
    finally:
        terminal.close()


def test_a_reply_does_nothing_to_the_terminal(talking: tuple[Live, Replies]) -> None:
    live, _ = talking
    said = "\x1b]52;c;ZXZpbA==\x07 \x9b31mred\r\ttab"
    terminal = Terminal(live, "c", "-m", said)
    try:
        terminal.wait_for("You said: \\x1b]52;c;ZXZpbA==\\x07 \\x9b31mred\\x0d\ttab")
        terminal.wait_for("(5 of 9 tokens were cached)")
    finally:
        terminal.close()
    # To a file it goes as it is.
    assert run(live, "c", "--json", "-m", said).returncode == 0
    done = subprocess.run(command(live, "c", "-m", said), capture_output=True, timeout=120)
    assert done.stdout.decode() == f"You said: {said}\n"


def test_what_is_no_text_is_refused_in_a_line(talking: tuple[Live, Replies]) -> None:
    live, replies = talking
    done = subprocess.run(
        command(live, "c"), input=b"one\n\xff\xfe\n", capture_output=True, timeout=120
    )
    assert done.returncode == 2
    assert b"engram: error:" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(replies.bodies) <= 1
