"""kill -9 of a real server at random instants under load, again and again on one store."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from engram.testing.server import ServerProcess
from engram.testing.storm import Storm
from engram.testing.storm_verdict import Verdict, check_listings, verify

ARGS = (
    *("--enable-snapshot-persistence", "--mamba-scheduler-strategy", "no_buffer"),
    *("--skip-server-warmup", "--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--max-warm-memory-gb", "0.5"),
)
ENVIRONMENT = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
CLIENTS, CONVERSATIONS = 8, 8
SAVES = 10
"""What has been acknowledged before the server is killed, so that there is something to lose."""
LONGEST_LIFE_S = 2.0
"""After those: until when the kill comes is drawn at random, nothing is measured."""
CHECKED_TWICE = 3
END_S = 120.0


@dataclass
class Deaths:
    """What so many rounds have shown."""

    rounds: int = 0
    acknowledged: int = 0
    restored: int = 0
    repeated: int = 0
    listed: int = 0
    largest_difference: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, storm: Storm, verdict: Verdict, listed: int) -> None:
        """One more round."""
        self.rounds += 1
        self.acknowledged += len(storm.acknowledged)
        self.restored += verdict.restored
        self.repeated += verdict.repeated
        self.listed += listed
        self.largest_difference = max(self.largest_difference, verdict.largest_difference)
        self.counts.update(storm.counts)


def kill_again_and_again(server: ServerProcess, rng: random.Random, rounds: int) -> Deaths:
    """So many deaths of a server that is started; it serves again when this returns.

    Each round has conversations of its own on the same store. After each restart every snapshot
    acknowledged in the round restores to the tokens that a cold computation gives, some of them
    twice with equal bits, and every snapshot of any round that is listed restores.
    """
    deaths = Deaths()
    storms: list[Storm] = []
    for number in range(rounds):
        storm = Storm(
            server.url,
            rng,
            clients=CLIENTS,
            conversations=CONVERSATIONS,
            saves=SAVES,
            name=f"storm-{number}",
        )
        clients = threading.Thread(target=storm.run, kwargs={"until_killed": True})
        clients.start()
        assert storm.enough.wait(END_S)
        time.sleep(rng.uniform(0, LONGEST_LIFE_S))
        server.kill()
        clients.join(END_S)
        assert not clients.is_alive()
        server.start()
        storms.append(storm)
        verdict = verify(storm, server.url, repeats=CHECKED_TWICE, replies=False)
        with httpx.Client(base_url=server.url, timeout=END_S) as http:
            listed = sum(check_listings(http, known) for known in storms)
        deaths.add(storm, verdict, listed)
    return deaths
