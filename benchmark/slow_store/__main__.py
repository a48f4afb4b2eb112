"""Gaps between the tokens of running streams while the store is quiet, busy, and busy but slow.

Usage, at the root of a checkout:

    python -m benchmark.slow_store [--json] [--out FILE] [--rounds N] [--seconds S] [--delay S]

Streams of nobody's conversation run all the time. Beside them:

    quiet   nothing
    busy    turns that are saved, saves by request, restores, and requests whose prefix is on disk
    slow    the same, every read, write and fsync of the store and every commit of the catalog
            delayed by --delay seconds (2)

The three take turns on one server, forwards and backwards in each round, so that whatever else the
machine does hits all of them alike.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmark import servers

from engram.testing.faults import Fault, FaultControl
from engram.testing.samples import seeded_random

PLUGIN = Path(__file__).parents[2] / "test" / "plugins" / "faulty_store"
CONDITIONS = ("quiet", "busy", "slow")
STREAMS = 3
STREAM_TOKENS = 100
STORED = 60
"""Conversations on disk: three times what RAM holds, taken in turn, so none is in RAM."""
PROMPT = 60
FLAGS = (
    "--enable-snapshot-persistence",
    *("--snapshot-min-interval-seconds", "0", "--max-warm-memory-gb", "0.004"),
    *("--snapshot-promote-timeout", "60", "--conversation-active-timeout", "0.5"),
)


@dataclass
class Measured:
    """What one condition saw: gaps in seconds, and how much went on beside the streams."""

    gaps: list[float] = field(default_factory=list)
    work: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Load:
    """The streams, and the work beside them."""

    def __init__(self, http: Any, numbers: random.Random, stored: list[list[int]]) -> None:
        self._http = http
        self._numbers = numbers
        self._stored = itertools.cycle(enumerate(stored))
        self._names = itertools.count()
        self._over = False

    async def run(self, busy: bool, seconds: float, into: Measured) -> None:
        self._over = False
        begun = time.perf_counter()
        tasks = [asyncio.ensure_future(self._streams(into)) for _ in range(STREAMS)]
        if busy:
            work = (self._turns, self._saves, self._restores, self._hits)
            tasks += [asyncio.ensure_future(one(into)) for one in work]
        await asyncio.sleep(seconds)
        self._over = True
        # What the streams began they end; work on a slow store is not waited for any longer.
        await asyncio.gather(*tasks[:STREAMS])
        into.seconds += time.perf_counter() - begun
        for task in tasks[STREAMS:]:
            task.cancel()
        await asyncio.gather(*tasks[STREAMS:], return_exceptions=True)

    async def _streams(self, into: Measured) -> None:
        while not self._over:
            prompt = servers.random_ids(self._numbers, 30)
            into.gaps += (await servers.stream(self._http, prompt, STREAM_TOKENS)).gaps

    async def _turns(self, into: Measured) -> None:
        while not self._over:
            name = f"turn-{next(self._names)}"
            await servers.generate(self._http, servers.random_ids(self._numbers, PROMPT), 4, name)
            into.work["turns saved by themselves"] += 1
            await asyncio.sleep(0.3)

    async def _saves(self, into: Measured) -> None:
        while not self._over:
            prompt = servers.random_ids(self._numbers, PROMPT)
            rid = (await servers.generate(self._http, prompt, 4)).rid
            await self._post("/save_snapshot", {"rid": rid, "conversation_id": f"by-{rid}"})
            into.work["saves by request"] += 1
            await asyncio.sleep(0.3)

    async def _restores(self, into: Measured) -> None:
        while not self._over:
            number, _ = next(self._stored)
            done = await self._post("/restore_snapshot", {"conversation_id": f"stored-{number}"})
            into.work[f"restores from {done['source_tier']}"] += 1
            await asyncio.sleep(0.3)

    async def _hits(self, into: Measured) -> None:
        while not self._over:
            _, ids = next(self._stored)
            reply = await servers.generate(self._http, [*ids, 20, 21, 22], 4)
            into.work["requests on disk: hit" if reply.cached else "requests on disk: missed"] += 1
            await asyncio.sleep(0.3)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._http.post(path, json=body)
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found


async def _measure(url: str, faults: FaultControl, options: Any) -> dict[str, Any]:
    numbers = seeded_random()
    async with servers.client(url) as http:
        stored = []
        for number in range(STORED):
            prompt = servers.random_ids(numbers, PROMPT)
            reply = await servers.generate(http, prompt, 4, f"stored-{number}")
            stored.append([*prompt, *reply.ids])
        await servers.settled(http)
        load = Load(http, numbers, stored)
        await load.run(True, 5.0, Measured())  # everything has run once
        found = {name: Measured() for name in CONDITIONS}
        for turn in range(options.rounds):
            for name in CONDITIONS if turn % 2 == 0 else CONDITIONS[::-1]:
                if name == "slow":
                    fault = Fault(delay=options.delay)
                    faults.set(read=fault, write=fault, fsync=fault, commit=fault)
                print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
                await load.run(name != "quiet", options.seconds, found[name])
                faults.clear()
                await servers.settled(http)
        counters = await servers.health(http)
    gaps = {name: servers.percentiles(one.gaps) for name, one in found.items()}
    ratios = {
        name: {key: round(gaps[name][key] / gaps["quiet"][key], 2) for key in ("p50", "p90", "p99")}
        for name in ("busy", "slow")
    }
    return {
        "machine": servers.machine(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "delay_s": options.delay,
        "streams": STREAMS,
        "gap_ms": gaps,
        "ratio_to_quiet": ratios,
        "work": {name: dict(one.work) for name, one in found.items()},
        "contained_errors": sum(rank["contained_errors"] for rank in counters["ranks"]),
        "hold_timeouts": counters["service"]["hold_timeouts"],
    }


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'gap, ms':10}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'count':>8}"]
    for name, row in figures["gap_ms"].items():
        cells = "".join(f"{row[key]:9.1f}" for key in ("p50", "p90", "p99", "max"))
        lines.append(f"{name:10}{cells}{row['count']:8}")
    lines += [f"{n} / quiet: {r}" for n, r in figures["ratio_to_quiet"].items()]
    lines += [f"beside the streams, {n}: {w}" for n, w in figures["work"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = servers.options_parser("slow_store", __doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each condition in a round")
    parser.add_argument("--delay", type=float, default=2.0, help="seconds of each slow access")
    options = parser.parse_args()
    with servers.workplace() as (folder, model):
        path = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            "ENGRAM_TEST_FAULTS": str(folder / "faults"),
            "PYTHONPATH": os.pathsep.join(path),
        }
        args = [*FLAGS, "--snapshot-dir", str(folder / "snapshots")]
        with servers.server(folder, model, args, env) as server:
            faults = FaultControl(folder / "faults")
            figures = asyncio.run(_measure(server.url, faults, options))
    servers.report(figures, options, _table(figures))


if __name__ == "__main__":
    main()
