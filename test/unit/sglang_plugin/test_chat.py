"""Prompts of chats: SGLang's object that serves them, wrapped, with a real tokenizer in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import Response
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

from engram.conversation.turns import RunningRequest, Tag
from engram.core.tokens import to_tokens
from engram.errors import (
    EngramError,
    GenerationAbortedError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedError,
    UpstreamError,
)
from engram.server.stateful import CURRENT_STATEFUL, Stateful
from engram.server.tagging import CURRENT_MARK, CURRENT_TAG, HELD, Marked
from engram.server.wire import error_response
from engram.service.recorded import Place
from engram.sglang_plugin import chat as chat_module
from engram.sglang_plugin.chat import PLAN, raise_refusal, watch_chats
from engram.sglang_plugin.shared_prefix import shared_prefix
from engram.testing.samples import seeded_random
from engram.testing.tiny_tokenizer import build_tokenizer
from unit.service.engine import Server, on_a_loop

TOKENIZER = build_tokenizer(4096)
END = TOKENIZER.eos_token_id
TOOLS_IN_FRONT = (
    "{% if tools %}{{ '<|system|>' ~ tools | tojson }}{% endif %}" + TOKENIZER.chat_template
)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


class Chat:
    """The parts of upstream's `OpenAIServingChat` that a prompt passes; it replies with `reply`."""

    chat_encoding_spec = None
    _prompt_text_round_trip_is_lossy = False

    def __init__(self, server: Server, template: str | None = None) -> None:
        self.server = server
        self.tokenizer = build_tokenizer(4096)
        self.tokenizer.chat_template = template or TOKENIZER.chat_template
        self.template_manager = SimpleNamespace(chat_template_name=None, python_chat_template=None)
        self.tokenizer_manager = SimpleNamespace(
            tokenizer=self.tokenizer,
            model_config=SimpleNamespace(is_multimodal=False, hf_eos_token_id={END}),
        )
        self.prompts: list[list[int]] = []
        self.tags: list[Tag | None] = []
        self.reply: list[int] = [*ids("fine"), END]
        watch_chats(self, server.service)

    async def handle_request(self, request: Any, raw_request: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            adapted = await loop.run_in_executor(
                None, lambda: self._convert_to_internal_request(request, raw_request)
            )
        except ValueError as error:
            return SimpleNamespace(status_code=400, body=str(error))
        return await self._handle_non_streaming_request(adapted, request, raw_request)

    def _convert_to_internal_request(self, request: Any, raw_request: Any = None) -> Any:
        if request.input_ids is not None:
            return request.input_ids
        return self._render_and_encode_chat_template(
            request.messages,
            tools=request.tools,
            template_kwargs={},
            encode_kwargs={"add_special_tokens": False},
            use_cache=False,
        )[0]

    def _process_messages(self, request: Any, is_multimodal: bool) -> Any:
        said = [message.model_dump(exclude_none=True) for message in request.messages]
        ids, _ = self._render_and_encode_chat_template(
            said, tools=None, encode_kwargs={"add_special_tokens": False}
        )
        return SimpleNamespace(prompt_ids=ids)

    def _render_and_encode_chat_template(self, messages: Any, **kw: Any) -> tuple[list[int], None]:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, tools=kw["tools"]
        )
        return self.tokenizer.encode(text, **kw["encode_kwargs"]), None

    async def _handle_streaming_request(self, *_: Any) -> Any:
        raise AssertionError("not here")

    async def _handle_non_streaming_request(
        self, adapted_request: list[int], request: Any, raw_request: Any
    ) -> Any:
        self.prompts.append(adapted_request)
        self.tags.append(CURRENT_TAG.get())
        rid = f"chat-{len(self.prompts)}"
        tag = CURRENT_TAG.get()
        gate = self.server.service.gate
        await gate.admit(RunningRequest(rid, to_tokens(adapted_request), tag))
        self.server.engine.computed([*adapted_request, *self.reply])
        gate.finished(rid, self.reply)
        return SimpleNamespace(status_code=200, body=self.tokenizer.decode(self.reply))

    async def ask(
        self,
        messages: list[dict[str, Any]],
        tag: Tag | None = None,
        stateful: Stateful | None = None,
        **fields: Any,
    ) -> Any:
        """One request, as the routes and middlewares hand it over."""
        request = SimpleNamespace(
            messages=messages, **{"input_ids": None, "tools": None, "n": 1, **fields}
        )
        with ExitStack() as held:
            raw = SimpleNamespace(scope={HELD: held})

            async def route() -> Any:
                CURRENT_TAG.set(tag)
                CURRENT_STATEFUL.set(stateful)
                response = await self.handle_request(request, raw)
                assert CURRENT_TAG.get() == tag
                return response

            response = await asyncio.get_running_loop().create_task(route())
            self.plan = raw.scope.get(PLAN)
            return response


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


