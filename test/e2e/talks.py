"""One conversation as a client holds it, over each of the routes a client may use.

A talk keeps its own history, as real clients do, and sends all of it every turn.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from e2e.helpers import TIMEOUT_S, TOP, Client, Output, Reply, random_ids, random_text
from engram.testing.tiny_tokenizer import build_tokenizer

NEW_TOKENS = 12
TOKENIZER = build_tokenizer(4096)
DRAWS = 50


class Talk(ABC):
    """`say` is a turn; `peek` is what the next turn would answer, without taking it."""

    def message(self, numbers: random.Random, length: int) -> Any:
        """A random message of `length` tokens."""
        return random_text(numbers, length)

    def draw(self, client: Client, numbers: random.Random, length: int) -> Any:
        """A random message whose reply reads back as the tokens it was made of.

        A history of texts loses special tokens, a byte escape comes back as six characters, and
        the tokenizer of Qwen3.5, which `transformers` takes for its models whatever they come with,
        drops spaces of these: the next turn would not begin with the tokens of this one.
        """
        for _ in range(DRAWS):
            message = self.message(numbers, length)
            reply = self.peek(client, message)
            plain = all(len(token) == 1 for token in reply.tokens)
            if plain and client.count(reply.output.text) == len(reply.tokens):
                return message
        raise AssertionError(f"no reply of plain text after {DRAWS} messages")

    def say(self, client: Client, message: Any, conversation: str | None) -> Reply:
        reply = self.ask(client, message, conversation)
        self.keep(message, reply)
        return reply

    def peek(self, client: Client, message: Any, conversation: str | None = None) -> Reply:
        return self.ask(client, message, conversation)

    @abstractmethod
    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        """Send the history and `message`."""

    @abstractmethod
    def keep(self, message: Any, reply: Reply) -> None:
        """Add a turn to the history."""


class GenerateTalk(Talk):
    """`/generate` with token ids."""

    def __init__(self) -> None:
        self.history: list[int] = []

    def message(self, numbers: random.Random, length: int) -> Any:
        return random_ids(numbers, length)

    def draw(self, client: Client, numbers: random.Random, length: int) -> Any:
        return self.message(numbers, length)

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        return client.generate([*self.history, *message], NEW_TOKENS, conversation)

    def keep(self, message: Any, reply: Reply) -> None:
        self.history += [*message, *reply.tokens]


class KeyedTalk(GenerateTalk):
    """`/generate` with fields that keep its states apart from others: a salt, an adapter."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = fields

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        return client.generate([*self.history, *message], NEW_TOKENS, conversation, **self.fields)

    def under(self, **fields: Any) -> KeyedTalk:
        """The same history under other fields."""
        other = KeyedTalk(**fields)
        other.history = list(self.history)
        return other


class ChatTalk(Talk):
    """OpenAI chat through the `openai` package, the conversation's id in the body."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        made = self._create(client, message, conversation)
        choice = made.choices[0]
        return _chat_reply(made.id, choice.message.content, choice.logprobs.content, made.usage)

    def keep(self, message: Any, reply: Reply) -> None:
        self.messages += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": reply.output.text},
        ]

    def _create(
        self, client: Client, message: Any, conversation: str | None, **options: Any
    ) -> Any:
        if conversation is not None:
            options |= self._tag(conversation)
        return openai_client(client).chat.completions.create(
            model="default",
            messages=[*self.messages, {"role": "user", "content": message}],
            temperature=0,
            max_tokens=NEW_TOKENS,
            logprobs=True,
            top_logprobs=TOP,
            **options,
        )

    def _tag(self, conversation: str) -> dict[str, Any]:
        return {"extra_body": {"conversation_id": conversation}}


class StreamTalk(ChatTalk):
    """The same, streamed, the conversation's id in the header."""

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        text, steps, usage, rid = "", [], None, ""
        for chunk in self._create(
            client, message, conversation, stream=True, stream_options={"include_usage": True}
        ):
            rid = chunk.id
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                steps += choice.logprobs.content if choice.logprobs else []
        return _chat_reply(rid, text, steps, usage)

    def _tag(self, conversation: str) -> dict[str, Any]:
        return {"extra_headers": {"x-override-conversation-id": conversation}}


class StatefulTalk(Talk):
    """Stateful chat: a turn sends its message alone.

    Outside the conversation the same is asked with all tokens, as they were generated: special ones
    and byte escapes too, which no history of texts would bring back.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prompt: list[int] = []

    def draw(self, client: Client, numbers: random.Random, length: int) -> Any:
        return self.message(numbers, length)

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        messages = [{"role": "user", "content": message}]
        self.prompt = self.prompt_of(message)
        if conversation is None:
            body = {"messages": messages, "input_ids": self.prompt}
            return self.post(client, "/v1/chat/completions", body)
        return self.post(client, f"/v1/conversations/{conversation}/chat", {"messages": messages})

    def keep(self, message: Any, reply: Reply) -> None:
        self.ids = [*self.prompt_of(message), *TOKENIZER.convert_tokens_to_ids(list(reply.tokens))]

    def prompt_of(self, message: str) -> list[int]:
        """All that is recorded, the end of its turn once, and a message."""
        end = [] if self.ids[-1:] in ([], [TOKENIZER.eos_token_id]) else [TOKENIZER.eos_token_id]
        said = TOKENIZER.encode(f"<|user|>{message}<|assistant|>", add_special_tokens=False)
        return [*self.ids, *end, *said]

    @staticmethod
    def post(client: Client, path: str, body: dict[str, Any]) -> Reply:
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": True}
        response = client.post(path, {**options, "top_logprobs": TOP, **body})
        assert response.status_code == 200, response.text
        made = ChatCompletion.model_validate(response.json())
        choice = made.choices[0]
        assert choice.logprobs is not None
        return _chat_reply(made.id, choice.message.content, choice.logprobs.content, made.usage)


class CompletionTalk(Talk):
    """`/v1/completions` through the `openai` package."""

    def __init__(self) -> None:
        self.text = ""

    def ask(self, client: Client, message: Any, conversation: str | None) -> Reply:
        extra = {} if conversation is None else {"conversation_id": conversation}
        made = openai_client(client).completions.create(
            model="default",
            prompt=self.text + message,
            temperature=0,
            max_tokens=NEW_TOKENS,
            logprobs=TOP,
            extra_body={"ignore_eos": True, **extra},
        )
        found = made.choices[0].logprobs
        output = Output(
            tuple(found.tokens),
            tuple(found.token_logprobs),
            tuple(tuple(sorted(step.items())) for step in found.top_logprobs),
            made.choices[0].text,
        )
        return Reply(made.id, output, made.usage.prompt_tokens, _cached(made.usage))

    def keep(self, message: Any, reply: Reply) -> None:
        self.text += message + reply.output.text


def openai_client(client: Client) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{client.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    )


def _chat_reply(rid: str, text: str, steps: Any, usage: Any) -> Reply:
    output = Output(
        tuple(step.token for step in steps),
        tuple(step.logprob for step in steps),
        tuple(tuple((top.token, top.logprob) for top in step.top_logprobs) for step in steps),
        text,
    )
    return Reply(rid, output, usage.prompt_tokens, _cached(usage))


def _cached(usage: Any) -> int:
    assert usage.prompt_tokens_details is not None, "the reply does not say what was cached"
    cached: int = usage.prompt_tokens_details.cached_tokens
    return cached
