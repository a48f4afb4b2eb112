"""Kept replies: upstream's types and dicts, a real store, and SGLang's generators in between."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ResponsesResponse, UsageInfo

from engram.errors import StoreError
from engram.sglang_plugin import responses as module
from engram.sglang_plugin.responses import watch_responses
from engram.store.layout import Layout
from engram.testing.faults import FaultyFileSystem
from engram.testing.samples import seeded_random
from unit.service.engine import Server, on_a_loop

MESSAGE: dict[str, Any] = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "z", "annotations": [], "logprobs": None}],
}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "weather",
    "arguments": '{"z": 1, "a": 2}',
    "status": "completed",
}
REASONING = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}


class Serving:
    """The parts of upstream's `OpenAIServingResponses` that a reply passes."""

    use_harmony = False

    def __init__(self, server: Server, *, encrypted: bool = False) -> None:
        self.response_store: dict[str, ResponsesResponse] = {}
        self.msg_store: dict[str, list[Any]] = {}
        watch_responses(self, server.service.context, encrypted=encrypted)

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        before = request.previous_response_id
        if before is not None and before not in self.response_store:
            return "not found"
        if request.stream:
            return self.responses_stream_generator_non_harmony(request)
        return await self.responses_full_generator(request)

    async def retrieve_responses(self, response_id: str) -> Any:
        return self.response_store.get(response_id, "not found")

    async def cancel_responses(self, response_id: str) -> Any:
        return self.response_store.get(response_id, "not found")

    async def responses_full_generator(self, request: Any) -> Any:
        return self._made(request)

    async def in_the_background(self, request: Any) -> None:
        """What `create_responses` does about a reply in the background, to its end."""
        self.response_store[request.request_id] = self._reply(request, "queued")
        self.msg_store[request.request_id] = [{"role": "user", "content": "a"}]
        await self._run_background_request(request)

    async def _run_background_request(self, request: Any) -> None:
        queued = self.response_store[request.request_id]
        queued.status = "in_progress"
        try:
            await self.responses_full_generator(request)
        except ZeroDivisionError:
            queued.status = "failed"
        if request.status == "cancelled":
            queued.status = "cancelled"

    async def responses_stream_generator_non_harmony(self, request: Any) -> AsyncIterator[str]:
        yield "created"
        self._made(request)
        yield "completed"

    def create_error_response(
        self, message: str, err_type: str = "", status_code: int = 400, param: Any = None
    ) -> Any:
        return SimpleNamespace(message=message, err_type=err_type, status_code=status_code)

    def _made(self, request: Any) -> Any:
        if request.status == "raised":
            raise ZeroDivisionError
        reply = self._reply(request, request.status)
        if request.store:
            self.response_store[request.request_id] = reply
            said = self.msg_store.get(request.previous_response_id, [])
            self.msg_store[request.request_id] = [*said, {"role": "user", "content": "\ud83d"}]
        return reply

    def _reply(self, request: Any, status: Any) -> ResponsesResponse:
        return ResponsesResponse(
            id=request.request_id,
            model="m",
            output=request.output,
            status=status,
            usage=UsageInfo(prompt_tokens=7, completion_tokens=3, total_tokens=10),
            metadata=request.metadata,
            temperature=0.25,
        )


def request(response_id: str, **fields: Any) -> Any:
    usual = {
        "previous_response_id": None,
        "stream": False,
        "store": True,
        "status": "completed",
        "metadata": {"z": "1", "a": "2"},
        "output": [REASONING, MESSAGE, CALL],
    }
    return SimpleNamespace(request_id=response_id, **{**usual, **fields})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path, seeded_random())
    yield server
    server.stop()


def again(server: Server) -> Serving:
    """What a server is that starts on the same directory; its own dicts are empty."""
    return Serving(server)


def shown(response: Any) -> Any:
    """As a client is shown it."""
    return json.loads(response.model_dump_json())


@on_a_loop
async def test_a_reply_is_as_it_was(server: Server) -> None:
    serving = Serving(server)
    first = await serving.create_responses(request("resp_1"))
    second = await serving.create_responses(
        request("resp_2", previous_response_id="resp_1", status="incomplete")
    )
    then = again(server)
    assert shown(await then.retrieve_responses("resp_2")) == shown(second)
    assert shown(await then.cancel_responses("resp_1")) == shown(first)
    assert then.msg_store == serving.msg_store
    assert [list(one) for one in then.msg_store["resp_2"]] == [["role", "content"]] * 2
    third = await again(server).create_responses(request("resp_3", previous_response_id="resp_2"))
    assert third.id == "resp_3"
    assert len(await _messages(server, "resp_3")) == 3


