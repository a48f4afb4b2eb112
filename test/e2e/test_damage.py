"""Damage to every file a snapshot has: the request succeeds, the restore says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.battered_world import OTHER_SETTINGS, WOUNDS, Wound, health, of_setting, wound_file
from e2e.helpers import assert_close, assert_quarantined
from e2e.worlds import Case, World

TOLERANCE = 1e-3


def by_name(wound: Wound) -> str:
    return wound.conversation


def wounded(world: World, wound: Wound) -> tuple[Case, Path, int]:
    """The conversation, the damaged file's place, and how many tokens stand on intact files."""
    case = world.cases[wound.conversation]
    if wound.when == "running":
        wound_file(world, wound)
    path, intact = world.facts[wound.conversation]
    return case, path, intact


def next_turn_is_right(world: World, case: Case, cached: int) -> None:
    reply = case.talk.peek(world.client, case.message)
    assert reply.cached == cached
    assert_close(reply, case.reference, TOLERANCE)


def restore_is_refused(world: World, case: Case, path: Path) -> dict[str, Any]:
    refused = world.client.refused("/restore_snapshot", {"conversation_id": case.name}, 409)
    assert refused["error"] == "snapshot_corrupt"
    assert path.stem in refused["message"]
    assert refused["details"]["file"] == str(path)
    assert "backup" in refused["hint"]
    return refused


@pytest.mark.parametrize("wound", [w for w in WOUNDS if w.file != "manifest"], ids=by_name)
def test_damaged_segment(battered: World, wound: Wound) -> None:
    """Before the start the request is first to meet it, while running the restore is."""
    case, path, intact = wounded(battered, wound)
    if wound.when == "before":
        next_turn_is_right(battered, case, intact)
        restore_is_refused(battered, case, path)
    else:
        restore_is_refused(battered, case, path)
        next_turn_is_right(battered, case, intact)
    if wound.damage == "deleted":
        assert not path.exists()
    else:
        assert_quarantined(battered.store, path.name)
    # Listed as what it is; and what is saved from now on stands on intact files.
    client = battered.client
    assert client.snapshots(case.name)[-1]["damaged"]
    again = client.refused("/save_snapshot", {"conversation_id": case.name, "turn_number": 2}, 409)
    assert again["error"] == "snapshot_corrupt"
    case.talk.say(client, case.message, case.name)
    saved = client.save(conversation_id=case.name)
    client.flush()
    restored = client.restore(conversation_id=case.name)
    assert (restored["token_count"], restored["verified"]) == (saved["token_count"], True)


@pytest.mark.parametrize("wound", [w for w in WOUNDS if w.file == "manifest"], ids=by_name)
def test_damaged_manifest(battered: World, wound: Wound) -> None:
    case, path, _ = wounded(battered, wound)
    client = battered.client
    if (wound.damage, wound.when) == ("deleted", "before"):
        # A snapshot exists exactly when its manifest does.
        client.refused("/restore_snapshot", {"conversation_id": case.name}, 404)
        next_turn_is_right(battered, case, 0)
        return
    restore_is_refused(battered, case, path)
    if wound.damage != "deleted":
        assert_quarantined(battered.store, path.name)
    # Its segments are whole and its turn is known.
    next_turn_is_right(battered, case, case.saved["token_count"])
    assert client.snapshots(case.name)[-1]["damaged"]
    assert client.delete(conversation_id=case.name)["snapshot_id"] == case.saved["snapshot_id"]
    client.refused("/restore_snapshot", {"conversation_id": case.name}, 404)


def test_start_tells_what_it_healed(battered: World) -> None:
    """The marker was cut, and the manifests that show it were read and moved aside."""
    found = battered.facts["health"]
    assert found["store"]["marker_rebuilt"] is True
    assert found["catalog"]["rebuilt_because"] is None
    assert found["catalog"]["removed"] == 1
    assert found["catalog"]["refreshed"] == len(OTHER_SETTINGS)
    shown = {w for w in WOUNDS if w.file == "manifest" and w.when == "before"}
    # A file that keeps its time is not read at the start, one that is gone is no damage.
    noticed = [w for w in shown if w.damage not in ("rotted", "deleted")]
    assert len(found["catalog"]["damaged"]) == len(noticed)
    assert found["store"]["quarantined"] == len(noticed) + 1, "the marker is there too"
    log = battered.server.log_path.read_text()
    assert "the marker of the snapshot store was damaged" in log


def test_damage_is_counted(battered: World) -> None:
    case = battered.cases[Wound("state", "flipped", "running").conversation]
    before = health(battered)
    place = {"conversation_id": case.name, "turn_number": 2}
    missing = battered.client.refused("/restore_snapshot", place, 409)
    assert missing["error"] == "snapshot_corrupt"
    after = health(battered)
    assert after["service"]["corrupt"] == before["service"]["corrupt"] + 1
    assert after["service"]["restore_failures"] == before["service"]["restore_failures"] + 1


# ---- other settings ----


@pytest.mark.parametrize("field", OTHER_SETTINGS)
def test_state_made_under_another_setting_is_refused_by_name(battered: World, field: str) -> None:
    case = battered.cases[of_setting(field)]
    before = health(battered)
    refused = battered.client.refused("/restore_snapshot", {"conversation_id": case.name}, 409)
    assert refused["error"] == "namespace_mismatch"
    assert refused["details"]["field"] == field
    assert refused["details"]["found"] == OTHER_SETTINGS[field]
    for value in (refused["details"]["wanted"], refused["details"]["found"]):
        assert repr(value) in refused["message"]
    assert [name for name, *_ in refused["details"]["differences"]] == [field]
    for tag in (None, case.name):
        reply = case.talk.peek(battered.client, case.message, tag)
        assert_close(reply, case.reference, TOLERANCE)
        if tag is None:
            assert reply.cached == 0
    after = health(battered)
    for counter in ("promoted_segments", "loads", "corrupt"):
        assert after["ranks"][0][counter] == before["ranks"][0][counter]


def test_a_namespace_whose_description_is_lost_is_refused_all_the_same(battered: World) -> None:
    case = battered.cases[of_setting("page_size")]
    namespace = battered.client.snapshots(case.name)[-1]["namespace"]
    path = battered.store / "namespaces" / f"{namespace}.json"
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(2):
        refused = battered.client.refused("/restore_snapshot", {"conversation_id": case.name}, 409)
        assert refused["error"] == "namespace_mismatch"
        assert refused["details"]["field"] == "namespace"
        assert refused["details"]["found"] == namespace
    assert_quarantined(battered.store, path.name)
