"""Tagging: which conversation a request is in, and that its body passes as it came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from starlette._utils import get_route_path

from engram.conversation.turns import Tag
from engram.errors import EngramError, InvalidIdError, UnsupportedError
from engram.server.tagging import (
    CURRENT_TAG,
    GENERATION_ROUTES,
    TaggingMiddleware,
    route_of,
    tag_of,
)
from engram.testing.samples import seeded_random
from unit.service.engine import on_a_loop

HEADER = "x-override-conversation-id"


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


class App:
    """An inner application that reads its whole body and answers."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.tags: list[Tag | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.tags.append(CURRENT_TAG.get())
        while True:
            message = await receive()
            self.messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def ask(
    app: Any,
    messages: Sequence[dict[str, Any]],
    *,
    path: str = "/generate",
    headers: Sequence[tuple[bytes, bytes]] = (),
    **more: Any,
) -> list[dict[str, Any]]:
    waiting = list(messages)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers), "method": "POST", **more}
    await TaggingMiddleware(app)(scope, receive, send)
    return sent


def whole(data: bytes) -> list[dict[str, Any]]:
    return [{"type": "http.request", "body": data, "more_body": False}]


def pieces(data: bytes, rng: Random) -> list[dict[str, Any]]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(5))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    return messages


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.mark.parametrize("path", sorted(GENERATION_ROUTES))
@on_a_loop
async def test_a_tag_reaches_the_inner_application_and_ends_there(path: str) -> None:
    app = App()
    data = body(text="hello", conversation_id="c")
    sent = await ask(app, whole(data), path=path)
    assert app.tags == [Tag("c")]
    assert app.body == data
    assert sent[-1]["body"] == b"done"
    assert CURRENT_TAG.get() is None


@on_a_loop
async def test_the_body_wins_over_the_header() -> None:
    headers = [(HEADER.encode(), b"from-header")]
    app = App()
    await ask(app, whole(body(conversation_id="from-body")), headers=headers)
    await ask(app, whole(body(text="hello")), headers=headers)
    await ask(app, whole(body(conversation_id=None)), headers=headers)
    await ask(app, whole(body(text="hello")))
    assert app.tags == [Tag("from-body"), Tag("from-header"), Tag("from-header"), None]


@on_a_loop
async def test_other_routes_are_left_alone(rng: Random) -> None:
    app = App()
    data = body(conversation_id="../not-ours")
    messages = pieces(data, rng)
    await ask(app, messages, path="/v1/embeddings", headers=[(HEADER.encode(), b"c")])
    assert app.messages == messages, "piece by piece, as they came"
    assert app.tags == [None]


@on_a_loop
async def test_a_body_in_pieces_is_replayed_byte_for_byte(rng: Random) -> None:
    for _ in range(20):
        noise = "".join(chr(rng.randrange(32, 0xD800)) for _ in range(rng.randrange(200)))
        data = json.dumps({"text": noise, "conversation_id": "c"}, ensure_ascii=False).encode()
        app = App()
        await ask(app, pieces(data, rng))
        assert app.body == data
        assert app.tags == [Tag("c")]


@pytest.mark.parametrize("data", [b"", b"no json", b'{"conversation_id": "c"', b"\xff", b"[1]"])
@on_a_loop
async def test_what_sglang_will_refuse_is_passed_on(data: bytes) -> None:
    app = App()
    await ask(app, whole(data), headers=[(HEADER.encode(), b"c")])
    assert app.body == data
    assert app.tags == [None]


@on_a_loop
async def test_after_the_body_comes_what_the_client_sends_next() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            seen.append((await receive())["type"])  # noqa: PERF401  the replay is being watched

    await ask(app, whole(body(conversation_id="c")))
    assert seen == ["http.request", "http.disconnect"], "a stream sees its client go"


@on_a_loop
async def test_a_client_that_goes_while_sending_is_seen_to_go() -> None:
    app = App()
    half = {"type": "http.request", "body": b'{"conversation_id"', "more_body": True}
    await ask(app, [half, {"type": "http.disconnect"}])
    assert [message["type"] for message in app.messages] == ["http.disconnect"]
    assert app.tags == [None]


@on_a_loop
async def test_a_refusal_is_a_reply_and_the_inner_application_is_not_asked() -> None:
    app = App()
    sent = await ask(app, whole(body(text="a", conversation_id="../etc")))
    assert app.tags == []
    assert sent[0]["status"] == 422
    answer = json.loads(sent[1]["body"])
    assert (answer["success"], answer["error"]["code"]) == (False, "invalid_request")
    assert answer["error"]["details"] == {"field": "conversation_id"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"sampling_params": {"n": 3}}, "n"),
    ({"sampling_params": [{"n": 2}]}, "n"),
    ({"sampling_params": {"beam_width": 2}}, "sampling_params.beam_width"),
    ({"text": ["a", "b"]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [[1, 2], [3]]}, "prompt"),
    ({"input_ids": [[1, 2], [3]]}, "prompt"),
    ({"sampling_params": [{}, {}]}, "prompt"),
    ({"image_data": "x"}, "conversation_id"),
    ({"video_data": ["x"]}, "conversation_id"),
    ({"audio_data": ["x"]}, "conversation_id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "conversation_id",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "input_audio"}]}]},
        "conversation_id",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "conversation_id",
    ),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=str)
