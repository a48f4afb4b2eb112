"""The demonstration: a conversation survives `kill -9` of its server, bit for bit.

    python -m engram.testing.demo --text LICENSE

makes a small random model, reads a text into a conversation over several turns, saves, asks the
next turn, kills the server, starts another, restores, and asks the same turn again.  `scripts/demo`
prepares the environment and calls this.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram.testing.chat import Chat, Reply
from engram.testing.demo_report import Outcome, show
from engram.testing.server import ServerError, ServerProcess
from engram.testing.tiny_model import write_tiny_model

CONVERSATION = "demo"
QUESTION = "Which section speaks about patents, and what ends the rights that it gives?"
FLAGS = (
    "--enable-snapshot-persistence",
    "--mamba-scheduler-strategy",
    "no_buffer",
    "--disable-radix-cache",
)
"""Of the launch command in README; the model, the store, host and port go with them."""
REPLY_TOKENS = 24
TURNS = 4
# As Granite-4.0-H has them: one attention layer to nine Mamba-2 layers.
LAYERS = (*["mamba"] * 4, "attention", *["mamba"] * 5)
# The tokenizer makes a token of a character; the text and the replies have to fit.
MODEL_LENGTH = 32_768


class DemoError(RuntimeError):
    """Something went other than shown; the message says what."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `folder` is empty when the demo begins."""

    folder: Path
    text: str
    seed: int
    timeout: float


class Progress:
    """Prints a line when a step begins and its time when it is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step; its line is there before it begins, for who looks at a log file."""
        began = time.monotonic()
        self.console.print(f"[bold cyan]>[/] {what}")
        with self.console.status(f"{what} ..."):
            yield
        self.console.print(f"  [dim]{time.monotonic() - began:.1f} s[/]")

    def say(self, what: str) -> None:
        """A line about what a step found."""
        self.console.print(f"  {what}")


def run(options: Options, progress: Progress) -> Outcome:
    """Play the demo and return what was seen; servers are stopped however it ends.

    Raises:
        ServerError: a server did not start.
        DemoError: a route answered with a failure.
    """
    folder = options.folder
    with progress.step("make a small hybrid model: 9 Mamba-2 layers and 1 of attention"):
        transformers_logging.disable_progress_bar()
        model = write_tiny_model(
            folder / "model", seed=options.seed, layers=LAYERS, max_length=MODEL_LENGTH
        )
    server = ServerProcess(
        model,
        [*FLAGS, "--snapshot-dir", str(folder / "snapshots")],
        log_path=folder / "server.log",
        timeout=options.timeout,
    )
    try:
        with progress.step("start SGLang with snapshots (this takes up to a minute or two)"):
            server.start()
        chat = Chat(server.url, CONVERSATION, REPLY_TOKENS)
        _read_in(chat, options.text, progress)
        with progress.step("save the conversation: POST /save_snapshot"):
            saved = _post(server, "/save_snapshot", {"conversation_id": CONVERSATION})
        progress.say(
            f"turn {saved['turn_number']} is durable: {saved['token_count']} tokens, "
            f"{saved['bytes'] / 1e6:.1f} MB"
        )
        with progress.step("ask the next question on this server, which was never stopped"):
            warm = chat.ask(QUESTION, keep=False)
        with progress.step("kill -9 every process of the server"):
            server.kill()
        with progress.step("start it again, with the same command"):
            server.start()
        with progress.step("restore the conversation: POST /restore_snapshot"):
            restore = _post(
                server,
                "/restore_snapshot",
                {"conversation_id": CONVERSATION, "turn_number": saved["turn_number"]},
            )
        progress.say(
            f"{restore['token_count']} tokens back in memory from {restore['source_tier']}, "
            f"verified: {str(restore['verified']).lower()}"
        )
        with progress.step("ask the same question again"):
            restored = chat.ask(QUESTION, keep=False)
        with progress.step("ask it once more where nothing can be reused, for comparison"):
            # Another salt makes other page keys: for this request the caches are empty.
            cold = chat.ask(QUESTION, keep=False, cache_salt="cold", tagged=False)
    finally:
        server.kill()
    return Outcome(saved=saved, restore=restore, cold=cold, warm=warm, restored=restored)


def _read_in(chat: Chat, text: str, progress: Progress) -> None:
    for number, part in enumerate(parts(text, TURNS), start=1):
        with progress.step(f"turn {number} of {TURNS}: {len(part)} characters of the text"):
            reply = chat.ask(part)
        progress.say(_facts(reply))


def _facts(reply: Reply) -> str:
    return (
        f"{reply.prompt_tokens} prompt tokens, {reply.cached_tokens} of them cached, "
        f"first token after {reply.first_token_s * 1e3:.0f} ms"
    )


def parts(text: str, count: int) -> list[str]:
    """Cut a text into `count` parts of about equal length, each but the last ending a line."""
    found = []
    for left in range(count, 1, -1):
        cut = text.rfind("\n", 0, max(1, len(text) // left)) + 1 or len(text) // left
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text]


def _post(server: ServerProcess, route: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(server.url + route, json=body, timeout=120.0)
    answer: dict[str, Any] = response.json()
    if response.status_code != 200 or not answer.get("success"):
        raise DemoError(f"{route} answered {response.status_code}: {answer.get('message')}")
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if the restored turn was what it has to be, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("LICENSE"), help="text to read in")
    parser.add_argument("--dir", type=Path, help="empty folder to keep model, store and log in")
    parser.add_argument("--seed", type=int, default=1, help="of the model's random weights")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a server may take")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        text = chosen.text.read_text()
        with _folder(chosen.dir) as folder:
            options = Options(folder, text, chosen.seed, chosen.timeout)
            outcome = run(options, Progress(console))
            show(console, outcome, folder if chosen.dir else None)
        return 0 if outcome.exact else 1
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped")
        return 130
    except (DemoError, ServerError, OSError, ValueError) as error:
        console.print(f"error: {error}", markup=False)
        return 1


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="engram-demo-") as name:
            yield Path(name)
        return
    wanted = wanted.absolute()
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise DemoError(f"{wanted} is not an empty folder; name another, or remove it")
    wanted.mkdir(parents=True, exist_ok=True)
    yield wanted


if __name__ == "__main__":
    sys.exit(main())
