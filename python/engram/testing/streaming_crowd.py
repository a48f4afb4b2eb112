"""Many conversations that stream at once, and whose clients go away in the middle of replies.

Each client holds one stateful conversation. For some of its messages it reads a few tokens of a
long reply, closes the connection, and says the same again; what it left must not be a turn.
Afterwards `verify` compares every reply with one computed alone, from the first token on.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from engram.testing.chat import NEVER_END
from engram.testing.storm_turns import StormError, require_same
from engram.testing.storm_verdict import TOLERANCE
from engram.testing.tiny_tokenizer import build_tokenizer

TIMEOUT_S: Final = 300.0
REPLY: Final = 12
LEFT_REPLY: Final = 400
"""Tokens of a reply that nobody reads to its end."""
MOST_READ: Final = 20
"""Tokens of it that are read, at most."""
TOP: Final = 5
PAUSE_S: Final = 0.05
"""Between asking again whether the server has noticed that a client has gone."""
TEXT: Final = "abcdefghijklmnopqrstuvwxyz ,."
CONFLICT: Final = 409


@dataclass(frozen=True)
class Streamed:
    """One complete reply: texts of its tokens, and of each the logprob and those of its rivals."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[str, float], ...]
    prompt_tokens: int
    cached: int
    pieces: int


@dataclass
class Talker:
    """One conversation: `ids` are all tokens of its turns, `asked` each prompt with its reply."""

    name: str
    numbers: random.Random
    ids: list[int] = field(default_factory=list)
    asked: list[tuple[list[int], Streamed]] = field(default_factory=list)


@dataclass
class StreamVerdict:
    """What `verify` has compared."""

    replies: int = 0
    next_turns: int = 0
    ties: int = 0
    largest_difference: float = 0.0


