"""Tokens sent and tokens computed over real multi-turn work, before and after a restart.

Usage, at the root of a checkout:

    python -m benchmark.token_accounting [--json] [--out FILE] [--family NAME ...] [--history]
        [--from FILE ...]

Users talk about the documents of this repository for 20 turns, 271 requests in all for each way, in
three families of models:

    no cache   stock SGLang with --disable-radix-cache; the client sends its whole history
    cache      stock SGLang as it is; the same client
    stateful   Engram; the client sends its newest message alone
    history    Engram; the first client with a conversation_id; only with --history

After turn 10 of every conversation the server is killed (SIGKILL) and started again, but the one
that has no cache to lose. A request that is not answered with 200 is a failure, and the exit status
is 1 then. The figures are counts: they
depend on no machine's speed. `--from` prints the table of earlier runs, which may have been made
for some families each.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
from benchmark import servers
from benchmark.token_accounting.report import FAMILIES, table, total
from benchmark.token_accounting.talks import TURNS, Talk, talks_of

from engram.testing.chat import NEVER_END
from engram.testing.tiny_model import write_tiny_model
from engram.testing.tiny_tokenizer import build_tokenizer

BEFORE = TURNS // 2
REPLY = 16
ROOM = ("--max-total-tokens", "32768", "--max-mamba-cache-size", "128", "--dtype", "float32")
ON = ("--enable-snapshot-persistence", "--snapshot-min-interval-seconds", "0")
WAYS: dict[str, tuple[str, ...]] = {
    "no cache": ("--disable-radix-cache",),
    "cache": (),
    "stateful": ON,
    "history": ON,
}
TOKENIZER = build_tokenizer(8192)


class Client:
    """One user of one conversation."""

    def __init__(self, way: str, talk: Talk) -> None:
        self.way = way
        self.talk = talk
        self.said: list[dict[str, str]] = []
        self.replies: list[str] = []
        self.turns: list[dict[str, int]] = []
        """Of each request: tokens and bytes sent, tokens of the prompt and those computed."""
        self.failures: list[str] = []

    async def speak(self, http: httpx.AsyncClient, turns: Sequence[int]) -> None:
        """These turns, one after another."""
        for turn in turns:
            if turn < len(self.talk.messages):
                await self._turn(http, self.talk.messages[turn])

    async def _turn(self, http: httpx.AsyncClient, message: str) -> None:
        new = {"role": "user", "content": message}
        sent = [new] if self.way == "stateful" else [*self.said, new]
        body: dict[str, Any] = {
            "model": "default",
            "messages": sent,
            "temperature": 0,
            "max_tokens": REPLY,
            "logit_bias": NEVER_END,
        }
        path = "/v1/chat/completions"
        if self.way == "stateful":
            path = f"/v1/conversations/{self.talk.name}/chat"
        elif self.way == "history":
            body["conversation_id"] = self.talk.name
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        response = await http.post(path, content=data, headers=headers)
        if response.status_code != httpx.codes.OK:
            self.failures.append(f"{path}: {response.status_code} {response.text[:200]}")
            return
        reply = response.json()
        text = reply["choices"][0]["message"]["content"]
        usage = reply["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        rendered = TOKENIZER.apply_chat_template(sent, tokenize=False, add_generation_prompt=True)
        self.turns.append(
            {
                "sent": len(TOKENIZER.encode(rendered, add_special_tokens=False)),
                "bytes": len(data),
                "prompt": usage["prompt_tokens"],
                "computed": usage["prompt_tokens"] - cached,
            }
        )
        self.said += [new, {"role": "assistant", "content": text}]
        self.replies.append(text)


def run_way(folder: Path, model: Path, way: str, talks: Sequence[Talk]) -> list[Client]:
    """All conversations of a family in one way, the server killed in the middle."""
    clients = [Client(way, talk) for talk in talks]
    store = ("--snapshot-dir", str(folder / way)) if WAYS[way] is ON else ()
    args = (*ROOM, "--enable-cache-report", *WAYS[way], *store)
    env = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}

    async def phase(url: str, turns: range) -> None:
        async with servers.client(url) as http:
            await asyncio.gather(*(client.speak(http, turns) for client in clients))
            if store:
                await servers.settled(http)

    with servers.server(folder, model, args, env) as server:
        asyncio.run(phase(server.url, range(BEFORE)))
        if way != "no cache":
            server.kill()
            server.start()
        asyncio.run(phase(server.url, range(BEFORE, TURNS)))
    return clients


def measure(folder: Path, family: str, ways: Sequence[str]) -> dict[str, Any]:
    """Way -> what was sent and computed in a family, before and after the restart."""
    model = write_tiny_model(folder / family, family, seed=1, dtype="float32")
    talks = talks_of(list(FAMILIES).index(family), len(FAMILIES))
    found: dict[str, Any] = {}
    reference: list[Client] = []
    for way in ways:
        print(f"{family}: {way}", file=sys.stderr, flush=True)
        clients = run_way(folder, model, way, talks)
        reference = reference or clients
        found[way] = {
            "conversations": len(clients),
            "requests": sum(len(one.turns) + len(one.failures) for one in clients),
            "failures": [failure for one in clients for failure in one.failures],
            "before": _sums(clients, 0, BEFORE),
            "after": _sums(clients, BEFORE, TURNS),
            # What of a conversation is the same as without any cache: prompts and replies.
            "same": sum(
                mine == theirs
                for one, other in zip(clients, reference, strict=True)
                for mine, theirs in zip(_facts(one), _facts(other), strict=False)
            ),
        }
    return found


def _sums(clients: Sequence[Client], first: int, last: int) -> dict[str, int]:
    turns = [turn for client in clients for turn in client.turns[first:last]]
    return {
        name: sum(turn[name] for turn in turns) for name in ("sent", "bytes", "prompt", "computed")
    }


def _facts(client: Client) -> list[tuple[int, str]]:
    return [
        (turn["prompt"], reply) for turn, reply in zip(client.turns, client.replies, strict=True)
    ]


def main() -> int:
    parser = servers.options_parser("token_accounting", __doc__)
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--from", dest="earlier", action="append", type=Path, metavar="FILE")
    parser.add_argument("--history", action="store_true", help="also whole histories to Engram")
    options = parser.parse_args()
    ways = [way for way in WAYS if options.history or way != "history"]
    found: dict[str, Any] = {}
    for path in options.earlier or ():
        found |= json.loads(path.read_text())["families"]
    with servers.workplace() as (folder, _):
        for family in options.family or ([] if options.earlier else FAMILIES):
            found[family] = measure(folder, family, ways)
    found = {family: found[family] for family in FAMILIES if family in found}
    figures = {"machine": servers.machine(), "families": found, "in all": total(found)}
    servers.report(figures, options, table(found))
    return 1 if any(row["failures"] for row in total(found).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
