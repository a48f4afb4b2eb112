"""Many clients at once: turns, saves, restores, continuations, aborts and deletions.

Every client knows which tokens its replies must stand on, so each reply is checked to be its
caller's; what was acknowledged as durable is checked by `verify` on a server started afterwards.

    storm = Storm(server.url, seeded_random(), clients=16, conversations=40, saves=200)
    storm.run()
    server.kill()
    server.start()
    print(verify(storm, server.url))

Run the server with `--dtype float32` and SGLANG_MAMBA_CONV_DTYPE=float32: conversations branch
here, and what branches share is compared as close as float32 computes it.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

TOLERANCE: Final = 1e-3
"""Between logprobs of the same tokens computed in other batches, in float32."""
TOP: Final = 5
NEW_TOKENS: Final = 8
TOKENS: Final = range(6, 104)
"""The tiny tokenizer's characters."""
BUSY: Final = (503, 504)
"""Asks for a retry, which it gets."""
LONGEST: Final = 400
"""Tokens of a conversation, so that the tiny pools hold one for each client."""
TIMEOUT_S: Final = 300.0


class StormError(AssertionError):
    """A reply that was not its caller's, or a promise that was not kept."""


@dataclass(frozen=True)
class Reply:
    """One generation, as `/generate` returns it with logprobs."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]
    prompt_tokens: int
    cached: int


@dataclass(eq=False)
class Turn:
    """A completed reply of a conversation: `tokens` are all of it, `saved` the acknowledgement."""

    conversation: str
    rid: str
    tokens: tuple[int, ...]
    prompt_length: int
    reply: Reply | None = None
    saved: dict[str, Any] | None = None
    maybe_saved: bool = False
    deleted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Storm:
    """`run` returns when `saves` were acknowledged as durable, or after `end` was called."""

    def __init__(
        self,
        url: str,
        numbers: random.Random,
        *,
        clients: int,
        conversations: int,
        saves: int,
        name: str = "storm",
    ) -> None:
        """Conversations are called `name` and a number."""
        self.url = url
        self.turns: dict[str, list[Turn]] = {f"{name}-{n}": [] for n in range(conversations)}
        self.counts: Counter[str] = Counter()
        self._seeds = [numbers.randrange(2**32) for _ in range(clients)]
        self._wanted = saves
        self._lock = threading.Lock()
        self._end = threading.Event()
        self.enough = threading.Event()

    @property
    def acknowledged(self) -> list[Turn]:
        """Every turn that is durable by word of the server and was not deleted since."""
        found = [turn for turns in self.turns.values() for turn in turns]
        return [turn for turn in found if turn.saved is not None and not turn.deleted]

    @property
    def replies(self) -> list[Turn]:
        """Every turn whose reply is known with its logprobs."""
        return [t for turns in self.turns.values() for t in turns if t.reply is not None]

    def run(self, *, until_killed: bool = False) -> None:
        """Let all clients loose. With `until_killed` they go on past `enough` saves, until the
        server is gone: what they are then told must be an error, and is counted as `cut_off`."""
        with ThreadPoolExecutor(len(self._seeds)) as pool:
            clients = [pool.submit(self._client, seed, until_killed) for seed in self._seeds]
            try:
                for client in clients:
                    client.result()
            finally:
                self._end.set()

    def _client(self, seed: int, until_killed: bool) -> None:
        client = _Client(self, random.Random(seed))
        try:
            while not self._end.is_set():
                client.act()
                if self.counts["saves"] >= self._wanted:
                    self.enough.set()
                    if not until_killed:
                        return
        except httpx.TransportError:
            if not (until_killed and self.enough.is_set()):
                raise
            self.count("cut_off")
        except BaseException:
            self._end.set()
            self.enough.set()
            raise
        finally:
            client.http.close()

    def count(self, what: str) -> None:
        """One more of something."""
        with self._lock:
            self.counts[what] += 1

    def add(self, turn: Turn) -> None:
        """A client has a complete reply."""
        with self._lock:
            self.turns[turn.conversation].append(turn)


class _Client:
    """One user: its requests go one after another, on conversations that it shares."""

    def __init__(self, storm: Storm, numbers: random.Random) -> None:
        self.storm = storm
        self.numbers = numbers
        self.http = httpx.Client(base_url=storm.url, timeout=TIMEOUT_S)
        self.actions: list[tuple[int, Callable[[], None]]] = [
            (30, self.talk),
            (6, self.leave_while_talking),
            (30, self.save),
            (6, self.save_later),
            (5, self.leave_while_saving),
            (10, self.restore),
            (8, self.go_on),
            (3, self.delete),
            (3, self.list),
        ]

    def act(self) -> None:
        weights, actions = zip(*self.actions, strict=True)
        self.numbers.choices(actions, weights)[0]()

    # ---- what clients do ----

    def talk(self) -> None:
        """The next turn of a conversation, from any of its turns on."""
        conversation = self.numbers.choice(list(self.storm.turns))
        prompt = (*self._before(conversation), *self._message())
        rid = self._rid()
        body = _generation(prompt, rid=rid, conversation_id=conversation)
        reply = self._reply(self._post("/generate", body), rid, prompt)
        turn = Turn(conversation, rid, (*prompt, *reply.tokens), len(prompt), reply)
        self.storm.add(turn)
        self.storm.count("turns")

    def leave_while_talking(self) -> None:
        """A client that goes away in the middle of its reply: no turn of anybody's."""
        conversation = self.numbers.choice(list(self.storm.turns))
        prompt = (*self._before(conversation), *self._message())
        body = _generation(prompt, conversation_id=conversation, stream=True, new_tokens=60)
        with self.http.stream("POST", "/generate", json=body) as response:
            for _ in response.iter_lines():
                break
        self.storm.count("aborts")

    def save(self) -> None:
        self._with_turn(self._save, lambda turn: turn.saved is None and not turn.deleted)

    def _save(self, turn: Turn) -> None:
        saved = self._ok("/save_snapshot", {"rid": turn.rid})
        self._is_of(saved, turn)
        _same(saved["durability"], "sync", "durability")
        turn.saved = saved
        self.storm.count("saves")

    def save_later(self) -> None:
        def later(turn: Turn) -> None:
            saved = self._ok("/save_snapshot", {"rid": turn.rid, "durability": "async"})
            self._is_of(saved, turn)
            turn.maybe_saved = True
            self.storm.count("async_saves")

        self._with_turn(later, lambda turn: turn.saved is None and not turn.deleted)

    def leave_while_saving(self) -> None:
        """The save completes or leaves nothing: which of the two is found out by `verify`."""

        def leave(turn: Turn) -> None:
            turn.maybe_saved = True
            patience = self.numbers.uniform(0.001, 0.1)
            try:
                self.http.post("/save_snapshot", json={"rid": turn.rid}, timeout=patience)
            except httpx.TimeoutException:
                self.storm.count("left_saves")

        self._with_turn(leave, lambda turn: turn.saved is None and not turn.deleted)

    def restore(self) -> None:
        def bring(turn: Turn) -> None:
            restored = self._ok("/restore_snapshot", {"rid": turn.rid})
            self._is_of(restored, turn)
            assert turn.saved is not None
            _same(restored["snapshot_id"], turn.saved["snapshot_id"], "snapshot_id")
            self.storm.count("restores")

        self._with_turn(bring, _is_there)

    def go_on(self) -> None:
        """A generation of the server's own from a snapshot: the next turn of the conversation."""

        def generate(turn: Turn) -> None:
            assert turn.saved is not None
            if len(turn.tokens) > LONGEST:
                return
            message, rid = self._message(), self._rid()
            made = self._ok(
                "/restore_snapshot",
                {
                    "conversation_id": turn.conversation,
                    "turn_number": turn.saved["turn_number"],
                    "create_new_request": True,
                    "continuation_ids": list(message),
                    "max_new_tokens": NEW_TOKENS,
                    "sampling_params": {"temperature": 0, "ignore_eos": True},
                    "request_id": rid,
                },
            )
            self._is_of(made, turn)
            _same(made["rid"], rid, "rid")
            _same(len(made["output_ids"]), NEW_TOKENS, "output_ids")
            if made["cached_tokens"] < made["token_count"]:
                raise StormError(f"{made['cached_tokens']} cached of {made['token_count']}")
            prompt = (*turn.tokens, *message)
            self.storm.add(
                Turn(turn.conversation, rid, (*prompt, *made["output_ids"]), len(prompt))
            )
            self.storm.count("continuations")

        self._with_turn(generate, _is_there)

    def delete(self) -> None:
        def remove(turn: Turn) -> None:
            assert turn.saved is not None
            place = {
                "conversation_id": turn.conversation,
                "turn_number": turn.saved["turn_number"],
            }
            # Whatever the answer, if the server ends meanwhile: it may be gone.
            turn.deleted = True
            deleted = self._ok("/delete_snapshot", place)
            _same(deleted["snapshot_id"], turn.saved["snapshot_id"], "snapshot_id")
            self.storm.count("deletions")

        self._with_turn(remove, _is_there)

    def list(self) -> None:
        conversation = self.numbers.choice(list(self.storm.turns))
        response = self._post("/list_snapshots", {"conversation_id": conversation}, (200, 404))
        for metadata in response.get("snapshots", []):
            _same(metadata["conversation_id"], conversation, "conversation_id")
        self.storm.count("lists")

    # ---- how ----

    def _with_turn(self, action: Callable[[Turn], None], fits: Callable[[Turn], bool]) -> None:
        """Do something to a turn that nobody else does anything to."""
        conversations = list(self.storm.turns)
        self.numbers.shuffle(conversations)
        for conversation in conversations:
            turns = list(self.storm.turns[conversation])
            self.numbers.shuffle(turns)
            for turn in turns:
                if turn.lock.acquire(blocking=False):
                    try:
                        if fits(turn):
                            action(turn)
                            return
                    finally:
                        turn.lock.release()

    def _before(self, conversation: str) -> tuple[int, ...]:
        """What a new turn stands on: mostly one of the newest, at times nothing."""
        turns = [t for t in self.storm.turns[conversation][-4:] if len(t.tokens) < LONGEST]
        if not turns or self.numbers.random() < 0.1:
            return ()
        return self.numbers.choice(turns).tokens

    def _message(self) -> tuple[int, ...]:
        return tuple(self.numbers.choices(TOKENS, k=self.numbers.randrange(5, 40)))

    def _rid(self) -> str:
        # No id may begin with another: SGLang aborts by prefix.
        return f"rid-{self.numbers.getrandbits(96):024x}"

    def _is_of(self, reply: dict[str, Any], turn: Turn) -> None:
        _same(reply["conversation_id"], turn.conversation, "conversation_id")
        _same(reply["token_count"], len(turn.tokens) - 1, "token_count")

    def _reply(self, body: dict[str, Any], rid: str, prompt: Sequence[int]) -> Reply:
        _same(body["meta_info"]["id"], rid, "rid")
        reply = reply_of(body)
        _same(reply.prompt_tokens, len(prompt), "prompt_tokens")
        _same(len(reply.tokens), NEW_TOKENS, "tokens")
        return reply

    def _ok(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._post(path, body)

    def _post(
        self, path: str, body: dict[str, Any], allowed: Sequence[int] = (200,)
    ) -> dict[str, Any]:
        for _ in range(1000):
            response = self.http.post(path, json=body)
            if response.status_code not in BUSY:
                break
            self.storm.count("busy")
        if response.status_code not in allowed:
            raise StormError(f"{path} {body}: {response.status_code} {response.text}")
        found: dict[str, Any] = response.json()
        return found


# ---- afterwards ----


@dataclass
class Verdict:
    """What `verify` has compared."""

    restored: int = 0
    replies: int = 0
    repeated: int = 0
    undecided_saves: int = 0
    undecided_present: int = 0
    ties: int = 0
    largest_difference: float = 0.0


def verify(storm: Storm, url: str, *, repeats: int = 10, replies: bool = True) -> Verdict:
    """Restore every acknowledged snapshot and compare its next turn with one computed cold.

    Cold is a request under an extra key of its own, which shares nothing with any other. With
    `replies` those of the storm are compared with cold ones too: each must be the answer to its own
    prompt. `repeats`
    snapshots are restored twice into an empty tree, which must give equal bits. Raises
    `StormError`.
    """
    verdict = Verdict()
    numbers = random.Random(0)
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        for number, turn in enumerate(storm.acknowledged):
            message = tuple(numbers.choices(TOKENS, k=12))
            prompt = (*turn.tokens, *message)
            warm = _restored(http, turn, prompt)
            _agree(warm, _cold(http, prompt, f"next-{number}"), verdict)
            verdict.restored += 1
            if number < repeats:
                _flush(http)
                first = _restored(http, turn, prompt)
                _flush(http)
                _same(_restored(http, turn, prompt), first, "second restore")
                verdict.repeated += 1
        for number, turn in enumerate(storm.replies if replies else ()):
            prompt = turn.tokens[: turn.prompt_length]
            cold = _cold(http, prompt, f"reply-{number}")
            assert turn.reply is not None
            _agree(turn.reply, cold, verdict)
            verdict.replies += 1
        for turns in storm.turns.values():
            for turn in turns:
                if turn.maybe_saved and turn.saved is None and not turn.deleted:
                    verdict.undecided_saves += 1
                    verdict.undecided_present += _there_or_not(http, turn)
    return verdict


def check_listings(http: httpx.Client, storm: Storm) -> int:
    """Every snapshot listed of the storm's conversations restores, with the tokens of its turn, and
    none of them was deleted; how many are listed. Raises `StormError`."""
    turns = {turn.rid: turn for turns in storm.turns.values() for turn in turns}
    count = 0
    for conversation in storm.turns:
        listed = http.post("/list_snapshots", json={"conversation_id": conversation})
        if listed.status_code == 404:
            continue
        for metadata in listed.json()["snapshots"]:
            place = {
                "conversation_id": conversation,
                "turn_number": metadata["turn_number"],
                "branch_name": metadata["branch_name"],
            }
            restored = http.post("/restore_snapshot", json=place)
            if restored.status_code != 200:
                raise StormError(f"listed, but: {restored.status_code} {restored.text}")
            _same(restored.json()["snapshot_id"], metadata["snapshot_id"], "snapshot_id")
            info = http.post("/get_snapshot_info", json=place).json()["metadata"]
            turn = turns.get(info["rid"])
            # A turn whose client never got the reply may have been saved with the server's word.
            if turn is not None:
                _same(tuple(info["fill_ids"]), turn.tokens, "tokens")
            count += 1
    return count


def _restored(http: httpx.Client, turn: Turn, prompt: Sequence[int]) -> Reply:
    """The next turn behind an explicit restore, which must have saved the prefill."""
    assert turn.saved is not None
    response = http.post("/restore_snapshot", json={"rid": turn.rid})
    if response.status_code != 200:
        raise StormError(f"acknowledged, but: {response.status_code} {response.text}")
    restored = response.json()
    for name in ("snapshot_id", "conversation_id", "turn_number", "token_count"):
        _same(restored[name], turn.saved[name], name)
    reply = _generate(http, prompt)
    _same(reply.cached, turn.saved["token_count"], "cached tokens")
    return reply


def _there_or_not(http: httpx.Client, turn: Turn) -> bool:
    """A save without an answer: whole, with its own tokens, or not there at all."""
    response = http.post("/restore_snapshot", json={"rid": turn.rid})
    if response.status_code == 404:
        return False
    if response.status_code != 200:
        raise StormError(f"torn: {response.status_code} {response.text}")
    _same(response.json()["token_count"], len(turn.tokens) - 1, "token_count")
    return True


def _cold(http: httpx.Client, prompt: Sequence[int], name: str) -> Reply:
    reply = _generate(http, prompt, extra_key=name)
    _same(reply.cached, 0, "cached tokens of a cold request")
    return reply


def _generate(http: httpx.Client, prompt: Sequence[int], **fields: Any) -> Reply:
    response = http.post("/generate", json=_generation(prompt, **fields))
    if response.status_code != 200:
        raise StormError(f"/generate: {response.status_code} {response.text}")
    return reply_of(response.json())


def _flush(http: httpx.Client) -> None:
    http.post("/flush_cache", params={"timeout": 30}).raise_for_status()


def _agree(reply: Reply, reference: Reply, verdict: Verdict) -> None:
    """Equal tokens and close logprobs, up to a token that was as likely as another."""
    for step, (token, wanted) in enumerate(zip(reply.tokens, reference.tokens, strict=True)):
        if token != wanted:
            other = reference.top[step].get(token)
            if other is None or reference.logprobs[step] - other > TOLERANCE:
                raise StormError(f"token {step} is {token}, a cold server says {wanted}")
            verdict.ties += 1
            return
        difference = abs(reply.logprobs[step] - reference.logprobs[step])
        verdict.largest_difference = max(verdict.largest_difference, difference)
        if difference > TOLERANCE:
            raise StormError(f"the logprob of token {step} is {difference} off")


def reply_of(body: dict[str, Any]) -> Reply:
    """A `/generate` response."""
    meta = body["meta_info"]
    return Reply(
        tuple(body["output_ids"]),
        tuple(logprob for logprob, _, _ in meta["output_token_logprobs"]),
        tuple(
            {token: logprob for logprob, token, _ in step} for step in meta["output_top_logprobs"]
        ),
        meta["prompt_tokens"],
        meta["cached_tokens"],
    )


def _generation(
    prompt: Sequence[int], *, new_tokens: int = NEW_TOKENS, **fields: Any
) -> dict[str, Any]:
    return {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP,
        **fields,
    }


def _is_there(turn: Turn) -> bool:
    return turn.saved is not None and not turn.deleted


def _same(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise StormError(f"{what} is {found!r}, not {wanted!r}")
