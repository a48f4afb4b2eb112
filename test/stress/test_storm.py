"""200 saves from 16 clients over 40 conversations, kill -9, and every acknowledged snapshot exact.

scripts/test --stress -s
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.storm import Storm
from engram.testing.storm_verdict import verify
from engram.testing.tiny_model import write_tiny_model

CLIENTS, CONVERSATIONS, SAVES = 16, 40, 200
ARGS = (
    *("--enable-snapshot-persistence", "--mamba-scheduler-strategy", "no_buffer"),
    *("--skip-server-warmup", "--max-total-tokens", "16384", "--max-mamba-cache-size", "96"),
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--max-warm-memory-gb", "1.0"),
)


@pytest.mark.timeout(3600)
def test_storm(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", seed=1)
    args = [*ARGS, "--snapshot-dir", str(tmp_path / "snapshots")]
    env = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
    server = ServerProcess(model, args, env, tmp_path / "server.log", timeout=600)
    with server:
        storm = Storm(
            server.url, seeded_random(), clients=CLIENTS, conversations=CONVERSATIONS, saves=SAVES
        )
        begun = time.monotonic()
        storm.run()
        seconds = time.monotonic() - begun
        server.kill()
        server.start()
        verdict = verify(storm, server.url, repeats=SAVES)
    # What `-s` shows: for the report of a run, nothing is measured against it.
    print(f"{seconds:.0f} s", dict(storm.counts), asdict(verdict))  # noqa: T201
    assert verdict.restored == len(storm.acknowledged)
    assert verdict.restored + storm.counts["deletions"] >= SAVES
    assert verdict.replies == len(storm.replies)
    for kind in ("aborts", "restores", "continuations", "async_saves", "left_saves", "deletions"):
        assert storm.counts[kind] > 0, kind
