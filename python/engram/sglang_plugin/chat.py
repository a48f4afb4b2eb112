"""SGLang's chat completions on recorded tokens.

Upstream's serving of chats stays what it is: parameters, tools, reasoning, streaming, usage.  Its
one object is wrapped where it makes a prompt of messages: there, what is recorded of a conversation
takes the place of what would be tokenised again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final

from fastapi import Request, Response
from pydantic import ValidationError

from engram.conversation.text import extend, reuse
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_TENANT
from engram.core.tokens import TokenArray
from engram.core.waiting import within
from engram.errors import (
    DeadlineError,
    EngramError,
    GenerationAbortedError,
    InvalidRequestError,
    UnsupportedError,
    UpstreamError,
)
from engram.server.stateful import CURRENT_STATEFUL, Stateful
from engram.server.tagging import CURRENT_MARK, CURRENT_TAG, HELD, Marked
from engram.server.wire import error_response, invalid
from engram.service import SnapshotService
from engram.service.recorded import RecordedTurn, Start
from engram.service.restores import RESTORE_TIMEOUT_S
from engram.sglang_plugin.shared_prefix import shared_prefix
from engram.sglang_plugin.templates import SEND_ALL, ChatTemplate

logger = logging.getLogger(__name__)

PLAN: Final = "engram.plan"
"""Where in a request's scope its `_Plan` is."""
_PLAN: ContextVar[_Plan | None] = ContextVar("_PLAN", default=None)
"""The plan of the request whose prompt is made on this thread."""

WAITED: ContextVar[float] = ContextVar("WAITED", default=0.0)
"""For how many seconds the request of this context was held while its prompt was planned."""

NO_MESSAGE: Final = [{"role": "user", "content": ""}]
"""Stands where upstream asks for messages, and the tokens of the prompt are known already."""

READ_TIMEOUT_S: Final = RESTORE_TIMEOUT_S
"""How long a stateful request, which cannot go on without them, waits for recorded tokens.  As long
as it waits no other goes on with its branch, even if its client has left."""


@dataclass
class _Plan:
    """How the prompt of one request is made.

    `recorded` are the tokens that it begins with (stateful), or that its history may be (`stateful`
    is False).  With `loop`, where the service runs, it is to be found out which conversation the
    request belongs to.  The request was held for `waited` seconds meanwhile.  `error` is why the
    prompt could not be made.
    """

    tag: Tag | None
    recorded: TokenArray | None
    stateful: bool
    loop: asyncio.AbstractEventLoop | None = None
    waited: float = 0.0
    error: EngramError | None = None


class SglangChat:
    """Upstream's chat completions as the routes' engine (`engram.server.chat.ChatEngine`)."""

    def __init__(self) -> None:
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        self._request_class: Any = ChatCompletionRequest
        self.fields = frozenset(ChatCompletionRequest.model_fields)

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        """The reply to a chat."""
        from sglang.srt.utils.json_response import model_json_response

        try:
            asked = self._request_class.model_validate({"messages": NO_MESSAGE, **body})
        except ValidationError as error:
            raise invalid(error) from None
        chat = request.app.state.openai_serving_chat
        response: Response = model_json_response(await chat.handle_request(asked, request))
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            raise_refusal(response)
        return response


def raise_refusal(response: Response) -> None:
    """Raise what upstream says in a form of its own; Engram's own errors are left as they are."""
    try:
        told = json.loads(bytes(response.body))
    except ValueError:
        told = {"object": "error", "message": bytes(response.body)[:1000].decode(errors="replace")}
    if not isinstance(told, dict) or told.get("object") != "error":
        return
    message, status = f"SGLang: {told.get('message')}", response.status_code
    details = {"status": status}
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise InvalidRequestError(message, details=details)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        raise GenerationAbortedError(message, details=details)
    raise UpstreamError(message, hint="the server's log has more", details=details)


def watch_chats(chat: Any, service: SnapshotService) -> None:
    """Wrap SGLang's object that serves chats."""
    maker = PromptMaker(chat, service)
    chat.handle_request = maker.around_handle_request(chat.handle_request)
    chat._handle_streaming_request = maker.around_handle(chat._handle_streaming_request)
    chat._handle_non_streaming_request = maker.around_handle(chat._handle_non_streaming_request)
    chat._convert_to_internal_request = maker.around_convert(chat._convert_to_internal_request)
    chat._render_and_encode_chat_template = maker.around_encode(
        chat._render_and_encode_chat_template
    )


