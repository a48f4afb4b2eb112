"""When a call is repeated, and what replies that are no success become."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.client import AsyncEngramClient, EngramClient, Retries
from engram.client.exchange import seconds_of
from engram.client.failures import failure_of
from engram.errors import (
    EngramError,
    NotFoundError,
    SaveQueueFullError,
    ServerUnreachableError,
    UpstreamError,
    walk_error_classes,
)

TREE = {"success": True, "conversation_id": "c", "branches": [], "turns": [], "after": None}
BUSY = SaveQueueFullError("too many").to_reply()


class Answers:
    """Gives these responses one after another, and counts."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self.responses = list(responses)
        self.waits: list[float] = []
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.responses.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> EngramClient:
        return EngramClient(
            "http://x", transport=httpx.MockTransport(self), sleep=self.waits.append, **options
        )

    def awaited(self, **options: Any) -> AsyncEngramClient:
        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        return AsyncEngramClient(
            "http://x", transport=httpx.MockTransport(self), sleep=sleep, **options
        )


def busy(**headers: str) -> httpx.Response:
    return httpx.Response(
        503, json=BUSY, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def ok() -> httpx.Response:
    return httpx.Response(200, json=TREE)


def always(value: float) -> Callable[[], float]:
    return lambda: value


def test_only_a_503_is_repeated_and_the_waits_double() -> None:
    answers = Answers(busy(), busy(), busy(), ok())
    client = answers.client(retries=Retries(count=3, first_s=0.5, random=always(1.0)))
    assert client.tree("c").conversation_id == "c"
    assert answers.waits == [0.5, 1.0, 2.0]


def test_the_waits_have_a_limit_and_a_random_half() -> None:
    retries = Retries(count=50, first_s=0.5, longest_s=8.0, random=always(0.0))
    waits = [retries.wait(attempt, None) for attempt in range(50)]
    assert [wait.seconds for wait in waits[:6] if wait] == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]
    assert waits[-1] is not None
    assert waits[-1].seconds == 4.0


def test_the_servers_own_wait_is_kept() -> None:
    answers = Answers(busy(retry_after="7"), busy(retry_after="0"), ok())
    answers.client().tree("c")
    assert answers.waits == [7.0, 0.0]


def test_a_server_that_asks_for_more_patience_than_there_is_is_not_asked_again() -> None:
    answers = Answers(busy(retry_after="61"))
    with pytest.raises(SaveQueueFullError):
        answers.client().tree("c")
    assert answers.waits == []


def test_after_the_last_retry_the_error_is_raised() -> None:
    answers = Answers(*[busy() for _ in range(3)])
    with pytest.raises(SaveQueueFullError) as caught:
        answers.client(retries=Retries(count=2)).tree("c")
    assert (caught.value.message, caught.value.details["status"]) == ("too many", 503)
    assert (len(answers.waits), len(answers.asked)) == (2, 3)


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429, 500, 502, 504, 507])
def test_nothing_else_is_repeated(status: int) -> None:
    answers = Answers(httpx.Response(status, json={"message": "no"}), ok())
    with pytest.raises(UpstreamError):
        answers.client().tree("c")
    assert len(answers.asked) == 1


@pytest.mark.parametrize("error", [httpx.ReadError("gone"), httpx.ReadTimeout("late")])
def test_a_lost_connection_is_not_repeated(error: Exception) -> None:
    answers = Answers(error, ok())
    with pytest.raises(ServerUnreachableError) as caught:
        answers.client().tree("c")
    assert caught.value.__cause__ is error
    assert len(answers.asked) == 1


def test_asyncio_repeats_the_same() -> None:
    answers = Answers(busy(), busy(retry_after="3"), ok())

    async def ask() -> None:
        async with answers.awaited(retries=Retries(random=always(1.0))) as client:
            await client.tree("c")

    asyncio.run(ask())
    assert answers.waits == [0.5, 3.0]


def test_the_key_is_sent_and_in_no_error() -> None:
    answers = Answers(httpx.Response(401, json={"error": "Unauthorized"}))
    with pytest.raises(UpstreamError) as caught:
        answers.client(api_key="sesame").tree("c")
    assert answers.asked[0].headers["authorization"] == "Bearer sesame"
    assert "key" in caught.value.hint
    assert "sesame" not in repr(caught.value) + str(caught.value.details)


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "9" * 5000, "²"])
def test_odd_waits_are_left_out_or_too_long(text: str) -> None:
    found = seconds_of(text)
    assert found in (None, float("inf"))


def test_a_date_to_come_back_at() -> None:
    found = seconds_of(formatdate(time.time() + 100, usegmt=True))
    assert found is not None
    assert 0 < found <= 100
    assert seconds_of("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0


OWN = [cls for cls in walk_error_classes() if cls.__module__ == "engram.errors"]


@pytest.mark.parametrize("cls", OWN)
def test_every_error_comes_back_as_what_it_was(cls: type[EngramError]) -> None:
    body = cls("what", hint="do", details={"n": 1}).to_reply()
    error = failure_of(cls.http_status, json.dumps(body).encode())
    assert issubclass(cls, type(error))
    assert error.code == cls.code
    assert (error.message, error.hint, error.details["n"]) == ("what", "do", 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object": "error", "message": "too long", "type": "BadRequestError"}', "too long"),
        (b'{"error": {"message": "bad", "code": 400}}', "bad"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": "from_the_future", "message": "new"}', "new"),
        (b"<html>proxy</html>", "the server answered with status 418"),
        (b"\xff\x00", "the server answered with status 418"),
        (b"[]", "the server answered with status 418"),
        (b"", "the server answered with status 418"),
    ],
)
def test_what_others_answer(body: bytes, message: str) -> None:
    error = failure_of(418, body)
    assert isinstance(error, UpstreamError)
    assert (error.message, error.details["status"]) == (message, 418)


def test_a_code_of_a_newer_server_is_kept() -> None:
    error = failure_of(409, b'{"error": "from_the_future", "message": "new"}')
    assert error.details["code"] == "from_the_future"


@given(st.binary(max_size=200), st.integers(400, 599))
def test_no_reply_is_too_strange_for_an_error(data: bytes, status: int) -> None:
    assert isinstance(failure_of(status, data), EngramError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
FIELDS = st.sampled_from(["error", "message", "hint", "details", "code", "detail"])


@given(st.dictionaries(FIELDS, JSON))
def test_no_json_is_too_strange_for_an_error(body: dict[str, Any]) -> None:
    assert isinstance(failure_of(500, json.dumps(body).encode()), EngramError)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"x"', b"{}", b'{"conversation_id": 5}', b"\xff", b'{"branches": null}']
)
def test_a_success_of_which_nothing_can_be_made(body: bytes) -> None:
    answers = Answers(httpx.Response(200, content=body))
    with pytest.raises(UpstreamError) as caught:
        answers.client().tree("c")
    assert "is not what was expected" in caught.value.message


def test_an_error_that_is_not_found_is_one() -> None:
    answers = Answers(httpx.Response(404, json=NotFoundError("no").to_reply()))
    with pytest.raises(NotFoundError):
        answers.client().tree("c")
