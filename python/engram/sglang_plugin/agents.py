"""SGLang's side of agents: its chat completions in process, its keys, its application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from fastapi import WebSocket
from starlette.routing import Route

from engram.agents.database import AGENT_FILE
from engram.agents.host import AgentHost
from engram.agents.ports import ChatReply, Message, OnWritten
from engram.conversation.turns import Tag
from engram.core.settings import Settings
from engram.errors import (
    GenerationAbortedError,
    InvalidRequestError,
    UnsupportedError,
    error_from_dict,
)
from engram.server.agent import agent_router
from engram.server.agent_socket import AgentSocket
from engram.server.tagging import OWN_TAG
from engram.service import SnapshotService

logger = logging.getLogger(__name__)

POLL_S: Final = 0.2


class SglangChat:
    """`/v1/chat/completions` without the network (`engram.agents.ports.ChatEngine`)."""

    def __init__(self, app: Any, tokenizer_manager: Any, template_manager: Any, args: Any) -> None:
        self._app = app
        self._manager = tokenizer_manager
        self._templates = template_manager
        self._args = args
        key = args.api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Through the whole application: what tags, counts and refuses requests of clients does so
        # for those of agents.
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app),
            base_url="http://engram.invalid",
            headers=headers,
            timeout=None,
        )
        self._watched: dict[str, OnWritten] = {}
        self._watch_replies()

    @property
    def parses_tool_calls(self) -> bool:
        """Whether the server was started with --tool-call-parser."""
        return self._args.tool_call_parser is not None

    async def complete(
        self, body: Mapping[str, Any], turn: Tag | None = None, on_written: OnWritten | None = None
    ) -> ChatReply:
        """Answer a chat completion."""
        rid = uuid.uuid4().hex
        asked = {
            "model": self._manager.served_model_name,
            **body,
            "rid": rid,
            "return_input_ids_in_sglext": True,
            "return_output_ids_in_sglext": True,
        }
        token = OWN_TAG.set(turn)
        if on_written is not None:
            self._watched[rid] = on_written
        try:
            response = await self._client.post("/v1/chat/completions", json=asked)
        except asyncio.CancelledError:
            self._manager.abort_request(rid=rid)
            raise
        except ValueError as error:
            raise InvalidRequestError(f"the messages are not JSON: {error}") from error
        finally:
            self._watched.pop(rid, None)
            OWN_TAG.reset(token)
        reply = _json(response)
        if response.status_code != 200:
            raise _refusal(response.status_code, reply)
        choice = reply["choices"][0]
        if choice["finish_reason"] == "abort":
            raise GenerationAbortedError("SGLang aborted the generation")
        message = {k: v for k, v in choice["message"].items() if v is not None}
        tokens = reply["sglext"]
        details = reply["usage"].get("prompt_tokens_details") or {}
        return ChatReply(
            reply["id"],
            message,
            choice["finish_reason"],
            tokens["input_ids"],
            tokens["output_ids"][0],
            details.get("cached_tokens", 0),
        )

    def _watch_replies(self) -> None:
        """Hear of replies while they are written, which are asked for and answered as a whole.

        SGLang's ranks tell of every token only if a request is streamed. Said to them alone, it
        changes nothing else: the reply is put together and read as one that is not.
        """
        manager = self._manager
        send, handle = manager._send_one_request, manager._handle_batch_output

        async def send_one_request(tokenized: Any) -> None:
            if tokenized.rid in self._watched:
                tokenized.stream = True
            await send(tokenized)

        async def handle_batch_output(received: Any) -> None:
            if self._watched:
                self._tell(received)
            await handle(received)

        manager._send_one_request = send_one_request
        manager._handle_batch_output = handle_batch_output

    def _tell(self, received: Any) -> None:
        """Whatever goes wrong here costs what is seen of a reply, never the server: this is called
        inside the engine's receive loop."""
        texts = getattr(received, "output_strs", None)
        if texts is None:
            return
        for rid, text in zip(received.rids, texts, strict=False):
            watcher = self._watched.get(rid)
            if watcher is None or not text:
                continue
            try:
                watcher(text)
            except Exception:
                self._watched.pop(rid, None)
                logger.exception("Engram: the reply %s is not shown while it is written", rid)

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, more: bool) -> str:
        """The text of messages under the model's own template."""
        serving = self._app.state.openai_serving_chat
        if serving.chat_encoding_spec is not None or self._templates.chat_template_name is not None:
            raise UnsupportedError("the model has a template of SGLang's own")
        try:
            text = self._manager.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=more,
            )
        except Exception as error:
            # Templates are programs of the model's maker and raise what they like.
            raise UnsupportedError(f"the model's template refuses the messages: {error}") from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Tokens of text, with nothing added."""
        return list(self._manager.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self._manager.tokenizer.decode(list(tokens), skip_special_tokens=False))


def mount_agents(
    app: Any,
    settings: Settings,
    service: SnapshotService,
    tokenizer_manager: Any,
    template_manager: Any,
    args: Any,
) -> None:
    """Serve agents on SGLang's application, under the keys of what operators do."""
    from sglang.srt.utils.auth import AuthLevel, auth_level, decide_request_auth

    from engram.agents.mcp_server import session_manager

    engine = SglangChat(app, tokenizer_manager, template_manager, args)
    keyed = bool(args.api_key or args.admin_api_key)
    path = Path(settings.snapshot_dir) / AGENT_FILE
    host = AgentHost(settings, service, engine, path, keyed=keyed)
    marked = auth_level(AuthLevel.ADMIN_OPTIONAL)

    router: Any = agent_router(host)
    for route in router.routes:
        marked(route.endpoint)
    app.include_router(router)

    def authorize(header: str | None) -> bool:
        decision = decide_request_auth(
            method="GET",
            path="/v1/agent/ws",
            authorization_header=header,
            api_key=args.api_key,
            admin_api_key=args.admin_api_key,
            auth_level=AuthLevel.ADMIN_OPTIONAL,
        )
        return bool(decision.allowed)

    socket = AgentSocket(host, authorize)

    async def serve(websocket: WebSocket) -> None:
        await socket.serve(websocket)

    app.add_api_websocket_route("/v1/agent/ws", serve)
    manager = session_manager(host)
    app.router.routes.append(Route("/mcp", endpoint=marked(_Mcp(manager, keyed=keyed))))
    _live(app, host, manager)
    _interrupt_before_the_end(tokenizer_manager, host)


