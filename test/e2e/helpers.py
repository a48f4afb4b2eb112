"""A client of a test server, and replies in a form that can be compared."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from refusals import refusal

PRINTABLE_IDS = range(6, 104)
"""Ids of the tiny tokenizer's characters: no special token and no byte escape among them."""

TOP = 5
TIMEOUT_S = 120.0
DEADLINE_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Return when something has come about; fail with `what` was to be if it does not."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@dataclass(frozen=True)
class Output:
    """What must be equal when two replies are the same, bit for bit.

    `tokens` are ids where the route tells them, else the tokens' texts.
    """

    tokens: tuple[Any, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[Any, float], ...], ...]
    text: str


@dataclass(frozen=True)
class Reply:
    """One generation: `cached` of its `prompt_tokens` were not computed."""

    rid: str
    output: Output
    prompt_tokens: int
    cached: int
    finish: str | None = None

    @property
    def tokens(self) -> tuple[Any, ...]:
        return self.output.tokens


class Client:
    """Talks to one server. `post` gives the raw response, the rest insist on success."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def ok(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.post(path, body)
        reply: dict[str, Any] = response.json()
        assert response.status_code == 200, reply
        assert reply["success"] is True, reply
        return reply

    def refused(self, path: str, body: Any, status: int) -> dict[str, Any]:
        """What a failure says: `error` (its code), `message`, `hint`, `details`."""
        response = self.post(path, body)
        assert response.status_code == status, (response.status_code, response.text)
        return refusal(response)

    def save(self, **body: Any) -> dict[str, Any]:
        return self.ok("/save_snapshot", body)

    def restore(self, **body: Any) -> dict[str, Any]:
        return self.ok("/restore_snapshot", body)

    def info(self, **body: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = self.ok("/get_snapshot_info", body)["metadata"]
        return metadata

    def snapshots(self, conversation: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ok("/list_snapshots", {"conversation_id": conversation})[
            "snapshots"
        ]
        return found

    def delete(self, **body: Any) -> dict[str, Any]:
        return self.ok("/delete_snapshot", body)

    def count(self, text: str) -> int:
        """How many tokens the server makes of a text."""
        body = {"prompt": text, "add_special_tokens": False}
        counted: int = self.post("/tokenize", body).raise_for_status().json()["count"]
        return counted

    def flush(self) -> None:
        """Empty SGLang's tree: nothing is in VRAM any more."""
        self.http.post("/flush_cache", params={"timeout": 30}).raise_for_status()

    def generate(
        self,
        ids: Sequence[int],
        new_tokens: int = 8,
        conversation: str | None = None,
        params: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Reply:
        """Greedy generation of exactly `new_tokens`, unless `params` say otherwise."""
        body: dict[str, Any] = {
            "input_ids": list(ids),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
                **(params or {}),
            },
            "return_logprob": True,
            "top_logprobs_num": TOP,
            **fields,
        }
        if conversation is not None:
            body["conversation_id"] = conversation
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return native_reply(response.json())


def native_reply(body: dict[str, Any]) -> Reply:
    """A `/generate` response as a `Reply`."""
    meta = body["meta_info"]
    chosen = meta["output_token_logprobs"]
    top = meta["output_top_logprobs"]
    return Reply(
        rid=meta["id"],
        output=Output(
            tuple(body["output_ids"]),
            tuple(logprob for logprob, _, _ in chosen),
            tuple(tuple((token, logprob) for logprob, token, _ in step) for step in top),
            body["text"],
        ),
        prompt_tokens=meta["prompt_tokens"],
        cached=meta["cached_tokens"],
        finish=(meta["finish_reason"] or {}).get("type"),
    )


def random_ids(numbers: random.Random, count: int) -> list[int]:
    return numbers.choices(PRINTABLE_IDS, k=count)


def random_text(numbers: random.Random, count: int) -> str:
    """One token a character."""
    return "".join(numbers.choices(string.ascii_letters + " ,.", k=count))


def assert_close(reply: Reply, reference: Reply, tolerance: float) -> None:
    """The same tokens, and logprobs within `tolerance`."""
    assert reply.tokens == reference.tokens
    worst = max(
        abs(one - other)
        for one, other in zip(reply.output.logprobs, reference.output.logprobs, strict=True)
    )
    assert worst <= tolerance, worst


def assert_quarantined(store: Path, name: str) -> None:
    """The file `name` has left its place and lies in quarantine."""
    assert not list((store / "segments").rglob(name))
    assert [path for path in (store / "quarantine").iterdir() if path.name.endswith(name)]
