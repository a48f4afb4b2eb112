"""`/v1/responses` over a restart: replies that upstream keeps in a dict are kept on disk too.

With `--enable-response-store` a request may name an earlier reply with `previous_response_id`, and
fetch it by its id.  Here a reply is written before its client has all of it, and one that upstream
does not know (any more) is read back before upstream looks for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from engram.core.waiting import within
from engram.errors import EngramError
from engram.service.context import ServiceContext
from engram.snapshot.response import ResponseRecord

logger = logging.getLogger(__name__)

MAX_RESPONSES: Final = 10_000
MAX_BYTES: Final = 4 << 30
MAX_AGE_S: Final = 30 * 86_400.0
TRIM_EVERY: Final = 500
TRIM_EVERY_BYTES: Final = 64 << 20
TRIM_EVERY_S: Final = 3600.0
"""So many are written, or so much, or so much time passes between two looks at what there is."""
TIMEOUT_S: Final = 10.0
"""How long a request waits for the disk."""
UNREADABLE: Final = (EngramError, ValueError, RecursionError, asyncio.TimeoutError)
"""What reading or writing a record raises."""
ENDED: Final = frozenset({"completed", "incomplete", "failed"})


def watch_responses(serving: Any, context: ServiceContext, *, encrypted: bool) -> None:
    """Wrap SGLang's object that serves `/v1/responses`, which has its store switched on."""
    if encrypted:
        logger.warning(
            "Engram: --enable-response-store keeps replies in memory alone: with encryption at "
            "rest they are not written, as they would be in the clear"
        )
    elif serving.use_harmony:
        logger.warning(
            "Engram: --enable-response-store keeps replies in memory alone with this model's "
            "message format (harmony)"
        )
    else:
        kept = KeptResponses(serving, context)
        serving.create_responses = kept.around_create(serving.create_responses)
        serving.retrieve_responses = kept.around_look(serving.retrieve_responses)
        serving.cancel_responses = kept.around_look(serving.cancel_responses)
        serving.responses_full_generator = kept.around_reply(serving.responses_full_generator)
        serving._run_background_request = kept.around_background(serving._run_background_request)
        serving.responses_stream_generator_non_harmony = kept.around_stream(
            serving.responses_stream_generator_non_harmony
        )