@pytest.fixture
def linking(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random(), snapshot_link_by_prefix=True)
    yield server
    server.stop()


@on_a_loop
async def test_only_the_new_message_is_rendered(server: Server) -> None:
    chat, tag = Chat(server), Tag("c")
    await chat.ask(said("one"), tag, Stateful())
    first = [*ids("<|user|>one<|assistant|>"), *chat.reply]
    assert chat.prompts == [first[: -len(chat.reply)]]
    chat.reply = ids("cut off")  # by its length
    await chat.ask(said("two"), tag, Stateful())
    second = [*first, *ids("<|user|>two<|assistant|>"), *chat.reply]
    assert chat.prompts[1] == second[: -len(chat.reply)]
    await chat.ask(said("three"), tag, Stateful())
    assert chat.prompts[2] == [*second, END, *ids("<|user|>three<|assistant|>")]
    assert server.service.context.tracker.newest(tag) == 3


@on_a_loop
async def test_regenerate_and_continue(server: Server) -> None:
    chat, tag = Chat(server), Tag("c")
    await chat.ask(said("one"), tag, Stateful())
    prompt, reply = chat.prompts[0], chat.reply
    await chat.ask([], tag, Stateful("regenerate"))
    assert chat.prompts[1] == prompt
    chat.reply = ids(" and more")
    await chat.ask([], tag, Stateful("continue"))
    assert chat.prompts[2] == [*prompt, *reply[:-1]]
    await chat.ask([], tag, Stateful("continue"))
    assert chat.prompts[3] == [*prompt, *reply[:-1], *chat.reply]
    assert server.service.context.tracker.newest(tag) == 4


@on_a_loop
async def test_branches_begin_at_the_turn_named(server: Server) -> None:
    chat, tag = Chat(server), Tag("c")
    for text in ("one", "two"):
        await chat.ask(said(text), tag, Stateful())
    place = Place("c", turn_number=1)
    await chat.ask(said("else"), tag, Stateful("chat", "side", place))
    await chat.ask(said("else"), Tag("d"), Stateful("chat", None, place))
    wanted = [*chat.prompts[0], *chat.reply, *ids("<|user|>else<|assistant|>")]
    assert chat.prompts[2:] == [wanted, wanted]
    tags = [found for found in chat.tags[2:] if found is not None]
    assert [(found.conversation_id, found.branch_name) for found in tags] == [
        ("c", "side"),
        ("d", "main"),
    ]
    tracker = server.service.context.tracker
    assert [tracker.newest(found) for found in (Tag("c"), *tags)] == [2, 2, 2]


@on_a_loop
async def test_a_branch_is_held_until_its_reply_is_over(server: Server) -> None:
    chat, tag = Chat(server), Tag("c")
    server.service.recorded.hold(tag)
    refused = await chat.ask(said("one"), tag, Stateful())
    assert refused.status_code == 409
    assert b"conversation_busy" in refused.body
    other = await chat.ask(said("one"), tag, Stateful("chat", "other"))
    assert other.status_code == 200
    server.service.recorded.release(tag)
    for text in ("one", "two"):
        assert (await chat.ask(said(text), tag, Stateful())).status_code == 200


