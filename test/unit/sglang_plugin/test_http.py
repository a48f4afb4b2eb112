"""The hooks of the HTTP process, around a tokenizer manager that serves by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.auth import AuthLevel

from engram.conversation.turns import Tag
from engram.errors import InvalidRequestError, StoreError
from engram.server.compatible import compatible_router
from engram.server.explaining import explaining_router
from engram.server.memory import memory_router
from engram.server.prefixes import Prompts, prefixes_router
from engram.server.resources import resources_router
from engram.server.snapshots import snapshots_router
from engram.server.tagging import CURRENT_TAG
from engram.service import SnapshotService
from engram.sglang_plugin import http as http_module
from engram.sglang_plugin.engine import SglangGenerator
from engram.sglang_plugin.http import (
    CHANGING_WEIGHTS,
    _marked,
    _save_before_the_end,
    _watch_requests,
    _watch_weights,
)
from engram.sglang_plugin.replicas import Replicas
from engram.sglang_plugin.shared_prefix import SglangPrompts
from engram.testing.samples import seeded_random
from unit.service.engine import Server, on_a_loop

OUTPUT = [7, 8, 9]
ADAPTER = "adapter"


class Manager:
    """The parts of SGLang's `TokenizerManager` that every request passes."""

    def __init__(self) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.ended: dict[str, asyncio.Event] = {}
        self.dispatched: list[Any] = []
        self.lora_ref_cache = {"one": SimpleNamespace(lora_id=ADAPTER)}

    async def generate_request(self, request: Any, *_: Any) -> AsyncIterator[dict[str, Any]]:
        if request.rid in self.rid_to_state:
            raise ValueError(f"Duplicate request ID detected: {request.rid}")
        self.rid_to_state[request.rid] = SimpleNamespace(output_ids=[], abort_sent=False)
        ended = self.ended[request.rid] = asyncio.Event()
        await self._send_one_request(tokenized(request))
        await ended.wait()
        yield {"meta_info": {"id": request.rid, "finish_reason": {"type": "length"}}}

    async def _send_one_request(self, tokenized: Any) -> None:
        self._dispatch_to_scheduler(tokenized)

    def _dispatch_to_scheduler(self, message: Any) -> None:
        self.dispatched.append(message)

    async def _send_batch_request(self, tokenized: list[Any]) -> None:
        pass

    async def _handle_batch_output(self, received: Any) -> None:
        for rid in received.rids:
            del self.rid_to_state[rid]
            self.ended[rid].set()

    async def finish(self, rid: str) -> None:
        await self._handle_batch_output(
            SimpleNamespace(rids=[rid], finished_reasons=[{"type": "length"}], output_ids=[OUTPUT])
        )


