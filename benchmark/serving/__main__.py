"""Throughput of the same traffic with persistence off, on, and on with every turn saved.

Usage, at the root of a checkout:

    python -m benchmark.serving [--json] [--out FILE] [--pairs N] [--seconds S] [--clients N]

Clients hold conversations of several turns at full load: each sends its next request as soon as it
has its reply.

    off      the same command without --enable-snapshot-persistence
    on       with it; the requests are untagged, so nothing is written
    tagged   with it; every turn is saved (--snapshot-trigger-policy every_turn, no least interval)

One server runs at a time. They take turns: off, on, on, off, and again for each further pair; on
the server with persistence untagged and tagged traffic take turns too.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmark import servers

from engram.testing.samples import seeded_random

TURNS = 3
PROMPT = 64
NEW_TOKENS = 32
ON = ("--enable-snapshot-persistence", "--snapshot-min-interval-seconds", "0")


@dataclass
class Measured:
    """Sums over all runs of one condition, and requests/s of each run."""

    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    runs: list[float] = field(default_factory=list)
    settling: float = 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "requests_per_s": round(self.requests / self.seconds, 3),
            "tokens_per_s": round((self.prompt_tokens + self.new_tokens) / self.seconds, 1),
            "new_tokens_per_s": round(self.new_tokens / self.seconds, 1),
            "cached_share": round(self.cached_tokens / self.prompt_tokens, 3),
            "requests": self.requests,
            "seconds_until_all_was_saved": round(self.settling, 2),
            "runs_requests_per_s": self.runs,
        }


async def _load(
    url: str, seed: int, clients: int, seconds: float, tag: str | None, into: Measured | None
) -> None:
    """Conversations drawn from `seed`, the same in every condition, for `seconds`."""
    total = Measured()
    end = time.perf_counter() + seconds

    async def talk(http: Any, number: int) -> None:
        numbers = random.Random(f"{seed}-{number}")
        spoken = 0
        while time.perf_counter() < end:
            history: list[int] = []
            spoken += 1
            name = None if tag is None else f"{tag}-{number}-{spoken}"
            for _ in range(TURNS):
                history += servers.random_ids(numbers, PROMPT)
                reply = await servers.generate(http, history, NEW_TOKENS, name)
                if time.perf_counter() > end:
                    return  # only what was finished in time counts
                total.requests += 1
                total.prompt_tokens += len(history)
                total.new_tokens += len(reply.ids)
                total.cached_tokens += reply.cached
                history += reply.ids

    async with servers.client(url) as http:
        await asyncio.gather(*(talk(http, number) for number in range(clients)))
        if into is None:
            return
        total.seconds = seconds
        for name in ("requests", "prompt_tokens", "new_tokens", "cached_tokens", "seconds"):
            setattr(into, name, getattr(into, name) + getattr(total, name))
        into.runs.append(round(total.requests / seconds, 3))
        if tag is not None:
            begun = time.perf_counter()
            await servers.settled(http)
            into.settling += time.perf_counter() - begun


def _measure(folder: Path, model: Path, options: Any) -> dict[str, Any]:
    seed = seeded_random().randrange(2**31)
    found = {name: Measured() for name in ("off", "on", "tagged")}
    stored: dict[str, int] = {"saves": 0, "left_out_saves": 0}
    boots = ["off", "on", "on", "off"] * options.pairs
    for boot, kind in enumerate(boots):
        store = folder / f"snapshots-{boot}"
        args = [] if kind == "off" else [*ON, "--snapshot-dir", str(store)]
        print(f"server {boot + 1} of {len(boots)}: {kind}", file=sys.stderr, flush=True)
        with servers.server(folder, model, args) as server:

            def run(name: str | None, tag: str | None, seconds: float, seed: int) -> None:
                into = None if name is None else found[name]
                asyncio.run(_load(server.url, seed, options.clients, seconds, tag, into))

            run(None, None, 5.0, seed)
            traffic = [("off", None)] if kind == "off" else [("on", None), ("tagged", "t")]
            for name, tag in traffic if boot % 4 == 1 else traffic[::-1]:
                run(name, tag, options.seconds, seed + 1 + boot // 2)
            if kind == "off":
                continue
            counters = asyncio.run(_health(server.url))
            for name in stored:
                stored[name] += counters["service"][name]
    figures = {name: one.figures() for name, one in found.items()}
    keys = ("requests_per_s", "tokens_per_s", "new_tokens_per_s")
    return {
        "machine": servers.machine(),
        "pairs": options.pairs,
        "seconds": options.seconds,
        "clients": options.clients,
        "turns": TURNS,
        "prompt_tokens_a_turn": PROMPT,
        "new_tokens_a_turn": NEW_TOKENS,
        "throughput": figures,
        "ratio_to_off": {
            name: {key: round(figures[name][key] / figures["off"][key], 3) for key in keys}
            for name in ("on", "tagged")
        },
        **stored,
    }


async def _health(url: str) -> dict[str, Any]:
    async with servers.client(url) as http:
        return await servers.health(http)


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'':8}{'requests/s':>12}{'tokens/s':>12}{'new tokens/s':>14}{'cached':>9}"]
    for name, row in figures["throughput"].items():
        lines.append(
            f"{name:8}{row['requests_per_s']:12.2f}{row['tokens_per_s']:12.1f}"
            f"{row['new_tokens_per_s']:14.1f}{row['cached_share']:9.2f}"
        )
    lines += [f"{n} / off: {r['requests_per_s']:.3f}" for n, r in figures["ratio_to_off"].items()]
    lines.append(f"saves: {figures['saves']}, left out: {figures['left_out_saves']}")
    return "\n".join(lines)


def main() -> None:
    parser = servers.options_parser("serving", __doc__)
    parser.add_argument("--pairs", type=int, default=1, help="times off, on, on, off")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load on each server")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with servers.workplace() as (folder, model):
        figures = _measure(folder, model, options)
    servers.report(figures, options, _table(figures))


if __name__ == "__main__":
    main()
