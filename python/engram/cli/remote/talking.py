"""`engram chat`: talk in a conversation that the server remembers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from engram.cli.remote.connection import (
    INTERRUPTED,
    URL,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
)
from engram.cli.remote.places import BranchArgument, branch_in
from engram.cli.remote.tables import spoken
from engram.client import Conversation
from engram.client.chat import Reply
from engram.client.client import ChatStream
from engram.errors import EngramError, InvalidRequestError, NotFoundError

MessageOption = Annotated[
    str | None, typer.Option("-m", "--message", help="Say this alone, and end.")
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="What a new conversation begins with.")
]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of each reply.")]
TemperatureOption = Annotated[float | None, typer.Option("--temperature", min=0.0)]
HELP: Final = """\
/save [NAME]   make the newest turn durable
/quit          end; Ctrl-D does the same
Ctrl-C         stop a reply; without one, end"""


def chat(
    which: BranchArgument,
    message: MessageOption = None,
    system: SystemOption = None,
    max_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk in a conversation; only what is new is sent.

    With --json each reply is one JSON object on a line.
    """
    with connected(url, api_key, as_json) as client:
        named = branch_in(which)
        conversation = client.conversation(named.conversation_id, named.branch_name)
        options = {"max_tokens": max_tokens, "temperature": temperature}
        talk = _Talk(conversation, options, as_json)
        talk.begin(system)
        if message is not None:
            if not talk.say(message):
                raise typer.Exit(INTERRUPTED)
            return
        talk.all()


class _Talk:
    def __init__(self, conversation: Conversation, options: dict[str, Any], as_json: bool) -> None:
        self._conversation = conversation
        self._options = options
        self._as_json = as_json
        self._system: str | None = None
        self._terminal = sys.stdin.isatty()

    def begin(self, system: str | None) -> None:
        """Say where the conversation stands; a system message is for a new one."""
        try:
            details = self._conversation.details()
        except NotFoundError:
            self._system = system
            told = "a new conversation"
        else:
            told = f"{details.newest_turn} turns so far"
            if system is not None:
                self._note("--system is left out: the conversation has begun already")
        if self._terminal:
            self._note(f"{self._conversation.id}/{self._conversation.branch_name}: {told}; /help")

    def all(self) -> None:
        """Every line is a message, until there are no more."""
        while True:
            try:
                line = input("> " if self._terminal else "").strip()
            except EOFError:
                if self._terminal:
                    typer.echo()
                return
            except UnicodeDecodeError as error:
                raise InvalidRequestError(f"what was typed is no text: {error}") from None
            if line == "/quit":
                return
            if line == "/help":
                typer.echo(HELP, err=True)
            elif line == "/save" or line.startswith("/save "):
                self._told(self._save, line)
            elif line.startswith("/"):
                self._note(f"no such command: {line.split()[0]}; /help")
            elif line:
                self._told(self._said, line)

    def say(self, text: str) -> bool:
        """One turn; False if it was stopped."""
        messages = [{"role": "user", "content": text}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            with self._conversation.stream(messages, **self._options) as stream:
                reply = self._shown(stream)
        except KeyboardInterrupt:
            # The server ends what nobody reads, and does not count it as a turn.
            self._note("\n(stopped; this reply is no turn)")
            return False
        self._system = None
        if self._as_json:
            typer.echo(json.dumps(reply.model_dump(mode="json", exclude={"raw"})))
        return True

    def _shown(self, stream: ChatStream) -> Reply:
        for text in stream:
            if not self._as_json:
                typer.echo(spoken(text), nl=False)
        reply = stream.reply
        if not self._as_json:
            typer.echo()
            for call in reply.tool_calls:
                what = f"{call.function.name} {call.function.arguments}"
                typer.echo(f"(calls {spoken(what)})")
            if self._terminal and reply.usage is not None:
                usage = reply.usage
                self._note(f"({usage.cached_tokens} of {usage.prompt_tokens} tokens were cached)")
        return reply

    def _save(self, command: str) -> None:
        _, _, name = command.partition(" ")
        saved = self._conversation.save(snapshot_id=name.strip() or None)
        self._note(f"{saved.snapshot_id}: {saved.message}")

    def _said(self, text: str) -> None:
        if not self.say(text) and not self._terminal:
            raise typer.Exit(INTERRUPTED)

    def _told(self, act: Callable[[str], None], line: str) -> None:
        """At a terminal, what fails is told and the talk goes on; a script ends."""
        try:
            act(line)
        except EngramError as error:
            if not self._terminal:
                raise
            self._note(f"engram: error: {error}")

    def _note(self, text: str) -> None:
        typer.echo(text, err=True)
