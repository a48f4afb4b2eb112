"""How many tokens of a prompt are computed, that need not be: stock SGLang and Engram.

Usage, at the root of a checkout:

    python -m benchmark.reuse [--json] [--out FILE] [--strategy NAME ...]

Strategies: no_buffer, extra_buffer (pages of 1), extra_buffer-16 (pages of 16); all unless some are
named. For each: stock SGLang; Engram; Engram after kill -9 and a start on what it had saved; Engram
with --snapshot-point-interval. The figures are counts (prompt tokens less cached ones): they depend
on no machine's speed. Requests come one at a time.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmark import servers

from engram.testing.samples import seeded_random

STRATEGIES = {
    "no_buffer": ("--mamba-scheduler-strategy", "no_buffer"),
    "extra_buffer": ("--mamba-scheduler-strategy", "extra_buffer", "--page-size", "1"),
    "extra_buffer-16": ("--mamba-scheduler-strategy", "extra_buffer", "--page-size", "16"),
}
ON = ("--enable-snapshot-persistence", "--snapshot-trigger-policy", "manual_only")
INTERVAL = 64
PROMPT, REPLY, MESSAGE, SYSTEM = 600, 320, 30, 400

CASES = {
    "identical prompt": "the same prompt sent again",
    "next turn": f"prompt, reply and a message of {MESSAGE}",
    "regenerate": "another next turn, which was answered before, sent again",
    "branch in the prompt": f"{PROMPT * 9 // 10} tokens of the prompt, then others",
    "branch in the reply": f"prompt, {REPLY * 9 // 10} tokens of the reply, then others",
    "common system prompt": f"the first {SYSTEM} tokens of another conversation, then others",
    "marked system prompt": "the same, where those were sent by themselves before",
}


class Talk:
    """The prompts of all cases; the same for every server."""

    def __init__(self, seed: int) -> None:
        numbers = random.Random(seed)

        def ids(count: int) -> list[int]:
            return servers.random_ids(numbers, count)

        self.prompt, self.message = ids(PROMPT), ids(MESSAGE)
        self.others = [ids(MESSAGE) for _ in range(6)]
        self.system, self.marked = ids(SYSTEM), ids(SYSTEM)
        self.reply: list[int] = []

    async def begin(self, http: Any, tag: bool) -> None:
        """The conversations that the cases go on from."""

        async def say(name: str, ids: Sequence[int], count: int) -> list[int]:
            reply = await servers.generate(http, ids, count, name if tag else None)
            if tag:
                saved = await http.post("/save_snapshot", json={"conversation_id": name})
                saved.raise_for_status()
            return reply.ids

        self.reply = await say("talk", self.prompt, REPLY)
        await say("talk", self.second_turn, 8)
        await say("system", [*self.system, *self.others[2]], 8)
        await say("marked", self.marked, 1)

    @property
    def second_turn(self) -> list[int]:
        return [*self.prompt, *self.reply, *self.others[5]]

    async def cases(self, http: Any) -> dict[str, int]:
        """Case -> tokens computed."""
        history = [*self.prompt, *self.reply]
        prompts = {
            "identical prompt": self.prompt,
            "next turn": [*history, *self.message],
            "regenerate": self.second_turn,
            "branch in the prompt": [*self.prompt[: PROMPT * 9 // 10], *self.others[0]],
            "branch in the reply": [*history[: PROMPT + REPLY * 9 // 10], *self.others[1]],
            "common system prompt": [*self.system, *self.others[3]],
            "marked system prompt": [*self.marked, *self.others[4]],
        }
        assert list(prompts) == list(CASES)
        computed = {}
        for name, ids in prompts.items():
            reply = await servers.generate(http, ids, 8)
            computed[name] = len(ids) - reply.cached
        return computed


def _ask(url: str, talk: Talk, *, begin: bool, tag: bool) -> dict[str, int]:
    async def run() -> dict[str, int]:
        async with servers.client(url) as http:
            if begin:
                await talk.begin(http, tag)
            return await talk.cases(http)

    return asyncio.run(run())


def measure(folder: Path, model: Path, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Strategy -> side -> case -> tokens computed."""
    found: dict[str, Any] = {}
    for name in names:
        found[name] = sides = {}
        for side, flags in {
            "stock": (),
            "engram": ON,
            "engram, points": (*ON, "--snapshot-point-interval", str(INTERVAL)),
        }.items():
            print(f"{name}: {side}", file=sys.stderr, flush=True)
            store = ("--snapshot-dir", str(folder / f"{name} {side}")) if flags else ()
            talk = Talk(seed)
            with servers.server(folder, model, [*STRATEGIES[name], *flags, *store]) as server:
                sides[side] = _ask(server.url, talk, begin=True, tag=bool(flags))
                if side == "engram":
                    server.kill()
                    server.start()
                    sides["engram, restarted"] = _ask(server.url, talk, begin=False, tag=False)
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sides = ("stock", "engram", "engram, restarted", "engram, points")
    lines = [f"| strategy | what is sent | {' | '.join(sides)} |", "|---|---|---|---|---|---|"]
    for name, by_side in found.items():
        for case in CASES:
            figures = " | ".join(str(by_side[side][case]) for side in sides)
            lines.append(f"| `{name}` | {case} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    parser = servers.options_parser("reuse", __doc__)
    parser.add_argument("--strategy", action="append", choices=list(STRATEGIES))
    options = parser.parse_args()
    seed = seeded_random().randrange(2**31)
    with servers.workplace() as (folder, model):
        found = measure(folder, model, options.strategy or list(STRATEGIES), seed)
    figures = {"machine": servers.machine(), "seed": seed, "computed_tokens": found}
    servers.report(figures, options, table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