def tokenized(request: Any) -> TokenizedGenerateReqInput:
    return TokenizedGenerateReqInput(
        extra_key=getattr(request, "extra_key", None),
        rid=request.rid,
        input_text=None,
        input_ids=request.input_ids,
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        session_params=request.session_params,
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


@pytest.fixture
def manager(server: Server) -> Manager:
    manager = Manager()
    _watch_requests(manager, server.service, Replicas(1))
    return manager


def ask(
    manager: Manager,
    rid: str,
    tag: Tag | None,
    input_ids: list[int] | None = None,
    session_params: Any = None,
) -> asyncio.Task[list[Any]]:
    """A client's request, from its route on."""
    request = SimpleNamespace(
        rid=rid, input_ids=input_ids or [1, 2, 3], session_params=session_params
    )

    async def route() -> list[Any]:
        CURRENT_TAG.set(tag)
        return [response async for response in manager.generate_request(request)]

    return asyncio.get_running_loop().create_task(route())


async def sent(manager: Manager, rid: str) -> None:
    while all(message.rid != rid for message in manager.dispatched):
        await asyncio.sleep(0.001)


@on_a_loop
async def test_a_duplicate_that_is_refused_leaves_the_running_request_its_turn(
    server: Server, manager: Manager
) -> None:
    first = ask(manager, "r", Tag("c"))
    await sent(manager, "r")
    with pytest.raises(ValueError, match="Duplicate"):
        await ask(manager, "r", Tag("other"))
    await manager.finish("r")
    assert len(await first) == 1
    turn = server.service.context.tracker.find(Tag("c"))
    assert turn is not None
    assert turn.request.tokens.tolist() == [1, 2, 3, *OUTPUT]
    assert server.service.context.tracker.find(Tag("other")) is None


@on_a_loop
async def test_a_request_whose_client_has_gone_is_forgotten(
    server: Server, manager: Manager
) -> None:
    task = ask(manager, "r", Tag("c"))
    await sent(manager, "r")
    tracker = server.service.context.tracker
    assert "r" in tracker._running
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tracker._running


@on_a_loop
async def test_an_extra_key_that_reads_as_an_adapter_is_a_bad_request(manager: Manager) -> None:
    request = SimpleNamespace(
        rid="r", input_ids=[1, 2], session_params=None, extra_key=f"mine{ADAPTER}"
    )
    with pytest.raises(ValueError, match="LoRA adapter"):
        await manager._send_one_request(tokenized(request))
    assert not manager.dispatched


@on_a_loop
async def test_a_part_of_a_session_is_not_taken_for_a_prompt(
    server: Server, manager: Manager
) -> None:
    task = ask(manager, "r", None, session_params=SimpleNamespace(id="s"))
    await sent(manager, "r")
    await manager.finish("r")
    assert len(await task) == 1
    assert not server.service.context.tracker._untagged


@on_a_loop
async def test_an_abort_of_a_held_request_reaches_the_scheduler_after_it(
    server: Server, manager: Manager
) -> None:
    tokens = await server.chat("c")
    await server.service.save(tenant="", conversation_id="c")
    server.engine.promote_gate.shut()
    task = ask(manager, "held", None, input_ids=[*tokens, 1])
    await server.engine.promote_gate.reached.wait()
    manager.rid_to_state["held"].abort_sent = True  # the scheduler was told, and knew no such rid
    server.engine.promote_gate.open.set()
    while len(manager.dispatched) < 2:
        await asyncio.sleep(0.001)
    request, abort = manager.dispatched
    assert request.rid == "held"
    assert isinstance(abort, AbortReq)
    assert abort.rid == "held"
    await manager.finish("held")
    await task


@on_a_loop
async def test_a_request_nobody_aborted_is_sent_alone(manager: Manager) -> None:
    task = ask(manager, "r", None)
    await sent(manager, "r")
    assert [message.rid for message in manager.dispatched] == ["r"]
    assert not isinstance(manager.dispatched[0], AbortReq)
    await manager.finish("r")
    await task


LARGE = {"min_new_tokens": 2, "stop_token_ids": [100]}
NEGATIVE = {"min_new_tokens": 2, "stop_token_ids": [-1]}
"""SGLang looks such places up in a tensor of the vocabulary's length, and its scheduler ends."""


@pytest.mark.parametrize(
    "params",
    [{"temperature": "x"}, {"top_p": 7}, {"max_new_tokens": -1}, {"nonsense": 1}, LARGE, NEGATIVE],
    ids=str,
)
def test_parameters_that_sglang_cannot_take_are_named(params: dict[str, Any]) -> None:
    config = SimpleNamespace(vocab_size=100)
    generator = SglangGenerator(
        SimpleNamespace(model_config=config, sampling_params_class=SamplingParams)
    )
    with pytest.raises(InvalidRequestError) as caught:
        generator._check([1], params)
    assert str(caught.value.details["field"]).startswith("sampling_params")
    generator._check([1], {"temperature": 0.5, "max_new_tokens": 3, "stop_token_ids": [0, 99]})


@on_a_loop
async def test_token_ids_that_are_none_are_a_bad_request(manager: Manager) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        await ask(manager, "r", None, input_ids=[1, -1])


@on_a_loop
async def test_a_turn_that_cannot_be_counted_does_not_end_the_receive_loop(
    server: Server, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise StoreError("the catalog cannot be read")

    task = ask(manager, "r", Tag("c"))
    await sent(manager, "r")
    monkeypatch.setattr(server.service.context.tracker, "finish", broken)
    await manager.finish("r")
    assert len(await task) == 1, "the client has its reply"
    stats = server.service.context.stats
    assert stats.lost_turns == 1
    assert "the catalog cannot be read" in stats.last_failures[-1]


def test_every_route_can_be_given_its_level_of_authentication(server: Server) -> None:
    service = server.service
    routers = (
        compatible_router(service),
        snapshots_router(service),
        resources_router(service),
        prefixes_router(service, SglangPrompts()),
        memory_router(service),
    )
    for router in routers:
        for route in http_module._marked(router).routes:
            assert route.endpoint._auth_level is AuthLevel.ADMIN_OPTIONAL, route.path


class Ending:
    """How SGLang ends: the watchdog that SIGTERM wakes, and the app's lifespan that Ctrl-C ends."""

    def __init__(self) -> None:
        self.gracefully_exit = False
        self.rid_to_state: dict[str, Any] = {}
        self.server_status = "up"
        self.events: list[str] = []
        self.router = SimpleNamespace(lifespan_context=self._lifespan)

    async def sigterm_watchdog(self) -> None:
        self.events.append("schedulers ended")

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[str]:
        yield "state"
        self.events.append("lifespan over")

    def start(self) -> None:
        self.events.append("begun")

    async def close(self) -> None:
        self.events.append("saved")


@on_a_loop
async def test_saves_are_finished_before_sigterm_ends_the_schedulers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_module, "POLL_S", 0.001)
    ending = Ending()
    ending.rid_to_state["running"] = object()
    _save_before_the_end(ending, ending, cast(SnapshotService, ending))
    watchdog = asyncio.ensure_future(ending.sigterm_watchdog())
    ending.gracefully_exit = True
    await asyncio.sleep(0.02)
    assert ending.events == [], "a request still runs: its turn is to be saved too"
    ending.rid_to_state.clear()
    await watchdog
    assert ending.events == ["saved", "schedulers ended"]


@on_a_loop
async def test_saves_are_finished_before_the_lifespan_ends() -> None:
    ending = Ending()
    _save_before_the_end(ending, ending, cast(SnapshotService, ending))
    async with ending.router.lifespan_context(ending) as state:
        assert state == "state"
        assert ending.events == ["begun"]
    assert ending.events == ["begun", "saved", "lifespan over"]


@on_a_loop
async def test_saves_that_do_not_end_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "CLOSE_TIMEOUT_S", 0.01)
    ending = Ending()
    monkeypatch.setattr(ending, "close", asyncio.Event().wait)
    _save_before_the_end(ending, ending, cast(SnapshotService, ending))
    async with ending.router.lifespan_context(ending):
        pass
    assert ending.events == ["begun", "lifespan over"]


