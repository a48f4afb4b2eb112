"""A tiny model's server, the load on it, and what the measurements say of the machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from engram.testing.server import ServerProcess
from engram.testing.tiny_model import write_tiny_model

PRINTABLE_IDS = range(6, 104)
"""Ids of the tiny tokenizer's characters."""
TIMEOUT_S = 300.0


def machine() -> dict[str, Any]:
    """What the figures depend on, in words that say nothing of whose machine it is."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "threads of a process": os.environ["OMP_NUM_THREADS"],
    }


def server(
    folder: Path, model: Path, args: Sequence[str], env: Mapping[str, str] | None = None
) -> ServerProcess:
    """A server that is not started yet."""
    quick = ("--skip-server-warmup", "--max-total-tokens", "8192", "--max-mamba-cache-size", "64")
    return ServerProcess(
        model,
        [*quick, "--mamba-scheduler-strategy", "no_buffer", *args],
        env,
        folder / "server.log",
        timeout=600,
    )


def random_ids(numbers: random.Random, count: int) -> list[int]:
    return numbers.choices(PRINTABLE_IDS, k=count)


@dataclass
class Reply:
    """One generation: what came, when (seconds, one a token), and what of the prompt was cached."""

    rid: str
    ids: list[int]
    times: list[float] = field(default_factory=list)
    cached: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)


def _body(ids: Sequence[int], new_tokens: int, conversation: str | None) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    tag = {} if conversation is None else {"conversation_id": conversation}
    return {"input_ids": list(ids), "sampling_params": params, **tag}


async def generate(
    http: httpx.AsyncClient, ids: Sequence[int], new_tokens: int, conversation: str | None = None
) -> Reply:
    """A reply all at once."""
    response = await http.post("/generate", json=_body(ids, new_tokens, conversation))
    response.raise_for_status()
    found = response.json()
    return Reply(
        found["meta_info"]["id"], found["output_ids"], cached=found["meta_info"]["cached_tokens"]
    )


async def stream(http: httpx.AsyncClient, ids: Sequence[int], new_tokens: int) -> Reply:
    """A reply token by token."""
    times, last = [], None
    async for event in _events(http, {**_body(ids, new_tokens, None), "stream": True}):
        times.append(time.perf_counter())
        last = event
    assert last is not None
    return Reply(last["meta_info"]["id"], last["output_ids"], times)


async def _events(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[Any]:
    async with http.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


async def health(http: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get("/v1/memory/health")).raise_for_status().json()
    return found


async def settled(http: httpx.AsyncClient) -> None:
    """Return when no save is under way."""
    while True:
        queues = (await health(http))["queues"]
        if not (queues["saves_running"] or queues["automatic_saves_waiting"]):
            return
        await asyncio.sleep(0.1)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, in milliseconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 2)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0), "count": len(ordered)}


def options_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of servers has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmark.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, help="write the figures to this file as well")
    return parser


@contextmanager
def workplace() -> Iterator[tuple[Path, Path]]:
    """A folder for one run, and the tiny model in it."""
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as name:
        folder = Path(name)
        yield folder, write_tiny_model(folder / "model", seed=1, dtype="bfloat16")


def report(figures: dict[str, Any], options: argparse.Namespace, table: str) -> None:
    """Print the figures as asked for, and write them to the file asked for."""
    text = json.dumps(figures, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else table)