@on_a_loop
async def test_tools_that_the_prompt_would_lack_are_refused(server: Server) -> None:
    chat, tag = Chat(server, TOOLS_IN_FRONT), Tag("c")
    tools = [{"type": "function", "function": {"name": "look"}}]
    others = [{"type": "function", "function": {"name": "touch"}}]
    await chat.ask(said("one"), tag, Stateful(), tools=tools)
    assert '"look"' in TOKENIZER.decode(chat.prompts[0])
    assert (await chat.ask(said("two"), tag, Stateful(), tools=tools)).status_code == 200
    assert (await chat.ask(said("two"), tag, Stateful())).status_code == 200
    refused = await chat.ask(said("two"), tag, Stateful(), tools=others)
    assert refused.status_code == 422
    assert b'"field":"tools"' in refused.body
    assert server.service.context.tracker.newest(tag) == 3


@pytest.mark.parametrize("role", ["system", "developer"])
@on_a_loop
async def test_instructions_that_the_prompt_would_lack_are_refused(
    server: Server, role: str
) -> None:
    """Some templates put every system message in front, others leave the later ones out."""
    rule = {"role": role, "content": "be brief"}
    front = (
        "{% for m in messages if m.role not in ('user', 'assistant') %}<|system|>{{ m.content }}"
        "{% endfor %}"
    )
    others = (
        "{% for m in messages if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}<|assistant|>"
    )
    for number, template in enumerate((front + others, others)):
        chat, tag = Chat(server, template), Tag(f"c{number}")
        # The first messages are rendered as a whole.
        assert (await chat.ask([rule, *said("one")], tag, Stateful())).status_code == 200
        for messages in ([rule, *said("two")], [*said("two"), rule]):
            refused = await chat.ask(messages, tag, Stateful())
            assert refused.status_code == 422
            assert b'"field":"messages"' in refused.body
        assert (await chat.ask(said("two"), tag, Stateful())).status_code == 200
        assert len(chat.prompts) == 2
    chat, tag = Chat(server), Tag("stated")
    await chat.ask(said("one"), tag, Stateful())
    asked = [{"role": "system", "content": "be brief"}, *said("two")]
    assert (await chat.ask(asked, tag, Stateful())).status_code == 200
    assert "be brief" in TOKENIZER.decode(chat.prompts[1])


@on_a_loop
async def test_what_is_refused_is_not_served_with_the_tools_in_another_form(server: Server) -> None:
    """Upstream tries again with flat tools where a template fails; this one leaves those out."""
    whole = "{% for t in tools or [] if t.type == 'function' %}{{ t | tojson }}{% endfor %}"
    chat, tag = Chat(server, whole + TOKENIZER.chat_template), Tag("c")
    tools = [{"type": "function", "function": {"name": "look"}}]
    encode = chat._render_and_encode_chat_template

    def twice(messages: Any, **kw: Any) -> Any:
        try:
            return encode(messages, **kw)
        except ValueError:
            flat = [tool["function"] for tool in kw["tools"]]
            return encode(messages, **{**kw, "tools": flat})

    chat._render_and_encode_chat_template = twice  # type: ignore[method-assign]
    await chat.ask(said("one"), tag, Stateful())
    refused = await chat.ask(said("two"), tag, Stateful(), tools=tools)
    assert refused.status_code == 422
    assert b'"field":"tools"' in refused.body
    assert len(chat.prompts) == 1, "nothing was generated for it"
    assert server.service.context.tracker.newest(tag) == 1


@pytest.mark.parametrize("what", ["encoder", "template", "input_ids", "looks back"])
@on_a_loop
async def test_what_cannot_be_rendered_in_part_is_refused(server: Server, what: str) -> None:
    back = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}"
    chat, tag = Chat(server, back if what == "looks back" else None), Tag("c")
    if what == "encoder":
        chat.chat_encoding_spec = "dsv4"  # type: ignore[assignment]
    if what == "template":
        chat.template_manager.chat_template_name = "vicuna"
    if what == "looks back":
        await chat.ask(said("one"), tag)
    fields = {"input_ids": [1]} if what == "input_ids" else {}
    refused = await chat.ask(said("two"), tag, Stateful(), **fields)
    assert refused.status_code == 422
    assert b"unsupported" in refused.body
    server.service.recorded.hold(tag)  # it is held no longer


