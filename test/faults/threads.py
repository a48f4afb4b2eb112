"""Many threads at one server without a model, with collections among them; what must hold then."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from faults.crowd import Crowd
from faults.engine import Keeper
from faults.ledger import Ledger, check_files, check_keeper

THREADS: Final = 16
RAM_BYTES: Final = 1 << 17
MOST_SNAPSHOTS: Final = 60


@dataclass
class Hours:
    """What so much traffic has shown; `collected` are the orphans found at its end."""

    seconds: float
    listed: int = 0
    collected: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def run_threads(root: Path, rng: Random, seconds: float) -> Hours:
    """Let threads act on one server, each on its own, as clients do over HTTP; then check it.

    Afterwards every promise is kept, every snapshot restores exactly, every reference resolves, the
    RAM tier's accounts are what its payloads take, and nothing unnamed is left on disk.
    """
    hours = Hours(seconds)
    ledger, lock = Ledger(), threading.Lock()

    def tell(event: Mapping[str, Any]) -> None:
        with lock:
            ledger.record(event)

    loop = asyncio.new_event_loop()
    serving = threading.Thread(target=loop.run_forever, name="event-loop")
    serving.start()

    def on_loop(work: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), loop).result()

    keeper = Keeper.start(root, ram_bytes=RAM_BYTES)
    crowd = Crowd(keeper, rng, tell, name="threads", most=MOST_SNAPSHOTS)
    end = time.monotonic() + seconds
    failures: list[BaseException] = []

    def client() -> None:
        try:
            while time.monotonic() < end and not failures:
                on_loop(crowd.act())
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(THREADS)]
    try:
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        if failures:
            raise failures[0]
        on_loop(keeper.service.context.drain())
        hours.listed = on_loop(check_keeper(keeper, ledger))
        check_files(keeper)
        check_ram(keeper)
        hours.collected = on_loop(keeper.collect())
        assert keeper.orphans() == set(), "segments that nobody names"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        serving.join()
        loop.close()
        keeper.stop()
    hours.counts.update(crowd.counts)
    return hours


def check_ram(keeper: Keeper) -> None:
    """What the RAM tier says it uses is what its payloads take, and it is within its bound."""
    ram = keeper.engine.manager.ram
    with ram.lock:
        resident = [*ram._unwanted, *ram._wanted]
        taken = sum(node.payload.numel() for node in resident if node.payload is not None)
        assert ram.used == taken <= ram.capacity, (ram.used, taken, ram.capacity)
        for node in resident:
            children = sum(other.parent is node and other.in_ram for other in resident)
            assert node.resident_children == children
    depths = keeper.engine.manager.depths()
    for name in ("writes_running", "writes_waiting", "bytes_held_for_writing", "promotions"):
        assert depths[name] == 0, depths
