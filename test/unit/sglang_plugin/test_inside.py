"""The client's way to an application in the same process."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from sglang.srt.entrypoints.engine import Engine as SglangEngine

from engram.errors import EngramError
from engram.sglang_plugin.inprocess import POSITIONAL, Engine
from engram.sglang_plugin.inside import InsideTransport
from unit.service.engine import on_a_loop


def application(seen: dict[str, object]) -> FastAPI:
    app = FastAPI()

    @app.post("/echo/{name}")
    async def echo(name: str, request: Request) -> dict[str, object]:
        body = (await request.body()).decode()
        return {"name": name, "body": body, "query": dict(request.query_params)}

    @app.get("/parts")
    async def parts() -> StreamingResponse:
        async def made() -> AsyncIterator[bytes]:
            for number in range(100):
                seen["made"] = number
                yield f"{number} ".encode()
                await asyncio.sleep(0)

        return StreamingResponse(made())

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def made() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"."
                    await asyncio.sleep(0)
            finally:
                seen["ended"] = True

        return StreamingResponse(made())

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError("as it is")

    return app


def client_of(seen: dict[str, object]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=InsideTransport(application(seen)), base_url="http://inside")


@on_a_loop
async def test_a_request_and_its_reply() -> None:
    async with client_of({}) as client:
        reply = await client.post("/echo/a%20b", content=b"x" * 100_000, params={"q": "1 2"})
        assert reply.json() == {"name": "a b", "body": "x" * 100_000, "query": {"q": "1 2"}}
        assert (await client.get("/nothing")).status_code == 404


@on_a_loop
async def test_a_stream_is_read_while_it_is_made() -> None:
    seen: dict[str, object] = {}
    async with client_of(seen) as client, client.stream("GET", "/parts") as response:
        parts = response.aiter_bytes()
        first = await anext(parts)
        made = seen["made"]
        assert isinstance(made, int)
        assert made < 99
        rest = [part async for part in parts]
    assert (first + b"".join(rest)).split() == [str(n).encode() for n in range(100)]


@on_a_loop
async def test_a_stream_that_is_left_ends() -> None:
    seen: dict[str, object] = {}
    async with client_of(seen) as client, client.stream("GET", "/endless") as response:
        await anext(response.aiter_bytes())
    assert seen["ended"] is True


@on_a_loop
async def test_what_the_application_raises_is_the_reply_of_a_server() -> None:
    async with client_of({}) as client:
        assert (await client.get("/fails")).status_code == 500


@on_a_loop
async def test_what_is_raised_before_any_reply_comes_out() -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("as it is")

    async with httpx.AsyncClient(transport=InsideTransport(broken), base_url="http://i") as client:
        with pytest.raises(RuntimeError, match="as it is"):
            await client.get("/")


@pytest.mark.parametrize(
    ("args", "kwargs", "field"),
    [
        (("x", {"n": 2}), {}, "n"),
        (("x",), {"sampling_params": {"n": 2}}, "n"),
        (("x",), {"sampling_params": [{}, {"n": 1}]}, "prompt"),
        ((["x", "y"],), {}, "prompt"),
        ((), {"input_ids": [[1], [2]]}, "input_ids"),
        ((None, None, [[1]]), {}, "input_ids"),
        (("x", None, None, ["image"]), {}, "conversation_id"),
        (("x",), {"video_data": "v"}, "conversation_id"),
        (("x",), {"conversation_id": "prefix:guide"}, "conversation_id"),
        (("x",), {"conversation_id": "../x"}, "conversation_id"),
    ],
)
def test_a_turn_without_a_server_has_the_rules_of_one(
    args: tuple[Any, ...], kwargs: dict[str, Any], field: str
) -> None:
    # Refused before anything of the engine is asked: there is none.
    with pytest.raises(EngramError) as refused:
        Engine.generate(cast(Any, None), *args, **{"conversation_id": "c", **kwargs})
    assert refused.value.details["field"] == field


def test_what_is_known_by_place_is_what_sglang_takes_there() -> None:
    names = list(inspect.signature(SglangEngine.generate).parameters)
    assert tuple(names[1 : 1 + len(POSITIONAL)]) == POSITIONAL