@on_a_loop
async def test_a_whole_history_keeps_what_is_recorded(server: Server) -> None:
    chat, tag = Chat(server), Tag("c")
    await chat.ask(said("one"), tag)
    [special] = ids("<|tool|>")
    chat.reply = [*ids("a"), special, *ids("b")]
    await chat.ask(said("one", "fine", "two"), tag)
    # The client never saw the special token: from there on it is another text.
    await chat.ask(said("one", "fine", "two", "ab", "three"), tag)
    stock = ids("<|user|>one<|assistant|>fine<|endoftext|><|user|>two<|assistant|>ab<|endoftext|>")
    assert chat.prompts[2] == [*stock, *ids("<|user|>three<|assistant|>")]


@on_a_loop
async def test_an_untagged_chat_is_the_next_turn_of_what_it_extends(linking: Server) -> None:
    chat = Chat(linking)
    await chat.ask(said("one"))
    await chat.ask(said("one", "fine", "two"))
    first, second = chat.tags
    assert first is not None
    assert first == second
    assert first.conversation_id.startswith("linked-")
    tracker = linking.service.context.tracker
    await chat.ask(said("one", "fine", "two", "fine", "three"))
    assert chat.tags[-1] == first
    assert tracker.newest(first) == 3
    for other in (
        said("one", "fine", "two"),  # an older turn once more
        said("one", "FINE", "two", "fine", "x"),
        said("another"),
        said("one"),
    ):
        await chat.ask(other)
        made = chat.tags[-1]
        assert made is not None
        assert made.conversation_id != first.conversation_id, other
    assert tracker.newest(first) == 3


@on_a_loop
async def test_after_a_restart_a_chat_finds_its_conversation_again(linking: Server) -> None:
    chat = Chat(linking)
    await chat.ask(said("one"))
    await chat.ask(said("mine"), Tag("named"))
    linked = chat.tags[0]
    assert linked is not None
    for name in (linked.conversation_id, "named"):
        await linking.service.save(tenant="", conversation_id=name)
    again = linking.restart()
    try:
        chat = Chat(again)
        await chat.ask(said("one", "fine", "two"))
        await chat.ask(said("mine", "fine", "two"))
        assert chat.tags == [linked, Tag("named")]
        assert again.service.context.tracker.newest(linked) == 2
    finally:
        again.stop()


@on_a_loop
async def test_a_mark_counts_where_a_conversation_begins(server: Server) -> None:
    chat, tag, context = Chat(server), Tag("c"), server.service.context
    seen: list[Tag | None] = []
    generate = server.engine.generate

    async def noting(*args: Any, **kw: Any) -> Any:
        seen.append(CURRENT_TAG.get())
        return await generate(*args, **kw)

    server.engine.generate = noting  # type: ignore[method-assign]
    document = [{"role": "system", "content": "a document"}]

    async def marked(messages: list[dict[str, Any]], *args: Any) -> list[str]:
        token = CURRENT_MARK.set(Marked(messages[:1], None, 300.0))
        try:
            assert (await chat.ask(messages, *args)).status_code == 200
        finally:
            CURRENT_MARK.reset(token)
        await context.drain()
        return [one.name for one in (await server.service.prefixes.list("", 9, None))[0]]

    [name] = await marked([*document, *said("one")], tag, Stateful())
    assert name.startswith("marked.")
    assert server.engine.generated[0]["input_ids"] == ids("<|system|>a document")
    assert seen == [None], "its own request is nobody's turn"
    # What is said later stands on what is recorded.
    assert await marked(said("two"), tag, Stateful()) == [name]
    # A chat of nobody's, one that sends its history, and another conversation begin with the same.
    assert await marked([*document, *said("one")]) == [name]
    assert await marked([*document, *said("one")], Tag("d")) == [name]
    assert await marked([*document, *said("three")], Tag("e"), Stateful()) == [name]
    assert len(seen) == 1
    assert context.stats.last_failures == []


def test_a_prefix_is_text(server: Server) -> None:
    """What a template leaves out would be no part of the prefix, and nobody would be told."""
    chat = Chat(server)
    for part in ({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}):
        messages = [{"role": "user", "content": [part]}]
        if part["type"] == "text":
            assert shared_prefix(chat, messages, None)
            continue
        with pytest.raises(UnsupportedError) as refused:
            shared_prefix(chat, messages, None)
        assert refused.value.details == {"field": "messages"}


