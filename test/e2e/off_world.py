"""A server without the plug-in's flag, beside SGLang with CPU kernels alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from e2e.helpers import TIMEOUT_S, random_ids, random_text
from e2e.reference import CHUNK
from e2e.worlds import FLOAT32, Stage, World, fresh, start
from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess

# What the plug-in would choose for a machine without an accelerator, said to both servers.
ARGS = (
    "--skip-server-warmup",
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
    *("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    *("--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk"),
    *("--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
)
VARYING = {
    *("id", "created", "e2e_latency", "response_sent_to_client_ts", "request_received_ts"),
    *("queue_time", "inference_time", "decode_throughput", "forward_entry_time"),
    *("prefill_launch_delay", "prefill_launch_latency", "request_sent_to_scheduler_ts"),
    *("prefill_waiting_latency", "prefill_finished_ts", "operationId"),
}
"""Times and ids of one request; FastAPI names operations after one of a set, in no order."""

ONLY_CPU = "cpu_kernels_alone"
SEED = 20


@dataclass(frozen=True)
class Answer:
    """Status and body; a stream is the list of its events."""

    status: int
    body: Any


def requests() -> list[tuple[str, str, Any]]:
    numbers = seeded_random()
    ids = random_ids(numbers, 150)
    greedy = {"temperature": 0, "max_new_tokens": 8}
    chat = {
        "model": "default",
        "messages": [{"role": "user", "content": random_text(numbers, 60)}],
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 3,
    }
    native = {"input_ids": ids, "sampling_params": greedy, "return_logprob": True}
    prompt = {"model": "default", "prompt": random_text(numbers, 50), "max_tokens": 8}
    tag = {"conversation_id": "a-conversation"}
    bad_tag = {"conversation_id": "../x"}
    return [
        ("POST", "/generate", native),
        ("POST", "/generate", native | {"input_ids": [*ids, *random_ids(numbers, 20)]}),
        ("POST", "/generate", native | {"stream": True}),
        ("POST", "/generate", {"text": ["abc", "defg"], "sampling_params": greedy}),
        ("POST", "/generate", native | {"sampling_params": {"temperature": -1}}),
        ("POST", "/generate", native | {"input_ids": [10] * 9000}),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/chat/completions", chat | tag),
        ("POST", "/v1/chat/completions", chat | bad_tag),
        ("POST", "/v1/chat/completions", chat | {"stream": True}),
        ("POST", "/v1/chat/completions", {"model": "default"}),
        ("POST", "/v1/completions", prompt | {"temperature": 0, "logprobs": 2}),
        ("POST", "/v1/completions", prompt | {"temperature": 0} | tag),
        ("GET", "/v1/models", None),
        ("GET", "/model_info", None),
        ("GET", "/openapi.json", None),
        ("POST", "/save_snapshot", {"conversation_id": "a-conversation"}),
        ("POST", "/restore_snapshot", {"conversation_id": "a-conversation"}),
        ("POST", "/list_snapshots", {"conversation_id": "a-conversation"}),
        ("POST", "/flush_cache", None),
        ("POST", "/generate", native),
    ]


def answers(server: ServerProcess, sent: list[tuple[str, str, Any]]) -> list[Answer]:
    found = []
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http:
        for method, path, body in sent:
            response = http.request(method, path, json=body)
            body = comparable(parsed(response))
            streamed = isinstance(body, list) and "[DONE]" in body
            found.append(Answer(response.status_code, folded(body) if streamed else body))
    return found


def parsed(response: httpx.Response) -> Any:
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        return [event if event == "[DONE]" else json.loads(event) for event in events]
    try:
        return response.json()
    except ValueError:
        return response.text


def folded(events: list[Any]) -> list[Any]:
    """A stream however it was cut: how many tokens an event has depends on how busy the machine is.

    Of `/generate`, each of whose events has all so far, the last; of chunks, their texts and
    log-probabilities put together, then each other value they have had.
    """
    chunks = [event for event in events if isinstance(event, dict)]
    if not any("choices" in chunk for chunk in chunks):
        return [*chunks[-1:], *(event for event in events if not isinstance(event, dict))]
    text, logprobs, others = "", [], []
    for event in events:
        for choice in event.get("choices", ()) if isinstance(event, dict) else ():
            text += choice["delta"].pop("content", None) or ""
            logprobs += (choice.pop("logprobs", None) or {}).get("content") or []
        if event not in others:
            others.append(event)
    return [text, logprobs, *others]


def comparable(value: Any) -> Any:
    """The value with what no two requests have in common replaced, but not removed."""
    if isinstance(value, dict):
        return {k: "..." if k in VARYING else comparable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def kernels_alone(folder: Path) -> dict[str, str]:
    """Variables with which SGLang loads Engram's CPU kernels and nothing else of it.

    They are a plug-in of their own here, the only one that SGLang is allowed.
    """
    info = folder / "cpu_kernels_alone-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-kernels-alone\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{ONLY_CPU} = engram.sglang_plugin.cpu:install\n"
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    # The list holds for both kinds of plug-ins; `engram_cpu` is the platform.
    return {"PYTHONPATH": path, "SGLANG_PLUGINS": f"{ONLY_CPU},engram_cpu"}


def off_world(stage: Stage, folder: Path) -> World:
    """The same requests to both servers; the one with the plug-in goes on."""
    folder = fresh(folder)
    sent, model = requests(), stage.model(SEED, dtype="float32")
    alone = stage.server(folder, ARGS, model=model, env=FLOAT32 | kernels_alone(folder / "site"))
    with alone:
        stock = answers(alone, sent)
    # Without the flag there is no store.
    world = start(stage.server(folder, ARGS, model=model, env=FLOAT32), folder / "none")
    world.facts |= {"sent": sent, "stock": stock, "plugin": answers(world.server, sent)}
    return world