def _interrupt_before_the_end(manager: Any, host: AgentHost) -> None:
    """Stop runs on SIGTERM: upstream waits for all requests, and they would ask for more."""
    shut_down = manager.sigterm_watchdog

    async def sigterm_watchdog() -> None:
        while not manager.gracefully_exit:
            await asyncio.sleep(POLL_S)
        await host.runs.close()
        await shut_down()

    manager.sigterm_watchdog = sigterm_watchdog


class _Mcp:
    """The MCP server as an endpoint that can be marked with a level of authentication."""

    def __init__(self, manager: Any, *, keyed: bool) -> None:
        self._manager = manager
        self._keyed = keyed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from engram.server.origins import refuse_foreign

        if not await refuse_foreign(scope, receive, send, keyed=self._keyed):
            await self._manager.asgi_app(scope, receive, send)


def _live(app: Any, host: AgentHost, manager: Any) -> None:
    """Begin with the application, and end before the snapshots' own end: runs still save."""
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            # Before SGLang's own, which counts on requests being taken as soon as it has begun.
            stack.push_async_callback(host.close)
            await host.start()
            state = await stack.enter_async_context(serve(running))
            await stack.enter_async_context(manager.run())
            # Again, and first: the runs end before the snapshots do.
            stack.push_async_callback(host.close)
            yield state

    app.router.lifespan_context = lifespan


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"message": response.text[:1000]}


def _refusal(status: int, body: Any) -> Exception:
    """What a request was refused with: by Engram in its own words, else by SGLang."""
    if isinstance(body, dict) and body.get("success") is False:
        return error_from_dict(body)
    inner = body.get("error") if isinstance(body, dict) else None
    told = inner if isinstance(inner, dict) else body
    message = told.get("message") if isinstance(told, dict) else None
    text = f"SGLang refuses the request: {message or body}"
    if status < 500:
        return InvalidRequestError(text, details={"status": status})
    return GenerationAbortedError(text, details={"status": status})