@contextmanager
def blocked_catalog(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within, whoever asks the catalog for a branch waits; the names of those who have asked."""
    let_go, asked = threading.Event(), []
    with monkeypatch.context() as patch, ExitStack() as stack:
        for name in ("find", "branches_of_many"):
            ask = getattr(server.catalog, name)

            def waits(*args: Any, ask: Any = ask, name: str = name, **kw: Any) -> Any:
                asked.append(name)
                let_go.wait(30)
                return ask(*args, **kw)

            patch.setattr(server.catalog, name, waits)
        stack.callback(let_go.set)
        yield asked


@pytest.mark.parametrize("timeout", [0.0, 10.0])
@on_a_loop
async def test_a_conversation_that_goes_on_asks_no_store(
    server: Server, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    server = server.restart(snapshot_promote_timeout=timeout)
    chat, tag = Chat(server), Tag("c")
    no_utf8 = TOKENIZER.convert_tokens_to_ids("<0xFF>")
    text = TOKENIZER.decode([no_utf8])
    assert ids(text) != [no_utf8]
    chat.reply = [no_utf8, END]
    await chat.ask(said("one"), tag, Stateful())
    with blocked_catalog(server, monkeypatch) as asked:
        await chat.ask(said("one", text, "two"), tag)
        await chat.ask(said("three"), tag, Stateful())
        assert asked == []
    first = [*chat.prompts[0], *chat.reply]
    assert chat.prompts[1][: len(first)] == first, "not tokenised again"
    second = [*chat.prompts[1], *chat.reply]
    assert chat.prompts[2][: len(second)] == second
    server.stop()


@on_a_loop
async def test_a_stateful_chat_does_not_wait_for_ever_for_its_tokens(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, tag = Chat(server), Tag("c")
    await chat.ask(said("one"), tag, Stateful())
    await server.service.save(tenant="", conversation_id="c")
    server = server.restart()
    chat = Chat(server)
    with blocked_catalog(server, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(chat_module, "READ_TIMEOUT_S", 0.2)
        for kind in ("chat", "continue", "regenerate"):
            # Each finds the branch free again.
            refused = await chat.ask(said("two"), tag, Stateful(kind))  # type: ignore[arg-type]
            assert refused.status_code == 504
            assert b'"code":"deadline"' in refused.body
    await server.service.context.drain()
    assert (await chat.ask(said("two"), tag, Stateful())).status_code == 200
    assert server.service.context.tracker.newest(tag) == 2
    server.stop()


@on_a_loop
async def test_one_untagged_chat_at_a_time_waits_for_a_store_that_is_blocked(
    linking: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    linking = linking.restart(snapshot_promote_timeout=0.2)
    chat = Chat(linking)
    await chat.ask(said("one"))
    first = chat.tags[0]
    with blocked_catalog(linking, monkeypatch) as asked:
        for count in (1, 2):
            response = await chat.ask(said("one", "fine", "two"))
            assert (response.status_code, asked.count("branches_of_many")) == (200, 1)
            assert (
                "conversation of an untagged chat"
                in linking.service.context.stats.last_failures[-1]
            )
            linking.service.context.stats.last_failures.clear()
            assert len(chat.prompts) == 1 + count
    await linking.service.context.drain()
    await chat.ask(said("one", "fine", "three"))
    assert chat.tags == [first, None, None, first]
    linking.stop()


@on_a_loop
async def test_without_the_flag_an_untagged_chat_stays_untagged(server: Server) -> None:
    chat = Chat(server)
    await chat.ask(said("one"))
    await chat.ask(said("one", "fine", "two"))
    assert chat.tags == [None, None]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (422, InvalidRequestError),
        (500, UpstreamError),
        (503, GenerationAbortedError),
    ],
)
def test_what_sglang_refuses_is_an_error_of_the_tree(status: int, kind: type[EngramError]) -> None:
    theirs = OpenAIServingBase.create_error_response(cast(Any, None), "too long", "x", status)
    with pytest.raises(kind, match="too long") as caught:
        raise_refusal(theirs)
    assert caught.value.details == {"status": status}
    with pytest.raises(kind, match="a proxy"):
        raise_refusal(Response("<html>a proxy", status))
    raise_refusal(error_response(NotFoundError("ours stays as it is")))
