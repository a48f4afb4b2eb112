"""The HTTP process: opens the store, mounts the routes, and watches requests pass.

Nothing here is active unless persistence is on: SGLang's objects are wrapped where they are made,
not where their classes are defined.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from engram.catalog.catalog import Catalog
from engram.conversation.turns import RunningRequest
from engram.core.settings import Settings
from engram.core.tokens import to_tokens
from engram.errors import EngramError, InvalidRequestError
from engram.server.chat import chat_router
from engram.server.compatible import compatible_router
from engram.server.explaining import explaining_router
from engram.server.memory import memory_router
from engram.server.prefixes import prefixes_router
from engram.server.refusing import RefusingMiddleware
from engram.server.resources import resources_router
from engram.server.snapshots import snapshots_router
from engram.server.tagging import CURRENT_TAG, HoldingMiddleware, TaggingMiddleware
from engram.server.tool_calls import ToolCallMiddleware
from engram.service import SnapshotService
from engram.sglang_plugin.adapters import seed_of, served_by
from engram.sglang_plugin.args import open_store, settings_of
from engram.sglang_plugin.chat import WAITED, SglangChat, watch_chats
from engram.sglang_plugin.control import RankClient
from engram.sglang_plugin.engine import SglangGenerator, SglangRanks
from engram.sglang_plugin.messages import EngramReply
from engram.sglang_plugin.replicas import Replicas
from engram.sglang_plugin.responses import watch_responses
from engram.sglang_plugin.shared_prefix import SglangPrompts
from engram.store.disk import DiskStore

logger = logging.getLogger(__name__)

POLL_S: Final = 0.2
CLOSE_TIMEOUT_S: Final = 30.0


@dataclass
class _Opened:
    settings: Settings
    store: DiskStore
    catalog: Catalog

    def close(self) -> None:
        """Close both; the store is free for another server."""
        self.catalog.close()
        self.store.close()


_opened: _Opened | None = None
_ADMITTED: ContextVar[list[RunningRequest]] = ContextVar("_ADMITTED")
"""What the call of `generate_request` that runs in this context has sent to the scheduler."""


def open_for(server_args: Any, settings: Settings) -> _Opened:
    """Open store and catalog of a server whose persistence is on.  Raises an `EngramError`."""
    store = open_store(server_args, lock=True)
    try:
        with store.reserve_at_hand():
            catalog = Catalog.open(store.catalog_path, store)
    except BaseException:
        store.close()
        raise
    _report(store, catalog)
    return _Opened(settings, store, catalog)


def around_launch_server(
    original: Callable[..., Any], server_args: Any, *args: Any, **kw: Any
) -> Any:
    """Open the store before anything heavy starts, so that a store in use is a quick answer."""
    global _opened
    settings = settings_of(server_args)
    if settings is None:
        return original(server_args, *args, **kw)
    try:
        if settings.enable_agent_tools and settings.agent_tools_module is not None:
            from engram.agents.host import check_tools_module

            check_tools_module(settings.agent_tools_module)
        _opened = open_for(server_args, settings)
    except EngramError as error:
        raise SystemExit(f"engram: error: {error}") from None
    try:
        return original(server_args, *args, **kw)
    finally:
        _opened.close()
        _opened = None


def before_setup_and_run_http_server(
    server_args: Any, tokenizer_manager: Any, template_manager: Any, *args: Any, **kw: Any
) -> None:
    """Build the service around the tokenizer manager and mount it on SGLang's app."""
    if _opened is None:
        return
    from sglang.srt.entrypoints.http_server import app

    service = service_around(tokenizer_manager, _opened, server_args)
    mount(app, service)
    _watch_chats(app, service, _opened.store)
    _save_before_the_end(app, tokenizer_manager, service)
    if _opened.settings.enable_agent_tools:
        from engram.sglang_plugin.agents import mount_agents

        mount_agents(
            app, _opened.settings, service, tokenizer_manager, template_manager, server_args
        )


def service_around(tokenizer_manager: Any, opened: _Opened, server_args: Any) -> SnapshotService:
    """A service that sees every request of a tokenizer manager pass."""
    from sglang.utils import TypeBasedDispatcher

    replicas = Replicas(server_args.dp_size)
    client = RankClient(tokenizer_manager, server_args.tp_size, replicas.count)
    tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(EngramReply, client.on_reply)])
    service = SnapshotService(
        opened.settings,
        opened.store,
        opened.catalog,
        SglangRanks(client, replicas),
        SglangGenerator(tokenizer_manager),
    )
    _watch_requests(tokenizer_manager, service, replicas)
    _watch_weights(tokenizer_manager, service)
    return service


