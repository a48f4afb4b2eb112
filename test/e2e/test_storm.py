"""Many clients at once, cut off by a kill of the server or of its scheduler: what was acknowledged
is there."""

from __future__ import annotations

from e2e.battered_world import KILLS, SAVES
from e2e.worlds import World
from engram.testing.storm import Storm
from engram.testing.storm_verdict import verify
from faults.serving import SAVES as SAVES_BEFORE_A_KILL
from faults.serving import Deaths


def test_what_was_acknowledged_in_the_storm_is_restored_exact(battered: World) -> None:
    storm: Storm = battered.facts["storm"]
    verdict = verify(storm, battered.client.url)
    assert verdict.restored == len(storm.acknowledged) > 0
    assert verdict.replies == len(storm.replies) > 0
    assert verdict.repeated > 0
    assert storm.counts["saves"] >= SAVES


def test_kills_of_the_whole_server_lose_nothing_acknowledged(battered: World) -> None:
    """Each was followed by a start, at which every snapshot that is listed was restored, exact."""
    deaths: Deaths = battered.facts["deaths"]
    assert deaths.rounds == KILLS
    assert deaths.restored == deaths.acknowledged > 0
    assert deaths.counts["saves"] >= KILLS * SAVES_BEFORE_A_KILL
    assert deaths.listed >= deaths.acknowledged
    assert deaths.repeated > 0
    assert deaths.counts["cut_off"] > 0


def test_every_kind_of_action_took_part(battered: World) -> None:
    counts = battered.facts["storm"].counts
    assert {"turns", "saves", "restores", "aborts"} <= {what for what, n in counts.items() if n}


def test_sglang_ends_the_server_with_its_scheduler(battered: World) -> None:
    """No client is left waiting: those under way were told by an error."""
    assert battered.facts["ended"]
    assert battered.facts["storm"].counts["cut_off"] > 0
