"""kill -9 at random instants of a server without a model, again and again on one store."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import IO, Any

import torch

from faults.ledger import BrokenPromiseError, Ledger, check_after_restart, sweep
from repository import ROOT

LONGEST_LIFE_S = 0.5
"""A server is killed within this time of serving, drawn at random; nothing is measured."""
SWEEP_EVERY = 10


@dataclass
class Deaths:
    """What so many rounds have shown."""

    rounds: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    restored: int = 0
    swept: int = 0
    events: Counter[str] = field(default_factory=Counter)


class Nursery:
    """The process that forks servers (`faults.nursery`)."""

    def __enter__(self) -> Nursery:
        path = os.pathsep.join(
            [str(ROOT / "test"), str(ROOT / "python"), str(ROOT / "scripts/lib")]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in: IO[bytes] = self._process.stdin
        self._out = self._process.stdout.fileno()
        self._buffer = b""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def live_and_die(
        self, root: Path, seed: int, name: str, ledger: Ledger, life: float
    ) -> list[dict[str, Any]]:
        """Start a server, kill it `life` seconds after it serves; all that it said."""
        known = {snapshot_id: promise.tokens for snapshot_id, promise in ledger.promises.items()}
        order = {"root": str(root), "seed": seed, "name": name, "known": known}
        self._in.write(json.dumps(order).encode() + b"\n")
        self._in.flush()
        pid = self._next(60)["pid"]
        said: list[dict[str, Any]] = []
        deadline: float | None = None
        while True:
            left = 60.0 if deadline is None else max(0.0, deadline - time.monotonic())
            event = self._next(left, or_none=deadline is not None)
            if not event:
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 60
                continue
            if "failed" in event:
                raise BrokenPromiseError(event["failed"])
            if "ended" in event:
                assert event["ended"] == signal.SIGKILL
                return said
            if "serving" in event:
                deadline = time.monotonic() + life
            else:
                said.append(event)

    def _next(self, seconds: float, *, or_none: bool = False) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], seconds)
            if not ready:
                assert or_none, "the server says nothing"
                return {}
            read = os.read(self._out, 1 << 16)
            assert read, "the nursery has ended"
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found


def kill_again_and_again(root: Path, rng: Random, rounds: int) -> Deaths:
    """So many deaths of a server on one store, each followed by a full check of what it left."""
    deaths = Deaths()
    ledger = Ledger()
    with Nursery() as nursery:
        for number in range(rounds):
            life = rng.uniform(0, LONGEST_LIFE_S)
            said = nursery.live_and_die(root, rng.getrandbits(32), str(number), ledger, life)
            for event in said:
                ledger.record(event)
                deaths.events[event["event"]] += 1
            deaths.acknowledged += sum(p.must_be_there for p in ledger.promises.values())
            deaths.unanswered += sum(
                p.deleting > p.deleted or not p.saved for p in ledger.promises.values()
            )
            deaths.restored += check_after_restart(root, ledger)
            deaths.rounds += 1
            if number % SWEEP_EVERY == SWEEP_EVERY - 1:
                deaths.swept += sweep(root)
    return deaths
