"""Streams whose clients go away: nothing is mixed up, nothing stays behind.

`scripts/test --stress` does the same with 64 conversations.
"""

from __future__ import annotations

import psutil

from e2e.helpers import until
from e2e.pressured_world import nothing_is_held, rank, scheduler_of
from e2e.worlds import World
from engram.testing.samples import seeded_random
from engram.testing.streaming_crowd import StreamingCrowd

CONVERSATIONS, TURNS = 12, 2


def test_streams_that_are_left_mix_up_nothing_and_leave_nothing(battered: World) -> None:
    before, scheduler = rank(battered), scheduler_of(battered)
    crowd = StreamingCrowd(battered.server.url, seeded_random(), CONVERSATIONS, "streams")
    crowd.run(TURNS)
    assert crowd.counts["turns"] == CONVERSATIONS * TURNS
    assert crowd.counts["left"] > 0
    verdict = crowd.verify()
    assert (verdict.replies, verdict.next_turns) == (CONVERSATIONS * TURNS, CONVERSATIONS)
    # Idle, SGLang compares its pools with its tree, and ends at a slot that neither has.
    until(lambda: nothing_is_held(battered), "something is held although nothing runs")
    battered.client.flush()
    after = rank(battered)
    assert after["contained_errors"] == before["contained_errors"]
    vram = battered.client.http.get("/v1/memory/tiers").json()["tiers"]["vram"]
    assert (vram["tokens"], vram["states"]) == (0, 0)
    assert psutil.pid_exists(scheduler.pid)