@pytest.mark.parametrize("fails", [False, True])
@on_a_loop
async def test_who_the_engine_is_is_asked_again_after_its_weights_changed(
    server: Server, fails: bool
) -> None:
    """Before the client hears of it, and also when the update failed: it may have got half-way."""

    class Weights:
        async def change(self, obj: Any, request: Any = None) -> str:
            server.engine.change_weights(obj)
            if fails:
                raise RuntimeError("half-way")
            return "changed"

    manager: Any = Weights()
    for name in CHANGING_WEIGHTS:
        setattr(manager, name, manager.change)
    _watch_weights(manager, server.service)
    for name in CHANGING_WEIGHTS:
        await server.service.context.engine()
        if fails:
            with pytest.raises(RuntimeError):
                await getattr(manager, name)(name)
        else:
            assert await getattr(manager, name)(name, request=None) == "changed"
        engine = await server.service.context.engine()
        assert engine.namespace.fields["model"] == name


def test_every_route_of_ours_can_be_marked_for_operators(server: Server) -> None:
    from sglang.srt.utils.auth import AuthLevel

    routers = (
        compatible_router(server.service),
        snapshots_router(server.service),
        resources_router(server.service),
        prefixes_router(server.service, cast(Prompts, None)),
        explaining_router(server.service),
        memory_router(server.service),
    )
    endpoints = [route.endpoint for router in routers for route in _marked(router).routes]
    assert len(endpoints) > 20
    assert {endpoint._auth_level for endpoint in endpoints} == {AuthLevel.ADMIN_OPTIONAL}
