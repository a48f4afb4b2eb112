"""States that have left VRAM, or memory, and states that end inside another's path."""

from __future__ import annotations

from e2e.helpers import Reply, assert_close, assert_quarantined
from e2e.small_world import SHARED_PROMPT, SHORT
from e2e.worlds import World
from engram.store.disk import DiskStore
from engram.testing.tamper import flip_byte, read_manifest


def restored_next_turn(world: World, name: str) -> Reply:
    case = world.cases[name]
    restored = world.client.restore(conversation_id=name)
    assert restored["token_count"] == case.saved["token_count"]
    reply = case.talk.peek(world.client, case.message)
    assert reply.cached == case.saved["token_count"]
    return reply


def test_saved_and_restored_from_ram_after_vram_forgot_it(small: World) -> None:
    case, facts = small.cases["evicted"], small.facts
    assert case.saved["recomputed"] is False
    assert facts["evicted tier"] == "ram"
    assert facts["evicted restore"]["source_tier"] == "ram"
    assert facts["evicted restore"]["verified"] is True
    again: Reply = facts["evicted from ram"]
    assert again.cached == case.reference.cached == case.saved["token_count"]
    assert again.output == case.reference.output


def test_restored_from_disk_after_vram_forgot_it(small: World) -> None:
    assert restored_next_turn(small, "evicted").output == small.cases["evicted"].reference.output


def test_state_that_is_gone_everywhere_is_computed_again(small: World) -> None:
    saved = small.cases["lost"].saved
    assert saved["recomputed"] is True
    assert "again" in saved["message"]
    assert saved["turn_number"] == 2
    reply = restored_next_turn(small, "lost")
    assert reply.output == small.cases["lost"].reference.output


def test_turn_that_ends_inside_another_path_survives(small: World) -> None:
    """Its last token's key and value are the longer reply's on the server that never stopped."""
    case = small.cases["short"]
    assert case.saved["token_count"] == SHARED_PROMPT + SHORT - 1
    first = restored_next_turn(small, "short")
    assert_close(first, case.reference, 1e-3)
    small.client.flush()
    second = restored_next_turn(small, "short")
    assert second.output == first.output


def test_a_prefix_that_was_read_from_disk_is_not_stored_again(small: World) -> None:
    """Saved before the restart, read after it: who begins alike and parts names the same file."""
    case, client = small.cases["short"], small.client
    [whole, _] = read_manifest(small.store, case.saved["snapshot_id"]).segments[0]
    client.restore(conversation_id="short")
    before = stored_bytes(small)
    client.generate(case.talk.history[:SHARED_PROMPT], SHORT // 2, "shorter")
    saved = client.save(conversation_id="shorter")
    [part, state] = read_manifest(small.store, saved["snapshot_id"]).segments[0]
    assert (part.segment_id, part.bytes) == (whole.segment_id, whole.bytes)
    assert part.end == saved["token_count"] < whole.end
    assert saved["unique_bytes"] == state.bytes == stored_bytes(small) - before
    # It is read from the beginning of a longer file.
    small.client.flush()
    assert client.restore(conversation_id="shorter")["token_count"] == part.end


def stored_bytes(world: World) -> int:
    """Bytes of all segments on disk."""
    with DiskStore.open(world.store, lock=False) as store:
        return sum(segment.bytes for segment in store.iter_segments())


def test_an_earlier_state_is_used_when_a_later_one_is_damaged(small: World) -> None:
    case = small.cases["flipped"]
    manifest = read_manifest(small.store, case.saved["snapshot_id"])
    intact = manifest.segments[0][0].end
    damaged = flip_byte(small.store, manifest, "ssm.3", offset=5)
    reply = case.talk.peek(small.client, case.message)
    assert reply.cached == intact
    assert_close(reply, case.reference, 1e-3)
    assert_quarantined(small.store, damaged.name)