class StreamingCrowd:
    """Clients at one server; `counts` says what they did.  Raises `StormError`."""

    def __init__(self, url: str, numbers: random.Random, conversations: int, name: str) -> None:
        self.counts: Counter[str] = Counter()
        self.talkers = [
            Talker(f"{name}-{number}", random.Random(numbers.getrandbits(64)))
            for number in range(conversations)
        ]
        self._url = url
        self._tokenizer = build_tokenizer(8192)

    def run(self, turns: int, leaving: float = 0.5) -> None:
        """So many turns of every conversation, all conversations at once.

        Before a share `leaving` of them the client leaves an attempt at the same message.
        """

        async def talk(http: httpx.AsyncClient, talker: Talker) -> None:
            for _ in range(turns):
                message = self._message(talker)
                if talker.numbers.random() < leaving:
                    await self._leave(http, talker, message)
                await self._say(http, talker, message)

        async def all_of_them() -> None:
            async with self._http() as http:
                await asyncio.gather(*(talk(http, talker) for talker in self.talkers))

        asyncio.run(all_of_them())

    def verify(self) -> StreamVerdict:
        """Every reply against a cold one, the server's record, and the next turn.  `StormError`."""

        async def look() -> StreamVerdict:
            verdict = StreamVerdict()
            async with self._http() as http:
                for talker in self.talkers:
                    await self._recorded_is(http, talker)
                    for prompt, reply in talker.asked:
                        _agree(reply, await self._cold(http, prompt), verdict)
                        verdict.replies += 1
                    prompt = self._prompt(talker, message := self._message(talker))
                    before = len(talker.ids)
                    reply = await self._say(http, talker, message)
                    # All but the token that was sampled last; that one too where a reply that was
                    # left had gone on with the same tokens.
                    if reply.cached < before - 1:
                        raise StormError(f"{talker.name}: {reply.cached} cached of {before}")
                    _agree(reply, await self._cold(http, prompt), verdict)
                    verdict.next_turns += 1
            return verdict

        return asyncio.run(look())

    # ---- what clients do ----

    async def _leave(self, http: httpx.AsyncClient, talker: Talker, message: str) -> None:
        patience = talker.numbers.randint(1, MOST_READ)
        body = self._body(message, LEFT_REPLY)
        while True:
            async with http.stream("POST", self._path(talker), json=body) as response:
                if response.status_code == CONFLICT:
                    self.counts["busy"] += 1
                    await asyncio.sleep(PAUSE_S)
                    continue
                await _require_ok(response)
                read = 0
                async for chunk in _chunks(response):
                    read += sum(bool(choice["delta"].get("content")) for choice in chunk["choices"])
                    if read >= patience:
                        break
                self.counts["left"] += 1
                return

    async def _say(self, http: httpx.AsyncClient, talker: Talker, message: str) -> Streamed:
        prompt = self._prompt(talker, message)
        body = self._body(message, REPLY)
        while True:
            async with http.stream("POST", self._path(talker), json=body) as response:
                if response.status_code == CONFLICT:
                    self.counts["busy"] += 1
                    await asyncio.sleep(PAUSE_S)
                    continue
                await _require_ok(response)
                reply = _streamed([chunk async for chunk in _chunks(response)])
            break
        require_same(reply.prompt_tokens, len(prompt), f"prompt of {talker.name}")
        require_same(len(reply.tokens), REPLY, f"reply to {talker.name}")
        talker.asked.append((prompt, reply))
        talker.ids = [*prompt, *self._tokenizer.convert_tokens_to_ids(list(reply.tokens))]
        self.counts["turns"] += 1
        return reply

    async def _recorded_is(self, http: httpx.AsyncClient, talker: Talker) -> None:
        """What the server has of a conversation is what its client said and heard."""
        place = {"conversation_id": talker.name}
        saved = await http.post("/save_snapshot", json=place)
        await _require_ok(saved)
        require_same(saved.json()["turn_number"], len(talker.asked), f"turns of {talker.name}")
        info = await http.post("/get_snapshot_info", json=place)
        await _require_ok(info)
        found = info.json()["metadata"]["fill_ids"]
        require_same(found, talker.ids, f"tokens of {talker.name}")

    async def _cold(self, http: httpx.AsyncClient, prompt: Sequence[int]) -> Streamed:
        """The reply to the same tokens of a request that shares nothing with any other."""
        self.counts["cold"] += 1
        body = self._body("", REPLY)
        body |= {"input_ids": list(prompt), "cache_salt": f"cold-{self.counts['cold']}"}
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            await _require_ok(response)
            reply = _streamed([chunk async for chunk in _chunks(response)])
        require_same(reply.cached, 0, "cached tokens of a cold request")
        return reply

    # ---- how ----

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, limits=limits)

    def _path(self, talker: Talker) -> str:
        return f"/v1/conversations/{talker.name}/chat"

    def _message(self, talker: Talker) -> str:
        """Text that says whose it is: another's would be another prompt."""
        words = "".join(talker.numbers.choices(TEXT, k=talker.numbers.randint(5, 40)))
        return f"{talker.name}: {words}"

    def _body(self, message: str, tokens: int) -> dict[str, Any]:
        return {
            "model": "default",
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": tokens,
            "logit_bias": NEVER_END,
            "logprobs": True,
            "top_logprobs": TOP,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _prompt(self, talker: Talker, message: str) -> list[int]:
        """All tokens that a message is answered on."""
        end = [self._tokenizer.eos_token_id] if talker.ids else []
        said = self._tokenizer.encode(f"<|user|>{message}<|assistant|>", add_special_tokens=False)
        return [*talker.ids, *end, *said]


async def _require_ok(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        await response.aread()
        raise StormError(f"{response.url.path}: {response.status_code} {response.text}")


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "choices" not in chunk:
                raise StormError(f"in the middle of a stream: {chunk}")
            yield chunk


def _streamed(chunks: Sequence[dict[str, Any]]) -> Streamed:
    """A reply of its chunks."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    steps = [
        step
        for choice in choices
        if choice.get("logprobs")
        for step in choice["logprobs"]["content"]
    ]
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    if usage is None:
        raise StormError("a stream that ended without its usage")
    return Streamed(
        tuple(step["token"] for step in steps),
        tuple(step["logprob"] for step in steps),
        tuple({top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in steps),
        usage["prompt_tokens"],
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        sum(bool(choice["delta"].get("content")) for choice in choices),
    )


def _agree(reply: Streamed, reference: Streamed, verdict: StreamVerdict) -> None:
    """Equal tokens and close logprobs, up to a token that was as likely as another."""
    for step, (token, wanted) in enumerate(zip(reply.tokens, reference.tokens, strict=True)):
        if token != wanted:
            other = reference.top[step].get(token)
            if other is None or reference.logprobs[step] - other > TOLERANCE:
                raise StormError(f"token {step} is {token!r}, computed alone it is {wanted!r}")
            verdict.ties += 1
            return
        difference = abs(reply.logprobs[step] - reference.logprobs[step])
        verdict.largest_difference = max(verdict.largest_difference, difference)
        if difference > TOLERANCE:
            raise StormError(f"the logprob of token {step} is {difference} off")
