"""One client of a storm: what it does, one request after another, and what it is answered."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import httpx

from engram.testing.storm_turns import (
    NEW_TOKENS,
    TIMEOUT_S,
    TOKENS,
    Reply,
    StormError,
    Turn,
    generation_of,
    reply_of,
    require_same,
)

BUSY: Final = (503, 504)
"""Asks for a retry, which it gets."""
LONGEST: Final = 400
"""Tokens of a conversation, so that the tiny pools hold one for each client."""


class Board(Protocol):
    """What the clients of a storm share: `turns` are the complete ones, by conversation."""

    url: str
    turns: dict[str, list[Turn]]

    def count(self, what: str) -> None: ...

    def add(self, turn: Turn) -> None: ...


class StormClient:
    """One user: its requests go one after another, on conversations that it shares."""

    def __init__(self, storm: Board, numbers: random.Random) -> None:
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
        body = generation_of(prompt, rid=rid, conversation_id=conversation)
        reply = self._reply(self._post("/generate", body), rid, prompt)
        turn = Turn(conversation, rid, (*prompt, *reply.tokens), len(prompt), reply)
        self.storm.add(turn)
        self.storm.count("turns")

    def leave_while_talking(self) -> None:
        """A client that goes away in the middle of its reply: no turn of anybody's."""
        conversation = self.numbers.choice(list(self.storm.turns))
        prompt = (*self._before(conversation), *self._message())
        body = generation_of(prompt, conversation_id=conversation, stream=True, new_tokens=60)
        with self.http.stream("POST", "/generate", json=body) as response:
            for _ in response.iter_lines():
                break
        self.storm.count("aborts")

    def save(self) -> None:
        self._with_turn(self._save, lambda turn: turn.saved is None and not turn.deleted)

    def _save(self, turn: Turn) -> None:
        saved = self._ok("/save_snapshot", {"rid": turn.rid})
        self._is_of(saved, turn)
        require_same(saved["durability"], "sync", "durability")
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
            require_same(restored["snapshot_id"], turn.saved["snapshot_id"], "snapshot_id")
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
            require_same(made["rid"], rid, "rid")
            require_same(len(made["output_ids"]), NEW_TOKENS, "output_ids")
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
            require_same(deleted["snapshot_id"], turn.saved["snapshot_id"], "snapshot_id")
            self.storm.count("deletions")

        self._with_turn(remove, _is_there)

    def list(self) -> None:
        conversation = self.numbers.choice(list(self.storm.turns))
        response = self._post("/list_snapshots", {"conversation_id": conversation}, (200, 404))
        for metadata in response.get("snapshots", []):
            require_same(metadata["conversation_id"], conversation, "conversation_id")
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
        require_same(reply["conversation_id"], turn.conversation, "conversation_id")
        require_same(reply["token_count"], len(turn.tokens) - 1, "token_count")

    def _reply(self, body: dict[str, Any], rid: str, prompt: Sequence[int]) -> Reply:
        require_same(body["meta_info"]["id"], rid, "rid")
        reply = reply_of(body)
        require_same(reply.prompt_tokens, len(prompt), "prompt_tokens")
        require_same(len(reply.tokens), NEW_TOKENS, "tokens")
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


def _is_there(turn: Turn) -> bool:
    return turn.saved is not None and not turn.deleted
