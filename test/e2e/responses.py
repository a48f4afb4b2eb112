"""Replies of `/v1/responses` that go on from one another, with the official OpenAI package."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI

from e2e.clients import WEATHER
from e2e.helpers import Client, random_text
from engram.testing.samples import seeded_random

STORED = ("--enable-response-store",)
"""SGLang's flag: without it there is nothing to go on from."""
TOOL = {"type": "function", **WEATHER["function"]}
WAIT_S = 120


@dataclass
class Responses:
    """What a server was told before it was killed."""

    fetched: dict[str, Any] = field(default_factory=dict)
    """Id of each kept reply -> what was answered to who asked for it."""
    unkept: list[str] = field(default_factory=list)
    """Ids of replies that were not to be kept."""
    next: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    """Name -> a request that goes on from a kept reply, and what was answered to it."""


def respond(url: str, **body: Any) -> dict[str, Any]:
    """One greedy response; of a stream, what its last event says."""
    client = _openai(url)
    (model,) = client.models.list().data
    made: Any = client.responses.create(
        model=model.id, **{"temperature": 0, "max_output_tokens": 12, **body}
    )
    if body.get("stream"):
        made = list(made)[-1].response
    found: dict[str, Any] = made.to_dict(mode="json")
    return found


def said(response: dict[str, Any]) -> Any:
    """What does not differ when the same is computed again."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    usage = response["usage"]
    return output, response["status"], usage["input_tokens"], usage["output_tokens"]


def record_responses(client: Client) -> Responses:
    """Replies in every way there is, and for some what comes after them."""
    numbers, found, url = seeded_random(), Responses(), client.url

    def ask(**body: Any) -> dict[str, Any]:
        return respond(url, input=random_text(numbers, 20), **body)

    first = ask(instructions=random_text(numbers, 15), metadata={"what": "the first"})
    second = ask(previous_response_id=first["id"])
    streamed = ask(previous_response_id=second["id"], stream=True)
    behind = _ended(url, ask(background=True))
    tool = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    called = ask(**tool, max_output_tokens=200)
    (call,) = [item for item in called["output"] if item["type"] == "function_call"]
    for reply in (first, second, streamed, behind, called):
        found.fetched[reply["id"]] = fetch(client, reply["id"])

    answer = {"type": "function_call_output", "call_id": call["call_id"], "output": "cold"}
    message = {"role": "user", "content": random_text(numbers, 20)}
    for name, fields in {
        "second": {"previous_response_id": second["id"], "input": [message]},
        "streamed": {"previous_response_id": streamed["id"], "input": [message], "stream": True},
        "in the background": {"previous_response_id": behind["id"], "input": "go on"},
        "called": {"previous_response_id": called["id"], "input": [answer], "tools": [TOOL]},
    }.items():
        body = {**fields, "store": False}
        reply = respond(url, **body)
        found.next[name] = body, reply
        found.unkept.append(reply["id"])
    return found


def fetch(client: Client, response_id: str) -> Any:
    """A kept reply as its own route answers it."""
    response = client.http.get(f"/v1/responses/{response_id}")
    assert response.status_code == 200, response.text
    return response.json()


def _ended(url: str, response: dict[str, Any]) -> dict[str, Any]:
    client = _openai(url)
    deadline = time.monotonic() + WAIT_S
    while response["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
        response = client.responses.retrieve(response["id"]).to_dict(mode="json")
    return response


def _openai(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