def mount(app: Any, service: SnapshotService) -> None:
    """Put the routes, and what tags requests, on an application."""
    settings = service.context.settings
    for router in (
        compatible_router(service),
        snapshots_router(service),
        resources_router(service),
        prefixes_router(service, SglangPrompts()),
        explaining_router(service),
        memory_router(service),
    ):
        app.include_router(_marked(router))
    # Generation: for whoever may use /v1/chat/completions.
    app.include_router(chat_router(SglangChat()))
    if settings.snapshot_trigger_policy == "on_tool_call":
        app.add_middleware(
            ToolCallMiddleware,
            tool_called=service.gate.tool_called,
            untagged=settings.snapshot_link_by_prefix,
        )
    app.add_middleware(TaggingMiddleware)
    app.add_middleware(RefusingMiddleware)
    app.add_middleware(HoldingMiddleware)


def _watch_chats(app: Any, service: SnapshotService, store: DiskStore) -> None:
    """Wrap SGLang's objects that serve chats, which are made when the app starts."""
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with serve(running) as state:
            watch_chats(app.state.openai_serving_chat, service)
            # Upstream goes without where it cannot make it.
            responses = getattr(app.state, "openai_serving_responses", None)
            if responses is not None and responses.enable_response_store:
                watch_responses(responses, service.context, encrypted=store.encrypted)
            yield state

    app.router.lifespan_context = lifespan


def _report(store: DiskStore, catalog: Catalog) -> None:
    healed = catalog.report
    snapshots, conversations = catalog.totals()
    logger.info(
        "Engram: snapshot store %s: %d snapshots of %d conversations",
        store.root,
        snapshots,
        conversations,
    )
    if store.marker_rebuilt:
        logger.warning("Engram: the marker of the snapshot store was damaged or lost; rebuilt")
    if healed.rebuilt_because and snapshots:
        logger.warning("Engram: the catalog was rebuilt: %s", healed.rebuilt_because)
    for damage in healed.damaged:
        logger.warning("Engram: manifest %s is damaged: %s", damage.name, damage.reason)


