"""Replies as SGLang writes them: whole, and as a stream cut at any place."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.client import AsyncEngramClient, EngramClient
from engram.client.chat import Assembly, Reply
from engram.errors import (
    GenerationAbortedError,
    InvalidRequestError,
    ServerUnreachableError,
    UpstreamError,
)

USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 3,
    "total_tokens": 23,
    "prompt_tokens_details": {"cached_tokens": 15},
}
WHOLE = {
    "id": "r1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "index": 0,
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"a": 1}'},
                    }
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"id": "r1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def events(*chunks: dict[str, Any], done: bool = True) -> bytes:
    # As SGLang writes them: characters as they are, no escapes.
    lines = [f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


TEXTS = ["Grü", "ß\u2028 a\x85b\u2029c\x0bd", "\r\n", "end 🐎"]
CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    *[chunk({"content": text}) for text in TEXTS],
    chunk({}, "stop"),
    {"id": "r1", "choices": [], "usage": USAGE},
]


class Parts(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, *parts: bytes | Exception) -> None:
        self.parts = parts
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Answer:
    """Gives one response and keeps what was sent."""

    def __init__(self, *parts: bytes | Exception, status: int = 200) -> None:
        self.stream = Parts(*parts)
        self.status = status
        self.path = ""
        self.body: dict[str, Any] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.path, self.body = request.url.path, json.loads(request.content)
        return httpx.Response(self.status, stream=self.stream)

    def client(self) -> EngramClient:
        return EngramClient("http://x", transport=httpx.MockTransport(self))


def test_a_whole_reply() -> None:
    answer = Answer(json.dumps(WHOLE).encode())
    chat = answer.client().conversation("c")
    reply = chat.send("hello", max_tokens=5, temperature=None, tools=[{"type": "function"}])
    assert answer.path == "/v1/conversations/c/chat"
    assert answer.body == {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "tools": [{"type": "function"}],
    }
    assert (reply.id, reply.content, reply.reasoning) == ("r1", "", "hm")
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.tool_calls
    assert (call.id, call.function.name) == ("call_1", "add")
    assert json.loads(call.function.arguments) == {"a": 1}
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens) == (20, 15)
    assert reply.raw == WHOLE


def test_messages_of_other_roles() -> None:
    result = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    for message, sent in (
        (result, [result]),
        (
            [result, {"role": "user", "content": "so?"}],
            [result, {"role": "user", "content": "so?"}],
        ),
    ):
        answer = Answer(json.dumps(WHOLE).encode())
        answer.client().conversation("c").send(message)
        assert answer.body["messages"] == sent


def test_a_branch_and_a_turn_to_go_on_from() -> None:
    answer = Answer(json.dumps(WHOLE).encode())
    chat = answer.client().conversation("c", "other")
    chat.send("hello", from_turn=3)
    assert answer.body == {
        "messages": [{"role": "user", "content": "hello"}],
        "branch_name": "other",
        "continue_from": {"branch_name": "other", "turn_number": 3},
    }


@pytest.mark.parametrize(("method", "path"), [("regenerate", "regenerate"), ("extend", "continue")])
def test_the_last_reply_once_more_or_further(method: str, path: str) -> None:
    answer = Answer(json.dumps(WHOLE).encode())
    chat = answer.client().conversation("c")
    assert getattr(chat, method)(max_tokens=5).id == "r1"
    assert (answer.path, answer.body) == (f"/v1/conversations/c/{path}", {"max_tokens": 5})


@pytest.mark.parametrize(
    ("method", "path"), [("stream_regenerate", "regenerate"), ("stream_extend", "continue")]
)
def test_once_more_or_further_as_a_stream(method: str, path: str) -> None:
    answer = Answer(events(*CHUNKS))
    with getattr(answer.client().conversation("c"), method)(max_tokens=5) as stream:
        assert list(stream) == TEXTS
    assert answer.path == f"/v1/conversations/c/{path}"
    assert answer.body == {
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    async def awaited() -> str:
        again = Answer(events(*CHUNKS))
        transport = httpx.MockTransport(again)
        async with AsyncEngramClient("http://x", transport=transport) as client:
            stream = await getattr(client.conversation("c"), method)()
            assert again.path == answer.path
            return str((await stream.reply()).content)

    assert asyncio.run(awaited()) == "".join(TEXTS)


@pytest.mark.parametrize("name", ["messages", "stream", "branch_name", "continue_from"])
def test_what_is_no_option(name: str) -> None:
    answer = Answer()
    with pytest.raises(InvalidRequestError) as caught:
        answer.client().conversation("c").send("hello", **{name: 1})
    assert caught.value.details["field"] == name


def test_a_stream() -> None:
    answer = Answer(events(*CHUNKS))
    with answer.client().conversation("c").stream("hello", max_tokens=5) as stream:
        assert list(stream) == TEXTS
        reply = stream.reply
    assert answer.body["stream"] is True
    assert answer.body["stream_options"] == {"include_usage": True}
    assert (reply.id, reply.content, reply.finish_reason) == ("r1", "".join(TEXTS), "stop")
    assert reply.usage is not None
    assert reply.usage.cached_tokens == 15
    assert answer.stream.closed


def test_the_reply_alone_reads_the_stream() -> None:
    answer = Answer(events(*CHUNKS))
    assert answer.client().conversation("c").stream("hello").reply.content == "".join(TEXTS)


@given(st.data())
def test_a_stream_may_be_cut_anywhere(data: st.DataObject) -> None:
    body = events(*CHUNKS)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=20)))
    places = [0, *cuts, len(body)]
    assembly = Assembly()
    texts = [
        text for start, end in itertools.pairwise(places) for text in assembly.feed(body[start:end])
    ]
    assert texts == TEXTS
    assert assembly.finish().content == "".join(TEXTS)


def test_tool_calls_come_in_pieces() -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **fields}]})

    body = events(
        call(0, id="a", function={"name": "add", "arguments": ""}),
        call(0, function={"arguments": '{"x"'}),
        call(1, id="b", function={"name": "mul", "arguments": "{}"}),
        call(0, function={"arguments": ": 1}"}),
        chunk({"reasoning_content": "so "}),
        chunk({"reasoning_content": "be it"}, "tool_calls"),
    )
    reply = Answer(body).client().conversation("c").stream("hello").reply
    assert [(one.id, one.function.name, one.function.arguments) for one in reply.tool_calls] == [
        ("a", "add", '{"x": 1}'),
        ("b", "mul", "{}"),
    ]
    assert (reply.reasoning, reply.finish_reason) == ("so be it", "tool_calls")


def test_a_stream_that_breaks_off_is_no_reply() -> None:
    answer = Answer(events(*CHUNKS[:3], done=False))
    stream = answer.client().conversation("c").stream("hello")
    with pytest.raises(ServerUnreachableError) as caught:
        list(stream)
    assert caught.value.details["content"] == "".join(TEXTS[:2])
    with pytest.raises(ServerUnreachableError):
        _ = stream.reply


def test_a_connection_lost_in_the_middle() -> None:
    answer = Answer(events(*CHUNKS[:3], done=False), httpx.ReadError("gone"))
    with pytest.raises(ServerUnreachableError):
        _ = answer.client().conversation("c").stream("hello").reply
    assert answer.stream.closed


def test_a_stream_that_is_closed_early() -> None:
    answer = Answer(*[events(one, done=False) for one in CHUNKS])
    stream = answer.client().conversation("c").stream("hello")
    assert next(iter(stream)) == TEXTS[0]
    stream.close()
    assert answer.stream.closed
    with pytest.raises(ServerUnreachableError):
        list(stream)
    with pytest.raises(ServerUnreachableError):
        _ = stream.reply


def test_errors_in_the_middle_of_a_stream() -> None:
    ours = GenerationAbortedError("out of memory", hint="retry").to_reply()
    with pytest.raises(GenerationAbortedError):
        _ = Answer(events(CHUNKS[0], ours)).client().conversation("c").stream("x").reply
    theirs = {"error": {"message": "aborted", "code": 400, "type": "BadRequest"}}
    with pytest.raises(UpstreamError) as caught:
        _ = Answer(events(CHUNKS[0], theirs)).client().conversation("c").stream("x").reply
    assert (caught.value.message, caught.value.details["status"]) == ("aborted", 400)


def test_an_error_instead_of_a_stream() -> None:
    answer = Answer(json.dumps({"message": "no such model"}).encode(), status=400)
    with pytest.raises(UpstreamError, match="no such model"):
        answer.client().conversation("c").stream("hello")
    assert answer.stream.closed


@pytest.mark.parametrize(
    "data",
    [b"data: {\n\n", b"data: []\n\n", b'data: {"choices": 5}\n\n', b'data: {"choices": [5]}\n\n',
     b'data: {"choices": [], "usage": {"prompt_tokens": "x"}}\n\n', b"data: \xff\n\n"],
)  # fmt: skip
def test_events_of_which_nothing_can_be_made(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        list(Assembly().feed(data))


@pytest.mark.parametrize("body", [b"{}", b'{"choices": []}', b'{"choices": [{}], "id": 1}', b"x"])
def test_replies_of_which_nothing_can_be_made(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        Answer(body).client().conversation("c").send("hello")


def test_the_same_for_asyncio() -> None:
    async def talk(*parts: bytes | Exception) -> tuple[list[str], Reply, Answer]:
        answer = Answer(*parts)
        async with AsyncEngramClient("http://x", transport=httpx.MockTransport(answer)) as client:
            async with await client.conversation("c").stream("hello") as stream:
                texts = [text async for text in stream]
                reply = await stream.reply()
            return texts, reply, answer

    texts, reply, answer = asyncio.run(talk(events(*CHUNKS)))
    assert (texts, reply.content, answer.stream.closed) == (TEXTS, "".join(TEXTS), True)
    with pytest.raises(ServerUnreachableError):
        asyncio.run(talk(events(*CHUNKS[:3], done=False)))
    with pytest.raises(ServerUnreachableError):
        asyncio.run(talk(httpx.ReadError("gone")))