class KeptResponses:
    """Between upstream's dicts and the store."""

    def __init__(self, serving: Any, context: ServiceContext) -> None:
        self._serving = serving
        self._context = context
        self._untrimmed = self._untrimmed_bytes = 0
        self._trim_at = 0.0
        """When a reply that is written has the old ones removed, on the monotonic clock."""
        self._writing: dict[str, asyncio.Task[None]] = {}
        """Id of each reply that is on its way to the disk -> what ends when it is there, or is not
        going to be."""

    def around_create(self, original: Any) -> Any:
        """Have the reply at hand that a request goes on from."""

        async def create_responses(request: Any, *args: Any, **kw: Any) -> Any:
            problem = await self._recall(request.previous_response_id)
            return problem or await original(request, *args, **kw)

        return create_responses

    def around_look(self, original: Any) -> Any:
        """Have the reply at hand that is asked for."""

        async def look(response_id: str) -> Any:
            problem = await self._recall(response_id)
            if problem is not None:
                return problem
            answer = await original(response_id)
            # Whoever is shown that a reply has ended finds it after a kill.
            if response_id in self._writing:
                await asyncio.wait({self._writing[response_id]})
            return answer

        return look

    def around_reply(self, original: Any) -> Any:
        """Keep a reply before it is sent, or, in the background, when it is there."""

        async def responses_full_generator(request: Any, *args: Any, **kw: Any) -> Any:
            before = self._ended(request.request_id)
            reply = await original(request, *args, **kw)
            await self._keep(request.request_id, before)
            return reply

        return responses_full_generator

    def around_background(self, original: Any) -> Any:
        """Keep what upstream makes of a reply in the background that could not be made."""

        async def _run_background_request(request: Any, *args: Any, **kw: Any) -> None:
            queued = self._serving.response_store.get(request.request_id)
            await original(request, *args, **kw)
            # Any other is another object, and was kept when it was there.
            if self._ended(request.request_id) is queued:
                await self._keep(request.request_id, None)

        return _run_background_request

    def around_stream(self, original: Any) -> Any:
        """Keep a reply before its last event is sent."""

        async def responses_stream_generator_non_harmony(
            request: Any, *args: Any, **kw: Any
        ) -> AsyncIterator[str]:
            before = self._ended(request.request_id)
            async with aclosing(original(request, *args, **kw)) as events:
                async for event in events:
                    before = await self._keep(request.request_id, before)
                    yield event

        return responses_stream_generator_non_harmony

    def _ended(self, response_id: str) -> Any:
        """The reply of that id, if there is one that has ended."""
        response = self._serving.response_store.get(response_id)
        return response if response is not None and response.status in ENDED else None

    async def _keep(self, response_id: str, before: Any) -> Any:
        """Write down the reply of that id if it is another than `before`; which it is now."""
        response = self._ended(response_id)
        if response is not before:
            messages = self._serving.msg_store[response_id]
            # A stop waits for it, and it does not end with a client that has gone.
            writing = self._context.start(self._write_down(response_id, response, messages))
            self._writing[response_id] = writing
            writing.add_done_callback(lambda task: self._written(response_id, task))
            await asyncio.shield(writing)
        return response

    def _written(self, response_id: str, task: asyncio.Task[None]) -> None:
        if self._writing.get(response_id) is task:
            del self._writing[response_id]

    async def _write_down(self, response_id: str, response: Any, messages: Any) -> None:
        try:
            record = ResponseRecord(
                response_id=response_id,
                # Not pydantic's own JSON: it writes no infinite logprobs, and reads less nesting
                # than it writes.
                response=json.dumps(response.model_dump(mode="json", exclude={"usage"})),
                # Upstream writes it in another shape than it reads.
                usage=json.dumps(None if response.usage is None else response.usage.model_dump()),
                messages=json.dumps(messages),
            )
            nbytes = await within(
                TIMEOUT_S, self._context.in_store(self._context.store.put_response, record)
            )
        except (*UNREADABLE, TypeError) as error:
            # The client has its reply, and this server goes on from it. The next one will not.
            problem = _problem(error)
            self._context.stats.note(f"response {response_id[:80]}: {problem}")
            logger.error("Engram: response %.80s was not kept: %s", response_id, problem)
        else:
            self._count(nbytes)

    def _count(self, nbytes: int) -> None:
        """A reply of so many bytes is written: have the old ones removed now and then."""
        self._untrimmed += 1
        self._untrimmed_bytes += nbytes
        if (
            self._untrimmed >= TRIM_EVERY
            or self._untrimmed_bytes >= TRIM_EVERY_BYTES
            or time.monotonic() >= self._trim_at
        ):
            self._untrimmed = self._untrimmed_bytes = 0
            self._trim_at = time.monotonic() + TRIM_EVERY_S
            # No reply waits for it: it may be thousands of files.
            self._context.start(self._trim())

    async def _trim(self) -> None:
        try:
            trim = self._context.store.trim_responses
            await self._context.in_store(trim, MAX_RESPONSES, MAX_BYTES, MAX_AGE_S)
        except EngramError as error:
            self._context.stats.note(f"old responses are still there: {error}")
            logger.error("Engram: old responses are still there: %s", error)

    async def _recall(self, response_id: str | None) -> Any:
        """Read a reply back that upstream does not know; the answer to the client if that fails."""
        serving = self._serving
        if response_id is None or response_id in serving.response_store:
            return None
        try:
            record = await within(
                TIMEOUT_S, self._context.in_store(self._context.store.get_response, response_id)
            )
            if record is None:
                return None
            response, messages = _read(record)
        except UNREADABLE as error:
            return serving.create_error_response(
                f"response {response_id!r} cannot be read: {_problem(error)}",
                err_type="server_error",
                status_code=503,
                param="response_id",
            )
        # Two may have read it at once: the first is in use.
        if response_id not in serving.response_store:
            serving.msg_store[response_id] = messages
            serving.response_store[response_id] = response
        return None


def _problem(error: Exception) -> str:
    """What an error says; that time is up has no words of its own."""
    return str(error) or f"the store did not answer in {TIMEOUT_S:g} s"


def _read(record: ResponseRecord) -> tuple[Any, Any]:
    """Upstream's objects.  Raises ValueError for what this SGLang does not take."""
    from sglang.srt.entrypoints.openai.protocol import ResponsesResponse, UsageInfo

    response = ResponsesResponse.model_validate(json.loads(record.response))
    usage = json.loads(record.usage)
    response.usage = None if usage is None else UsageInfo.model_validate(usage)
    return response, json.loads(record.messages)
