"""Bodies as the routes read them: bounded before they are read, strict when they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from engram.errors import BodyTooLargeError, InvalidRequestError
from engram.server.wire import bounded, parse_json
from unit.service.engine import on_a_loop


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\xff", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": [-Infinity]}', "-Infinity is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' is there twice"),
        (b'{"x": {"a": 1, "a": 1}}', "'a' is there twice"),
        (b'{"' + b"a" * 5000 + b'": 1, "' + b"a" * 5000 + b'": 1}', "is there twice"),
        (b"9" * 5000, "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (rb'"\ud800"', "not JSON"),
        (rb'{"\udfff": 1}', "not JSON"),
    ],
)
def test_what_is_no_strict_json(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_json(body)
    assert said in caught.value.message
    assert len(caught.value.message) < 500
    caught.value.message.encode()


def test_what_is() -> None:
    body = rb'{"a": [1, -2.5, 1e300, null, true], "b": "\ud83d\ude00 \u00e4", "": {}}'
    assert parse_json(body) == {"a": [1, -2.5, 1e300, None, True], "b": "😀 ä", "": {}}


class Sent:
    """A body in parts, of which it is known how many were asked for."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts
        self.read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            self.read += 1
            yield part


@on_a_loop
async def test_a_body_within_the_bound() -> None:
    for announced in (None, "6", "0", "not a number", "²"):
        assert await bounded(Sent(b"abc", b"", b"def"), announced, 6) == b"abcdef"


@pytest.mark.parametrize("announced", ["7", "9" * 18, "9" * 19, "9" * 10_000])
def test_what_is_announced_as_too_large_is_not_read(announced: str) -> None:
    @on_a_loop
    async def read() -> None:
        sent = Sent(b"abc")
        with pytest.raises(BodyTooLargeError) as caught:
            await bounded(sent, announced, 6)
        assert sent.read == 0
        assert caught.value.details == {"limit": 6}

    read()


@on_a_loop
async def test_what_turns_out_too_large_is_read_no_further() -> None:
    sent = Sent(b"abc", b"defg", b"h", b"i")
    with pytest.raises(BodyTooLargeError):
        await bounded(sent, "3", 6)
    assert sent.read == 2