def test_what_a_conversation_cannot_hold_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        tag_of(body(conversation_id="c", **fields), None)
    assert caught.value.http_status == 422
    assert caught.value.details == {"field": field}
    with pytest.raises(UnsupportedError):
        tag_of(body(**fields), b"c")
    assert tag_of(body(**fields), None) is None, "untagged it is none of our business"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"n": None},
        {"sampling_params": {"n": 1, "beam_width": 1}},
        {"text": "a"},
        {"text": ["a"]},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2, 3]]},
        {"input_ids": [1, 2, 3]},
        {"input_ids": [[1, 2, 3]]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"input": "a"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]},
        {"image_data": None},
    ],
    ids=str,
)
def test_one_prompt_of_text_is_fine(fields: dict[str, Any]) -> None:
    assert tag_of(body(conversation_id="c", **fields), None) == Tag("c")


@pytest.mark.parametrize("value", ["", ".a", "a/b", "a" * 256, 5, 1.5, True, ["c"], {"a": 1}])
def test_a_bad_id_is_refused(value: Any) -> None:
    with pytest.raises(InvalidIdError) as caught:
        tag_of(body(conversation_id=value), None)
    assert caught.value.details == {"field": "conversation_id"}


def test_a_bad_header_is_refused() -> None:
    for value in (b"", b"a b", b"\xff", b"x" * 300):
        with pytest.raises(EngramError):
            tag_of(body(text="a"), value)


# ---- bodies that SGLang refuses, and prompts that are elsewhere ----


@pytest.mark.parametrize(
    "broken",
    [
        b'{"conversation_id": "c", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"conversation_id": "c", "text": "\xff"}',
        b'{"conversation_id": "c"',
        b'["conversation_id"]',
    ],
    ids=["too deep", "not UTF-8", "cut short", "not an object"],
)
@on_a_loop
async def test_a_body_that_cannot_be_read_is_left_to_sglang(broken: bytes) -> None:
    app = App()
    sent = await ask(app, [{"type": "http.request", "body": broken}])
    assert sent[0]["status"] == 200, "the inner application answers"
    assert app.body == broken
    assert app.tags == [None]


def test_a_session_of_sglang_cannot_be_tagged() -> None:
    """Its earlier turns are in the scheduler: what the request holds is not the prompt."""
    with pytest.raises(UnsupportedError) as caught:
        tag_of(body(conversation_id="c", input_ids=[1], session_params={"id": "s"}), None)
    assert caught.value.details == {"field": "session_params"}
    with pytest.raises(UnsupportedError):
        tag_of(body(input_ids=[1], session_params={"id": "s"}), b"c")
    assert tag_of(body(conversation_id="c", input_ids=[1], session_params=None), None) == Tag("c")


@pytest.mark.parametrize(
    ("root", "path", "route"),
    [
        ("", "/generate", "/generate"),
        ("/api", "/api/generate", "/generate"),  # as uvicorn says it
        ("/api", "/generate", "/generate"),
        ("/api/", "/api//generate", "/generate"),
        ("/gen", "/generate", "/generate"),
    ],
)
def test_a_route_is_known_behind_a_root_path(root: str, path: str, route: str) -> None:
    assert route_of({"path": path, "root_path": root}) == route
    assert get_route_path({"path": path, "root_path": root}) == route, "as the routes see it"


@on_a_loop
async def test_a_request_behind_a_root_path_is_tagged() -> None:
    app = App()
    await ask(app, whole(body(conversation_id="c")), path="/api/generate", root_path="/api")
    assert app.tags == [Tag("c")]


@on_a_loop
async def test_a_refusal_can_name_what_has_no_utf8() -> None:
    asked = body(conversation_id="c", stateful=True, continue_from={"\ud800": 1})
    start, reply = await ask(App(), whole(asked), path="/v1/chat/completions")
    assert start["status"] == 422
    assert json.loads(reply["body"])["error"]["details"] == {"field": "continue_from.\ud800"}


@pytest.mark.parametrize(
    "body", [b'{"conversation_id": "c", "x": NaN}', b'{"conversation_id": "c", "x": "\\ud800"}']
)
def test_what_only_pythons_reader_takes_for_json_is_tagged_too(body: bytes) -> None:
    """SGLang reads it with that: the turn would be served, and silently not be counted."""
    tag = tag_of(body, None)
    assert tag is not None
    assert tag.conversation_id == "c"