def _marked(router: Any) -> Any:
    """Give the routes SGLang's own level of authentication for what operators do."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    for route in router.routes:
        # SGLang writes the level on the endpoint, which cannot be done to a method, but is found
        # through it.
        endpoint = getattr(route.endpoint, "__func__", route.endpoint)
        auth_level(AuthLevel.ADMIN_OPTIONAL)(endpoint)
    return router


def _save_before_the_end(app: Any, manager: Any, service: SnapshotService) -> None:
    """Begin the work in the background with the server, and finish the saves before its end.

    They need ranks that still answer.
    On SIGTERM upstream waits for the running requests and then ends the schedulers, in one
    coroutine; ours runs before it.  On Ctrl-C only the web server is told: it ends the app's
    lifespan while the schedulers still run.
    """
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    shut_down, serve = manager.sigterm_watchdog, app.router.lifespan_context

    async def finish() -> None:
        try:
            await asyncio.wait_for(service.close(), CLOSE_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.error("Engram: saves still running after %g s are given up", CLOSE_TIMEOUT_S)

    async def sigterm_watchdog() -> None:
        while not manager.gracefully_exit:
            await asyncio.sleep(POLL_S)
        while manager.rid_to_state and manager.server_status != ServerStatus.UnHealthy:
            await asyncio.sleep(POLL_S)
        await finish()
        await shut_down()

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with serve(running) as state:
            service.start()
            try:
                yield state
            finally:
                await finish()

    manager.sigterm_watchdog = sigterm_watchdog
    app.router.lifespan_context = lifespan


def _watch_requests(manager: Any, service: SnapshotService, replicas: Replicas) -> None:
    """Wrap the three places of the tokenizer manager that every request passes."""
    send_one, send_batch = manager._send_one_request, manager._send_batch_request
    handle_batch, generate = manager._handle_batch_output, manager.generate_request
    gate, adapters = service.gate, served_by(manager)

    async def send_one_request(tokenized: Any) -> None:
        await _admit(service, tokenized, adapters, replicas)
        await send_one(tokenized)
        _abort_again(manager, tokenized.rid)

    async def send_batch_request(tokenized: list[Any]) -> None:
        await asyncio.gather(*(_admit(service, one, adapters, replicas) for one in tokenized))
        await send_batch(tokenized)
        for one in tokenized:
            _abort_again(manager, one.rid)

    async def handle_batch_output(received: Any) -> None:
        _finish(manager, service, received, replicas)
        await handle_batch(received)

    async def generate_request(request: Any, *args: Any, **kw: Any) -> AsyncIterator[Any]:
        admitted: list[RunningRequest] = []
        # Not reset: a generator may be closed in another context than it was started in.
        _ADMITTED.set(admitted)
        try:
            async for response in generate(request, *args, **kw):
                if service.context.settings.snapshot_durability == "sync":
                    await _settle(service, response)
                yield response
        finally:
            # Not by rid: one that was refused as a duplicate is the rid of a running request.
            for running in admitted:
                gate.left(running)

    manager._send_one_request = send_one_request
    manager._send_batch_request = send_batch_request
    manager._handle_batch_output = handle_batch_output
    manager.generate_request = generate_request


CHANGING_WEIGHTS: Final = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
    "release_memory_occupation",
)
"""Methods of the tokenizer manager after which the ranks may have another namespace."""


def _watch_weights(manager: Any, service: SnapshotService) -> None:
    """Forget who the engine is before the client hears that its weights have changed."""

    def forgetting(change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        async def wrapper(*args: Any, **kw: Any) -> Any:
            try:
                return await change(*args, **kw)
            finally:
                service.context.forget_engine()

        return wrapper

    for name in CHANGING_WEIGHTS:
        setattr(manager, name, forgetting(getattr(manager, name)))


async def _admit(
    service: SnapshotService, tokenized: Any, adapters: tuple[str, ...], replicas: Replicas
) -> None:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    if not isinstance(tokenized, TokenizedGenerateReqInput) or tokenized.input_ids is None:
        return
    if tokenized.session_params is not None:
        return  # its prompt is put together in the scheduler: what passes here is a part of it
    try:
        extra_key = seed_of(tokenized.extra_key, tokenized.lora_id, adapters)
        prompt = to_tokens(tokenized.input_ids, "input_ids")
    except InvalidRequestError as error:
        # What SGLang's routes answer with 400; a negative id would end its scheduler.
        raise ValueError(str(error)) from error
    salt = tokenized.cache_salt or None
    request = RunningRequest(
        tokenized.rid, prompt, CURRENT_TAG.get(), extra_key, salt, WAITED.get()
    )
    _ADMITTED.get([]).append(request)
    tag = request.tag
    conversation = None if tag is None else (tag.tenant, tag.conversation_id)
    replicas.admit(request.rid, conversation, tokenized.routed_dp_rank)
    await service.gate.admit(request)
    if replicas.count > 1:
        tokenized.routed_dp_rank = replicas.route(request.rid)


def _abort_again(manager: Any, rid: str) -> None:
    """Repeat an abort that came while the request was held: the scheduler did not know it yet."""
    from sglang.srt.managers.io_struct import AbortReq

    state = manager.rid_to_state.get(rid)
    if state is not None and state.abort_sent:
        manager._dispatch_to_scheduler(AbortReq(rid=rid))


def _finish(manager: Any, service: SnapshotService, received: Any, replicas: Replicas) -> None:
    """Count the replies that end in this batch, before their clients are told."""
    where = getattr(received, "dp_ranks", None)
    reasons = getattr(received, "finished_reasons", None)
    output_ids = getattr(received, "output_ids", None)
    if reasons is None or output_ids is None:
        return
    for index, rid in enumerate(received.rids):
        reason, state = reasons[index], manager.rid_to_state.get(rid)
        if reason is None or state is None:
            continue
        if reason.get("type") == "abort":
            service.gate.abandoned(rid)
        else:
            _tell_cached(service, received, index)
            # None where there is one replica.
            replicas.served(rid, (where[index] if where else None) or 0)
            service.gate.finished(rid, [*state.output_ids, *output_ids[index]])


def _tell_cached(service: SnapshotService, received: Any, index: int) -> None:
    """How much of a prompt the engine did not compute, and from which tier it had that."""
    cached = getattr(received, "cached_tokens", None)
    if cached is None:
        return
    every = getattr(received, "cached_tokens_details", None)
    details = (every[index] if every else None) or {}
    service.gate.served.cached(
        received.rids[index], cached[index], details.get("device"), details.get("host")
    )


async def _settle(service: SnapshotService, response: Any) -> None:
    meta = response.get("meta_info") if isinstance(response, dict) else None
    if meta and meta.get("finish_reason") is not None:
        await service.gate.settled(meta["id"])