class PromptMaker:
    """Plans requests on the event loop, and makes their prompts on upstream's threads."""

    def __init__(self, chat: Any, service: SnapshotService) -> None:
        self._chat = chat
        self._template = ChatTemplate(chat)
        self._service = service
        self._recorded = service.recorded
        self._late: asyncio.Task[list[RecordedTurn]] | None = None

    def around_handle_request(self, original: Any) -> Any:
        """Plan a request before upstream looks at it; answer in its place if that fails."""

        async def handle_request(request: Any, raw_request: Any) -> Any:
            tag, asked = CURRENT_TAG.get(), CURRENT_STATEFUL.get()
            mark, held = CURRENT_MARK.get(), 0.0
            if mark is not None and asked is None and request.input_ids is None:
                held = await self._keep_mark(mark)
            plan = None
            if raw_request is not None and (tag is not None or self._may_link(request)):
                try:
                    if tag is None:
                        plan = _Plan(None, None, False, asyncio.get_running_loop(), held)
                    elif asked is None:
                        plan = await self._whole_history(tag, held)
                    else:
                        plan = await self._go_on(tag, asked, request, raw_request)
                        if mark is not None and plan.recorded is None:
                            # Nothing is before these messages: their prompt begins with them.
                            plan.waited = await self._keep_mark(mark)
                except EngramError as error:
                    return error_response(error)
                raw_request.scope[PLAN] = plan
            token = CURRENT_TAG.set(tag if plan is None else plan.tag)
            waited = WAITED.set(held if plan is None else plan.waited)
            try:
                response = await original(request, raw_request)
            finally:
                WAITED.reset(waited)
                CURRENT_TAG.reset(token)
            if plan is None or plan.error is None:
                return response
            return error_response(plan.error)

        return handle_request

    def around_handle(self, original: Any) -> Any:
        """Tag a request that has turned out to belong to a conversation."""

        async def handle(adapted_request: Any, request: Any, raw_request: Any) -> Any:
            plan = None if raw_request is None else raw_request.scope.get(PLAN)
            if plan is not None:
                # Undone where the request is planned.
                CURRENT_TAG.set(plan.tag)
                WAITED.set(plan.waited)
            return await original(adapted_request, request, raw_request)

        return handle

    def around_convert(self, original: Any) -> Any:
        """Have the plan at hand on the thread that makes the prompt."""

        def convert(request: Any, raw_request: Any = None) -> Any:
            plan = None if raw_request is None else raw_request.scope.get(PLAN)
            token = _PLAN.set(plan)
            try:
                return original(request, raw_request)
            finally:
                _PLAN.reset(token)

        return convert

    def around_encode(self, original: Any) -> Any:
        """The tokens of messages: recorded ones, and those of what is new."""

        def encode(messages: Any, **kw: Any) -> Any:
            plan = _PLAN.get()
            if plan is not None and plan.loop is not None:
                return self._link(plan, plan.loop, original, messages, kw)
            if plan is None or plan.recorded is None:
                return original(messages, **kw)
            if plan.stateful:
                if plan.error is not None:
                    # Upstream tries again with the tools in another form, for templates that want
                    # them so: what is refused stays refused.
                    raise ValueError(str(plan.error))
                try:
                    return self._template.append(plan.recorded, messages, kw), None
                except EngramError as error:
                    plan.error = error
                    # What upstream answers with 400; ours takes its place.
                    raise ValueError(str(error)) from error
            if self._template.plain() and not kw["use_cache"]:
                codec = self._template.codec(kw["encode_kwargs"])
                ids = reuse(plan.recorded, self._template.render(messages, kw), codec)
                if ids is not None:
                    return ids, None
            return original(messages, **kw)

        return encode

    async def _keep_mark(self, mark: Marked) -> float:
        """Have the state at a mark computed, and stored; if that fails, it costs the prefix alone.

        For how many seconds the store was waited for.  The computing is not in the time a request
        is held for: what is computed here it need not compute.
        """
        try:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(
                None, shared_prefix, self._chat, mark.messages, mark.tools
            )
            # Its own request is nobody's turn.
            token = CURRENT_TAG.set(None)
            try:
                return await self._service.prefixes.mark(DEFAULT_TENANT, ids, mark.seconds)
            finally:
                CURRENT_TAG.reset(token)
        except Exception as error:
            self._service.context.stats.note(f"prefix marked with cache_control: {error}")
            logger.warning("Engram: a prefix marked with cache_control is not kept: %s", error)
            return 0.0

    def _may_link(self, request: Any) -> bool:
        """Whether a chat that names no conversation may be a turn of one."""
        wanted = self._service.context.settings.snapshot_link_by_prefix
        return wanted and request.n == 1 and request.input_ids is None and self._template.plain()

    def _link(
        self,
        plan: _Plan,
        loop: asyncio.AbstractEventLoop,
        original: Any,
        messages: Any,
        kw: dict[str, Any],
    ) -> Any:
        """The tokens of a chat that names no conversation, and which one it goes on."""
        made = original(messages, **kw)
        try:
            plan.tag, ids = self._linked(plan, loop, made[0], messages, kw)
        except Exception as error:
            # It costs the link, never the request.
            self._service.context.stats.note(f"conversation of an untagged chat: {error}")
            logger.exception("Engram: an untagged chat is left untagged")
            return made
        return made if ids is None else (ids, None)

    def _linked(
        self,
        plan: _Plan,
        loop: asyncio.AbstractEventLoop,
        ids: list[int],
        messages: Any,
        kw: dict[str, Any],
    ) -> tuple[Tag, list[int] | None]:
        codec = self._template.codec(kw["encode_kwargs"])
        links = self._service.links
        roles = [message["role"] for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        opening = self._template.render(messages[:first], {**kw, "add_generation_prompt": True})
        if first == len(roles):
            return links.begin(DEFAULT_TENANT, opening), None
        rendered = self._template.render(messages, kw)
        begun = time.monotonic()
        asked = self._candidates(ids, opening, plan.waited)
        try:
            turns = asyncio.run_coroutine_threadsafe(asked, loop).result()
        finally:
            plan.waited += time.monotonic() - begun
        for turn in turns:
            found = extend(turn.tokens, rendered, codec)
            if found is not None:
                return turn.tag, found
        return links.begin(DEFAULT_TENANT, opening), None

    async def _candidates(self, ids: list[int], opening: str, waited: float) -> list[RecordedTurn]:
        """Turns that an untagged chat may go on from; `DeadlineError` if that takes too long.

        A thread waits for this that is one of the few on which SGLang makes all prompts.  While the
        store owes one chat its answer, no other waits for it.
        """
        if self._late is not None and not self._late.done():
            raise DeadlineError("the store has not answered an earlier chat yet")
        looking = self._service.context.start(
            self._service.links.candidates(DEFAULT_TENANT, ids, opening)
        )
        try:
            return await self._service.gate.in_time(asyncio.shield(looking), waited)
        except DeadlineError:
            self._late = looking
            raise

    async def _whole_history(self, tag: Tag, held: float) -> _Plan:
        """A client that sends everything: what of it is recorded is taken from there.

        It has been held for `held` seconds already.
        """
        begun = time.monotonic()
        try:
            turn = self._recorded.at_hand(tag)
            if turn is None:
                turn = await self._service.gate.in_time(self._recorded.find(tag), held)
        except EngramError as error:
            # It is a plain request: what is recorded only saves it from being tokenised again.
            self._service.context.stats.note(f"recorded tokens of {tag.conversation_id}: {error}")
            logger.warning(
                "Engram: the recorded tokens of %s cannot be used, its history is tokenised "
                "again: %s",
                tag.conversation_id,
                error,
            )
            turn = None
        recorded = None if turn is None else turn.tokens
        return _Plan(tag, recorded, stateful=False, waited=held + time.monotonic() - begun)

    async def _go_on(self, tag: Tag, asked: Stateful, request: Any, raw_request: Any) -> _Plan:
        """A client that sends what is new."""
        self._require_possible(request)
        branch = replace(tag, branch_name=asked.branch_name or tag.branch_name)
        self._recorded.hold(branch)
        raw_request.scope[HELD].callback(self._recorded.release, branch)
        try:
            start, ids = await within(READ_TIMEOUT_S, self._start(tag, branch, asked))
        except asyncio.TimeoutError:
            raise DeadlineError(
                f"what is recorded of conversation {tag.conversation_id!r} was not read in "
                f"{READ_TIMEOUT_S:g} s",
                hint="the store is blocked: look at the disk, then send the message again",
                details={"conversation_id": tag.conversation_id},
            ) from None
        if ids is not None:
            request.input_ids = ids
        recorded = None if start.source is None else start.source.tokens
        return _Plan(replace(start.tag, priority=tag.priority), recorded, stateful=True)

    async def _start(
        self, tag: Tag, branch: Tag, asked: Stateful
    ) -> tuple[Start, list[int] | None]:
        """What a stateful request goes on from, and its prompt where no message makes it."""
        if asked.kind == "regenerate":
            start, tokens = await self._recorded.again(branch)
            return start, tokens.tolist()
        if asked.kind == "continue":
            start = await self._recorded.further(branch)
            assert start.source is not None
            return start, self._template.open_end(start.source.tokens)
        start = await self._recorded.start(
            tag.tenant, tag.conversation_id, asked.branch_name, asked.source
        )
        return start, None

    def _require_possible(self, request: Any) -> None:
        if request.input_ids is not None:
            raise UnsupportedError(
                "input_ids cannot be sent with a stateful request: its tokens are recorded",
                details={"field": "input_ids"},
            )
        if not self._template.plain():
            raise UnsupportedError(
                "this model's prompts are not made by a chat template alone, so that a new "
                "message cannot be rendered without the ones before",
                hint=SEND_ALL,
                details={"field": "stateful"},
            )
