"""What the tiers say they hold, pins in VRAM, what is changed of snapshots: on a real server."""

from __future__ import annotations

from typing import Any

from e2e.helpers import random_ids
from e2e.small_world import OUT_OF_VRAM, flood
from e2e.worlds import World
from engram.testing.samples import seeded_random


def tiers(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.client.http.get("/v1/memory/tiers").json()["tiers"]
    return found


def test_a_pinned_conversation_stays_in_vram_and_others_do_not(small: World) -> None:
    client, numbers = small.client, seeded_random()
    history: dict[str, list[int]] = {}
    for name in ("pinned", "loose"):
        prompt = random_ids(numbers, 60)
        history[name] = [*prompt, *client.generate(prompt, 8, name).tokens]
        client.save(conversation_id=name)
    pin = client.ok("/v1/memory/pin", {"conversation_id": "pinned"})
    assert pin["resident"] is True
    flood(client, numbers, OUT_OF_VRAM * 2)
    assert client.info(conversation_id="pinned")["tier"] == "vram"
    assert client.info(conversation_id="loose")["tier"] != "vram"
    before = tiers(small)["vram"]
    assert before["pinned_bytes"] > 0
    assert [one["conversation_id"] for one in before["pins"] if one["resident"]] == ["pinned"]
    # The pin moves to the end of the next turn.
    prompt = [*history["pinned"], *random_ids(numbers, 20)]
    reply = client.generate(prompt, 8, "pinned")
    assert reply.cached == 67
    flood(client, numbers, OUT_OF_VRAM * 2)
    after = tiers(small)["vram"]
    assert after["pinned_bytes"] > before["pinned_bytes"]
    refused = client.refused("/v1/memory/pin", {"conversation_id": "unknown"}, 404)
    assert refused["error"] == "not_found"
    assert client.ok("/v1/memory/unpin", {"conversation_id": "pinned"})["unpinned"] is True
    assert tiers(small)["vram"]["pinned_bytes"] == 0


def test_the_tiers_tell_what_is_there(small: World) -> None:
    client, numbers = small.client, seeded_random()
    flood(client, numbers, OUT_OF_VRAM)
    found = tiers(small)
    files = list((small.store / "segments").rglob("*.seg"))
    assert found["disk"]["segments"] == len(files)
    assert found["disk"]["bytes"] == sum(path.stat().st_size for path in files)
    health = client.http.get("/v1/memory/health").json()
    assert found["ram"]["bytes"] == sum(rank["ram_bytes"] for rank in health["ranks"])
    assert 0 < found["ram"]["bytes"] <= found["ram"]["capacity_bytes"] == 8_000_000
    assert 0 < found["vram"]["bytes"] <= found["vram"]["capacity_bytes"]
    client.flush()
    assert tiers(small)["vram"]["bytes"] == 0


def test_promoted_and_demoted_by_request(small: World) -> None:
    client, numbers = small.client, seeded_random()
    prompt = random_ids(numbers, 40)
    client.generate(prompt, 8, "moved")
    saved = client.save(conversation_id="moved")
    client.flush()
    left = client.ok("/v1/memory/demote", {"conversation_id": "moved"})
    assert left["bytes"] > 0
    assert client.info(conversation_id="moved")["tier"] == "disk"
    brought = client.ok("/v1/memory/promote", {"snapshot_id": saved["snapshot_id"]})
    assert (brought["source_tier"], brought["tier"]) == ("disk", "ram")
    assert client.info(conversation_id="moved")["tier"] == "ram"
    assert client.ok("/v1/memory/demote", {"snapshot_id": saved["snapshot_id"]})["bytes"] > 0


def test_a_snapshot_and_a_conversation_are_changed(small: World) -> None:
    client, numbers = small.client, seeded_random()
    client.generate(random_ids(numbers, 40), 8, "changed", conversation_priority=70)
    saved = client.save(conversation_id="changed")
    path = f"/v1/snapshots/{saved['snapshot_id']}"
    reply = client.http.patch(path, json={"pinned": True, "user_metadata": {"a": [1]}}).json()
    assert reply["success"] is True, reply
    info = client.info(conversation_id="changed")
    assert (info["pinned"], info["user_metadata"]) == (True, {"a": [1]})
    for priority, status in ((80, 200), (101, 422)):
        answer = client.http.patch("/v1/conversations/changed", json={"priority": priority})
        assert answer.status_code == status
    body = {"input_ids": [65, 66], "conversation_id": "changed", "conversation_priority": "high"}
    refused = client.refused("/generate", body, 422)
    assert refused["details"]["field"] == "conversation_priority"