@on_a_loop
async def test_a_reply_with_what_pydantics_json_has_not_is_as_it_was(server: Server) -> None:
    metadata: dict[str, Any] = {}
    inner = metadata
    for _ in range(230):
        inner["a"] = inner = {}
    top = {"token": "b", "logprob": float("-inf"), "bytes": [98]}
    logprob = {"token": "z", "logprob": -0.5, "bytes": [122], "top_logprobs": [top]}
    message = {**MESSAGE, "content": [{**MESSAGE["content"][0], "logprobs": [logprob]}]}
    asked = request("resp_1", output=[message], metadata=metadata)
    reply = await Serving(server).create_responses(asked)
    then = await again(server).retrieve_responses("resp_1")
    assert then.model_dump(mode="json") == reply.model_dump(mode="json")
    assert then.output[0].content[0].logprobs[0].top_logprobs[0].logprob == float("-inf")


async def _messages(server: Server, response_id: str) -> list[Any]:
    serving = again(server)
    assert await serving.retrieve_responses(response_id) != "not found"
    return serving.msg_store[response_id]


@on_a_loop
async def test_a_stream_ends_when_its_reply_is_kept(server: Server) -> None:
    serving = Serving(server)
    seen = [
        (event, await again(server).retrieve_responses("resp_1") != "not found")
        async for event in await serving.create_responses(request("resp_1", stream=True))
    ]
    assert seen == [("created", False), ("completed", True)]


@pytest.mark.parametrize("status", ["completed", "failed", "raised", "cancelled"])
@on_a_loop
async def test_what_ends_in_the_background_is_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    written, write = [], server.store.put_response

    def put_response(record: Any) -> int:
        written.append(record.response_id)
        return write(record)

    monkeypatch.setattr(server.store, "put_response", put_response)
    serving = Serving(server)
    await serving.in_the_background(request("resp_1", status=status))
    reply, then = await serving.retrieve_responses("resp_1"), again(server)
    if status == "cancelled":
        assert written == []
        return
    assert written == ["resp_1"]
    assert shown(await then.retrieve_responses("resp_1")) == shown(reply)
    assert reply.status == ("failed" if status == "raised" else status)
    assert then.msg_store == serving.msg_store


@on_a_loop
async def test_an_abandoned_stream_ends_at_once(server: Server) -> None:
    serving = Serving(server)
    closed = []

    async def events(request: Any) -> AsyncIterator[str]:
        try:
            yield "created"
            yield "completed"
        finally:
            closed.append(request.request_id)

    stream = module.KeptResponses(serving, server.service.context).around_stream(events)
    running = stream(request("resp_1"))
    assert await anext(running) == "created"
    await running.aclose()
    assert closed == ["resp_1"]


@pytest.mark.parametrize(
    "fields", [{"store": False}, {"status": "cancelled"}, {"status": "in_progress"}], ids=str
)
@on_a_loop
async def test_what_is_not_to_be_kept_or_has_not_ended_is_not(
    server: Server, fields: dict[str, Any]
) -> None:
    await Serving(server).create_responses(request("resp_1", **fields))
    assert await again(server).retrieve_responses("resp_1") == "not found"
    assert not Layout(server.root).responses.exists()


@on_a_loop
async def test_an_id_that_is_used_again_is_the_newest_reply(server: Server) -> None:
    serving = Serving(server)
    await serving.create_responses(request("resp_1", status="failed"))
    await serving.create_responses(request("resp_1", store=False))
    assert (await again(server).retrieve_responses("resp_1")).status == "failed"
    await again(server).create_responses(request("resp_1"))
    assert (await again(server).retrieve_responses("resp_1")).status == "completed"


@on_a_loop
async def test_a_full_disk_takes_no_reply_away(tmp_path: Path) -> None:
    server = Server.start(tmp_path, seeded_random())
    serving = Serving(server)
    server.store._fs = FaultyFileSystem().fail("write", error=errno.ENOSPC)
    reply = await serving.create_responses(request("resp_1"))
    assert reply.id == "resp_1"
    (note,) = server.service.context.stats.last_failures
    assert note.startswith("response resp_1: ")
    assert "space" in note
    server.store._fs = FaultyFileSystem()
    assert await again(server).retrieve_responses("resp_1") == "not found"
    # The server that has it in memory goes on from it, and keeps what comes next.
    await serving.create_responses(request("resp_2", previous_response_id="resp_1"))
    assert len(await _messages(server, "resp_2")) == 2
    server.stop()


@on_a_loop
async def test_a_disk_that_hangs_holds_a_reply_so_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = asyncio.Event()

    async def hang(*_: Any) -> None:
        await over.wait()

    serving, context = Serving(server), server.service.context
    await serving.create_responses(request("resp_1"))
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(context, "in_store", hang)
    assert (await serving.create_responses(request("resp_2"))).id == "resp_2"
    assert context.stats.last_failures == ["response resp_2: the store did not answer in 0.05 s"]
    answer = await again(server).retrieve_responses("resp_1")
    assert (answer.status_code, answer.err_type) == (503, "server_error")
    assert "did not answer" in answer.message


