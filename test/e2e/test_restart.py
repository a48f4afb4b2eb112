"""Save, kill -9, restart: the next turn is the one that a server that never stopped gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.helpers import assert_quarantined, random_ids
from e2e.talks import KeyedTalk
from e2e.worlds import CONTRACT, INTERLEAVED, KEYED, TURNS, Stage, World, fresh, next_turn_is_exact
from engram import EngramClient
from engram.errors import NotFoundError
from engram.snapshot.manifest import Manifest
from engram.store.disk import DiskStore
from engram.testing.samples import seeded_random
from engram.testing.server import ServerError
from engram.testing.tamper import flip_byte, read_manifest

RESTORED = ["generate", "chat", "completion"]
ONLY_TAGGED = ["generate-without-restore", "stream"]
UNTAGGED = ["generate-untagged", "chat-untagged", "adopted", *INTERLEAVED, "unaltered"]


@pytest.mark.parametrize("name", RESTORED)
def test_restored_turn_is_exact(restarted: World, name: str) -> None:
    case = restarted.cases[name]
    reply = restarted.client.restore(conversation_id=name)
    assert reply["token_count"] == case.saved["token_count"]
    assert reply["recompute_tokens"] == case.saved["recompute_tokens"]
    assert reply["snapshot_id"] == case.saved["snapshot_id"]
    assert reply["turn_number"] == TURNS
    assert reply["verified"] is True
    assert (reply["source_tier"], reply["tier"]) == ("disk", "ram")
    assert reply["bytes"] == case.saved["bytes"]
    assert reply["rid"] is reply["mamba_pool_idx"] is reply["output_ids"] is None
    next_turn_is_exact(restarted, case, name)


@pytest.mark.parametrize("name", ONLY_TAGGED)
def test_tagged_turn_finds_its_conversation_by_itself(restarted: World, name: str) -> None:
    next_turn_is_exact(restarted, restarted.cases[name], name)


@pytest.mark.parametrize("name", UNTAGGED)
def test_same_tokens_find_the_state_without_any_id(restarted: World, name: str) -> None:
    next_turn_is_exact(restarted, restarted.cases[name], None)


@pytest.mark.parametrize("name", KEYED)
def test_what_is_kept_under_a_key_is_found_under_it_alone(restarted: World, name: str) -> None:
    """Neither from disk nor, once it was restored, from RAM, nor then from VRAM."""
    client, case = restarted.client, restarted.cases[name]
    talk = case.talk
    assert isinstance(talk, KeyedTalk)
    others = [{}, *(fields for other, fields in KEYED.items() if other != name)]
    others += [{field: f"{value}s"} for field, value in KEYED[name].items()]
    # A key that reads the same as two others do one after another.
    others.append({"extra_key": "mine", "cache_salt": "mine"})

    def nobody_else_has_it() -> None:
        for fields in others:
            reply = talk.under(**fields).peek(client, case.message, f"{name}-elsewhere")
            assert reply.cached == 0, fields
        client.flush()

    nobody_else_has_it()
    client.restore(conversation_id=name)
    nobody_else_has_it()
    next_turn_is_exact(restarted, case, name)
    reply = talk.under().peek(client, case.message)
    assert reply.cached == 0


def test_server_goes_on_counting_turns(restarted: World) -> None:
    case = restarted.cases["generate-without-restore"]
    reply = case.talk.peek(restarted.client, case.message, case.name)
    saved = restarted.client.save(rid=reply.rid)
    assert saved["turn_number"] > TURNS
    metadata = restarted.client.info(conversation_id=case.name, turn_number=TURNS + 1)
    assert metadata["parent_snapshot"] == case.saved["snapshot_id"]
    assert metadata["fill_ids"][: len(case.talk.history)] == case.talk.history


def test_a_file_brings_back_what_was_deleted(restarted: World, tmp_path: Path) -> None:
    case, file = restarted.cases["travelling"], tmp_path / "travelling.engram"
    with EngramClient(restarted.server.url) as client:
        written = client.export_snapshot(case.saved["snapshot_id"], file)
        assert written.bytes == file.stat().st_size
        assert client.delete_conversation(case.name).snapshots > 0
        with pytest.raises(NotFoundError):
            client.restore(case.name)
        taken = client.import_snapshots(file, conversation_id="arrived")
        assert taken.new_bytes == taken.bytes > 0
        restored = client.conversation("arrived").restore()
    assert (restored.source_tier, restored.verified) == ("disk", True)
    assert restored.token_count == case.saved["token_count"]
    next_turn_is_exact(restarted, case, "arrived")


def test_restore_needs_no_directory_afterwards(restarted: World) -> None:
    case = restarted.cases["renamed"]
    restarted.client.restore(conversation_id=case.name)
    away = restarted.store.with_name("away")
    restarted.store.rename(away)
    try:
        next_turn_is_exact(restarted, case, None)
    finally:
        away.rename(restarted.store)


def test_an_altered_state_is_what_the_next_turn_computes_with(restarted: World) -> None:
    """The digests are right, so it is served; that `unaltered` is exact then means something."""
    case = restarted.cases["altered"]
    restarted.client.restore(conversation_id=case.name)
    reply = case.talk.peek(restarted.client, case.message)
    assert reply.cached == case.saved["token_count"]
    assert reply.output.logprobs != case.reference.output.logprobs


def test_a_flipped_byte_costs_the_hit_and_nothing_else(restarted: World) -> None:
    case = restarted.cases["flipped"]
    client = restarted.client
    manifest = read_manifest(restarted.store, case.saved["snapshot_id"])
    damaged = flip_byte(restarted.store, manifest, "k.1", segment=0, offset=100)
    reply = case.talk.peek(client, case.message)
    assert reply.cached == 0
    # The same tokens under another key share nothing with them: computed from the first one on.
    prompt = [*case.talk.history, *case.message]
    cold = client.generate(prompt, len(reply.tokens), extra_key="cold")
    assert cold.cached == 0
    assert reply.output == cold.output
    assert_quarantined(restarted.store, damaged.name)
    refused = client.refused("/restore_snapshot", {"conversation_id": case.name}, 409)
    assert refused["error"] == "snapshot_corrupt"
    assert damaged.stem in refused["message"]


def test_restore_refuses_a_flipped_byte(restarted: World) -> None:
    case = restarted.cases["flipped-restore"]
    client = restarted.client
    manifest = read_manifest(restarted.store, case.saved["snapshot_id"])
    damaged = flip_byte(restarted.store, manifest, "ssm.5", offset=1)
    refused = client.refused("/restore_snapshot", {"conversation_id": case.name}, 409)
    assert refused["error"] == "snapshot_corrupt"
    assert damaged.stem in refused["message"]
    assert refused["hint"]
    assert_quarantined(restarted.store, damaged.name)
    # Serving goes on, and nobody else's snapshot has suffered.
    assert client.restore(conversation_id="unaltered")["verified"] is True


def test_untagged_requests_are_not_written_by_a_trigger(restarted: World) -> None:
    """`every_turn` is the policy: what it wrote is named by conversations, and nothing else is."""
    with DiskStore.open(restarted.facts["copy"], lock=False) as store:
        manifests = [m for m in store.iter_manifests() if isinstance(m, Manifest)]
        stored = {segment.segment_id for segment in store.iter_segments()}
    asked_for = {*restarted.cases, "prefix:guide"}
    assert {m.conversation_id for m in manifests} == asked_for
    assert restarted.facts["never"] not in {m.rid for m in manifests}
    assert stored == {ref.segment_id for m in manifests for ref in m.segments[0]}
    automatic = [m for m in manifests if m.conversation_id == "generate" and m.turn_number == 1]
    assert [m.durability for m in automatic] == ["async"]
    never = {"rid": restarted.facts["never"]}
    assert restarted.client.refused("/restore_snapshot", never, 404)["error"] == "not_found"


def test_acknowledged_id_is_the_snapshots(restarted: World) -> None:
    """An automatic save of the same turn is under way when the asynchronous one is asked for."""
    client, numbers = restarted.client, seeded_random()
    for turn in range(1, 4):
        client.generate(random_ids(numbers, 30), 4, "promised")
        promised = client.save(conversation_id="promised", turn_number=turn, durability="async")
        durable = client.save(conversation_id="promised", turn_number=turn)
        assert durable["snapshot_id"] == promised["snapshot_id"]
        assert durable["durability"] == "sync"
        metadata = client.info(conversation_id="promised", turn_number=turn)
        assert metadata["snapshot_id"] == promised["snapshot_id"]


def test_a_damaged_catalog_is_rebuilt_and_told(restarted: World) -> None:
    found = restarted.facts["health"]
    assert "not a database" in found["catalog"]["rebuilt_because"]
    assert found["catalog"]["added"] >= len(restarted.cases)
    assert found["catalog"]["damaged"] == []
    assert found["store"]["quarantined"] == 1
    assert (
        "the catalog was rebuilt: file is not a database" in restarted.server.log_path.read_text()
    )


def test_second_server_on_the_directory_is_refused(stage: Stage, restarted: World) -> None:
    folder = fresh(stage.folder / "second")
    second = stage.server(folder, CONTRACT, store=restarted.store)
    with pytest.raises(ServerError, match="another server uses the snapshot directory"):
        second.start()
    log = second.log_path.read_text()
    assert f"process {restarted.server.process.pid}" in log
    assert "Traceback" not in log
