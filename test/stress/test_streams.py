"""64 conversations that stream at once, whose clients go away in the middle of replies.

scripts/test --stress -s
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.streaming_crowd import StreamingCrowd
from engram.testing.tiny_model import write_tiny_model

CONVERSATIONS, TURNS, ROUNDS = 64, 2, 3
CAPACITY = 32768
ARGS = (
    *("--enable-snapshot-persistence", "--mamba-scheduler-strategy", "no_buffer"),
    *("--skip-server-warmup", "--max-total-tokens", str(CAPACITY)),
    *("--max-mamba-cache-size", "320", "--max-running-requests", "64"),
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--max-warm-memory-gb", "0.05"),
)
"""The RAM tier is so small that it is full after the first round: what grows then is a leak."""
MEBIBYTE = 1 << 20
GROWTH = 64 * MEBIBYTE
"""Most that all processes of the server together may grow by in the last round."""


def figures(server: ServerProcess) -> dict[str, Any]:
    """What is held, and the resident memory of all processes of the server, at rest and flushed."""
    with httpx.Client(base_url=server.url, timeout=120) as http:
        http.post("/flush_cache", params={"timeout": 30}).raise_for_status()
        [rank] = http.get("/v1/memory/health").json()["ranks"]
        vram = http.get("/v1/memory/tiers").json()["tiers"]["vram"]
    assert server.process is not None
    leader = psutil.Process(server.process.pid)
    processes = [leader, *leader.children(recursive=True)]
    names = ("leases", "tree_locks", "ram_held_bytes", "ram_bytes", "contained_errors", "corrupt")
    return {
        **{name: rank[name] for name in names},
        "tree_tokens": vram["tokens"],
        "tree_states": vram["states"],
        "resident_mib": round(sum(p.memory_info().rss for p in processes) / MEBIBYTE, 1),
        "processes": len(processes),
    }


def whole_pool_is_free(server: ServerProcess) -> None:
    """A prompt that needs nearly every slot of the pool is answered."""
    ids = seeded_random().choices(range(6, 104), k=8000)
    body = {
        "input_ids": [ids] * (CAPACITY // len(ids)),
        "extra_key": [str(number) for number in range(CAPACITY // len(ids))],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
    }
    response = httpx.post(f"{server.url}/generate", json=body, timeout=600)
    assert response.status_code == 200, response.text
    assert [one["meta_info"]["cached_tokens"] for one in response.json()] == [0] * len(
        body["input_ids"]
    )


@pytest.mark.timeout(3600)
def test_64_streams_with_disconnects(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", seed=1)
    args = [*ARGS, "--snapshot-dir", str(tmp_path / "snapshots")]
    env = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
    numbers = seeded_random()
    with ServerProcess(model, args, env, tmp_path / "server.log", timeout=600) as server:
        told: list[dict[str, Any]] = [{"before": figures(server)}]
        for number in range(ROUNDS):
            crowd = StreamingCrowd(server.url, numbers, CONVERSATIONS, f"round{number}")
            crowd.run(TURNS)
            assert crowd.counts["turns"] == CONVERSATIONS * TURNS
            assert crowd.counts["left"] > CONVERSATIONS // 2
            verdict = crowd.verify()
            told.append({"counts": crowd.counts, **asdict(verdict), "after": figures(server)})
        # What `-s` shows: for the report of a run.
        print(json.dumps(told, indent=1))  # noqa: T201
        whole_pool_is_free(server)
        last = figures(server)
    for one in (told[0]["before"], *(round_["after"] for round_ in told[1:]), last):
        assert (one["leases"], one["tree_locks"], one["ram_held_bytes"]) == (0, 0, 0)
        assert (one["tree_tokens"], one["tree_states"]) == (0, 0)
        assert (one["contained_errors"], one["corrupt"]) == (0, 0)
        assert one["processes"] == told[0]["before"]["processes"]
    resident = [round_["after"]["resident_mib"] for round_ in told[1:]]
    assert (resident[-1] - resident[1]) * MEBIBYTE < GROWTH, resident