def slow_writes(server: Server, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have the store write no response before the event is set."""
    over, write = threading.Event(), server.store.put_response

    def put_response(record: Any) -> int:
        assert over.wait(30)
        return write(record)

    monkeypatch.setattr(server.store, "put_response", put_response)
    return over


@on_a_loop
async def test_a_reply_is_shown_to_nobody_before_it_is_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, over = Serving(server), slow_writes(server, monkeypatch)
    making = asyncio.create_task(serving.create_responses(request("resp_1")))
    await asyncio.sleep(0)
    looks = [
        asyncio.create_task(look("resp_1"))
        for look in (serving.retrieve_responses, serving.cancel_responses)
    ]
    done, _ = await asyncio.wait({making, *looks}, timeout=0.1)
    assert not done
    over.set()
    assert [(await task).id for task in (making, *looks)] == ["resp_1"] * 3
    assert await again(server).retrieve_responses("resp_1") != "not found"
    await serving.retrieve_responses("resp_1")


@on_a_loop
async def test_a_stop_waits_for_a_reply_whose_client_has_gone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, over = Serving(server), slow_writes(server, monkeypatch)
    making = asyncio.create_task(serving.create_responses(request("resp_1")))
    await asyncio.sleep(0)
    making.cancel()
    await asyncio.wait({making})
    closing = asyncio.create_task(server.service.close())
    done, _ = await asyncio.wait({closing}, timeout=0.1)
    assert not done
    over.set()
    await closing
    assert server.store.get_response("resp_1") is not None


@on_a_loop
async def test_what_cannot_be_read_is_said(server: Server) -> None:
    await Serving(server).create_responses(request("resp_1"))
    (path,) = Layout(server.root).responses.rglob("*.json")
    server.store._fs = FaultyFileSystem().fail("read_into")
    answer = await again(server).create_responses(request("resp_2", previous_response_id="resp_1"))
    assert answer.status_code == 503
    assert str(path) in answer.message
    server.store._fs = FaultyFileSystem()
    path.write_bytes(path.read_bytes()[:-1])
    assert await again(server).retrieve_responses("resp_1") == "not found"
    assert server.store.health().quarantined == 1


@on_a_loop
async def test_another_sglangs_reply_is_refused(server: Server) -> None:
    serving = Serving(server)
    await serving.create_responses(request("resp_1"))
    record = server.store.get_response("resp_1")
    assert record is not None
    server.store.put_response(record.model_copy(update={"response": '{"id": 1}'}))
    assert (await again(server).retrieve_responses("resp_1")).status_code == 503


@pytest.mark.parametrize("harmony", [False, True])
@on_a_loop
async def test_what_is_not_written_is_told_at_launch(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, harmony: bool
) -> None:
    monkeypatch.setattr(Serving, "use_harmony", harmony)
    serving = Serving(server, encrypted=not harmony)
    assert "keeps replies in memory alone" in caplog.text
    await serving.create_responses(request("resp_1"))
    assert not Layout(server.root).responses.exists()


@pytest.mark.parametrize("every", ["TRIM_EVERY", "TRIM_EVERY_BYTES", "TRIM_EVERY_S"])
@on_a_loop
async def test_the_oldest_go(server: Server, monkeypatch: pytest.MonkeyPatch, every: str) -> None:
    monkeypatch.setattr(module, "MAX_RESPONSES", 5)
    monkeypatch.setattr(
        module, every, {"TRIM_EVERY": 3, "TRIM_EVERY_BYTES": 3000, "TRIM_EVERY_S": 0.0}[every]
    )
    serving = Serving(server)
    for number in range(20):
        await serving.create_responses(request(f"resp_{number}"))
        await server.service.context.drain()
        assert len(list(Layout(server.root).responses.rglob("*.json"))) <= 8
    assert await again(server).retrieve_responses("resp_0") == "not found"
    assert await again(server).retrieve_responses("resp_19") != "not found"


@on_a_loop
async def test_no_reply_waits_until_the_oldest_are_gone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, problem = threading.Event(), StoreError("cannot list responses")

    def trim_responses(*_: Any) -> int:
        assert over.wait(30)
        raise problem

    monkeypatch.setattr(server.store, "trim_responses", trim_responses)
    context = server.service.context
    reply = await asyncio.wait_for(Serving(server).create_responses(request("resp_1")), 10)
    assert reply.id == "resp_1"
    assert context.stats.last_failures == []
    over.set()
    await context.drain()
    assert context.stats.last_failures == [f"old responses are still there: {problem}"]
    assert await again(server).retrieve_responses("resp_1") != "not found"
