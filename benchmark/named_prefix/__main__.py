"""Time to first token of new conversations behind a prefix of 8k tokens, named and not.

Usage, at the root of a checkout:

    python -m benchmark.named_prefix [--json] [--out FILE] [--conversations N] [--tokens N]

One server; each conversation is new and says one short thing after a long system prompt. Three
kinds take turns, in another order each time:

    named     the system prompt was named with POST /v1/prefixes
    shared    another one of the same length that nobody named: SGLang's own cache may have it
    alone     as if nobody had said it before (a cache_salt of its own)

Then the server is killed (SIGKILL) and started again, and as many new conversations of each kind
begin; the shared prompt is another one then. Times are from sending the request to its first token,
at the client; the cached tokens are beside them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
from benchmark import servers
from benchmark.named_prefix.report import table

from engram.testing.chat import NEVER_END
from engram.testing.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
KINDS = ("named", "shared", "alone")
PHASES = ("before", "after")
NAME = "manual"
ON = ("--enable-snapshot-persistence", "--snapshot-trigger-policy", "manual_only")
ROOM = ("--max-total-tokens", "65536", "--max-mamba-cache-size", "128")


@dataclass(frozen=True)
class First:
    """One conversation's first reply: seconds to its first token, tokens of its prompt."""

    seconds: float
    prompt: int
    cached: int


def document(number: int, tokens: int) -> str:
    """A system prompt: that many characters of this repository's documents, one token each."""
    paths = sorted((ROOT / "docs").glob("*.md"))
    text = "".join(path.read_text() for path in paths[number:] + paths[:number])
    plain = "".join(one for one in text if one == "\n" or " " <= one <= "~")
    if len(plain) < tokens:
        raise ValueError(f"the documents have {len(plain)} characters")
    return plain[:tokens]


def ask(http: httpx.Client, system: str, name: str, message: str, **fields: Any) -> First:
    """Begin a conversation."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": message}]
    body = {
        "model": "default",
        "messages": messages,
        "conversation_id": name,
        "temperature": 0,
        "max_tokens": 4,
        "logit_bias": NEVER_END,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    first, usage = None, None
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    begun = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", content=data, headers=headers) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if first is None and any(one["delta"].get("content") for one in chunk["choices"]):
                first = time.perf_counter() - begun
            usage = chunk.get("usage") or usage
    assert first is not None
    assert usage is not None
    return First(first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


def phase(url: str, name: str, prompts: dict[str, str], count: int) -> dict[str, list[First]]:
    """So many conversations of each kind, taking turns."""
    found: dict[str, list[First]] = {kind: [] for kind in KINDS}
    with httpx.Client(base_url=url, timeout=600) as http:
        ask(http, "warm up", f"{name}-warm", "hello")
        for number in range(count):
            turn = number % len(KINDS)
            for kind in (*KINDS[turn:], *KINDS[:turn]):
                alone = {"cache_salt": f"{name}-{number}"} if kind == "alone" else {}
                one = f"{name}-{kind}-{number}"
                found[kind].append(ask(http, prompts[kind], one, f"Question {number}?", **alone))
    return found


def measure(folder: Path, tokens: int, count: int) -> dict[str, Any]:
    """Phase -> kind -> figures."""
    model = write_tiny_model(folder / "long-model", seed=1, dtype="bfloat16", max_length=2 * tokens)
    named = document(0, tokens)
    args = (*ROOM, *ON, "--snapshot-dir", str(folder / "snapshots"))
    found: dict[str, Any] = {}
    with servers.server(folder, model, args) as server:
        messages = [{"role": "system", "content": named}]
        with httpx.Client(base_url=server.url, timeout=600) as http:
            made = http.post("/v1/prefixes", json={"name": NAME, "messages": messages})
            made.raise_for_status()
        for number, name in enumerate(PHASES):
            print(f"{name} the restart", file=sys.stderr, flush=True)
            prompts = {
                "named": named,
                "shared": document(number + 5, tokens),
                "alone": document(number + 10, tokens),
            }
            found[name] = {
                kind: _figures(firsts)
                for kind, firsts in phase(server.url, name, prompts, count).items()
            }
            server.kill()
            if name != PHASES[-1]:
                server.start()
    return {"prefix_tokens": made.json()["token_count"], "phases": found}


def _figures(firsts: Sequence[First]) -> dict[str, Any]:
    return {
        **servers.percentiles([one.seconds for one in firsts]),
        "prompt_tokens": statistics.median(one.prompt for one in firsts),
        "cached_tokens": statistics.median(one.cached for one in firsts),
        "least_cached": min(one.cached for one in firsts),
    }


def main() -> int:
    parser = servers.options_parser("named_prefix", __doc__)
    parser.add_argument("--conversations", type=int, default=20, help="of each kind, each time")
    parser.add_argument("--tokens", type=int, default=8192, help="of a system prompt")
    options = parser.parse_args()
    with servers.workplace() as (folder, _):
        found = measure(folder, options.tokens, options.conversations)
    figures = {"machine": servers.machine(), "conversations": options.conversations, **found}
    servers.report(figures, options, table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
