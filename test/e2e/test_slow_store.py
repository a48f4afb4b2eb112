"""Nobody waits for a store that is slow, blocked or failing but those who asked for it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from e2e.helpers import Client, Reply, assert_close, random_ids, until
from e2e.slow_world import FORMS, SlowWorld, native_body, new_talk, stream
from e2e.small_world import OUT_OF_RAM
from engram.testing.faults import Fault
from engram.testing.samples import seeded_random

WAIT_S = 60
ALL_BLOCKED = {name: Fault(block=True) for name in ("read", "write", "fsync", "commit")}
AT_ONCE = 4


@pytest.fixture
def numbers() -> random.Random:
    return seeded_random()


def health(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.http.get("/v1/memory/health").json()
    return found


def saves_are_over(client: Client) -> bool:
    queues = health(client)["queues"]
    return queues["saves_running"] == queues["automatic_saves_waiting"] == 0


def test_a_load_that_is_slow_between_layers_changes_no_bit(slow: SlowWorld) -> None:
    case = slow.cases["layers"]
    before = health(slow.client)["ranks"][0]["loads"]
    slow.faults.set(layer=Fault(delay=0.05))
    slow.client.restore(conversation_id="layers")
    for _ in range(2):
        reply = case.talk.peek(slow.client, case.message)
        assert reply.cached == case.saved["token_count"]
        assert reply.output == case.reference.output
        slow.client.flush()
    assert health(slow.client)["ranks"][0]["loads"] == before + 2


@pytest.mark.parametrize("form", FORMS)
def test_a_request_on_disk_waits_for_a_slow_read_and_hits(slow: SlowWorld, form: str) -> None:
    case = slow.cases[f"slow-{form}"]
    before = health(slow.client)
    slow.faults.set(read=Fault(delay=0.01))
    reply = case.talk.peek(slow.client, case.message, case.name if FORMS[form][1] else None)
    assert reply.cached == case.saved["token_count"]
    assert reply.output == case.reference.output
    after = health(slow.client)
    assert after["service"]["held_requests"] > before["service"]["held_requests"]
    assert after["service"]["hold_timeouts"] == before["service"]["hold_timeouts"]
    assert after["ranks"][0]["promoted_bytes"] > before["ranks"][0]["promoted_bytes"]


def test_requests_on_disk_wait_for_a_bounded_time_and_are_recomputed(slow: SlowWorld) -> None:
    before = health(slow.client)["service"]["hold_timeouts"]
    slow.faults.set(read=Fault(block=True))

    def ask(form: str) -> Reply:
        case = slow.cases[f"blocked-{form}"]
        return case.talk.peek(slow.client, case.message, case.name if FORMS[form][1] else None)

    with ThreadPoolExecutor(len(FORMS)) as clients:
        asked = {form: clients.submit(ask, form) for form in FORMS}
        until(lambda: health(slow.client)["queues"]["requests_held"] == len(FORMS), "all are held")
        replies = {form: future.result(WAIT_S) for form, future in asked.items()}
        assert slow.faults.blocked("read") > 0, "the store was blocked all the time"
    for form, reply in replies.items():
        assert reply.cached == 0, form
        assert_close(reply, slow.cases[f"blocked-{form}"].reference, 1e-3)
    found = health(slow.client)
    assert found["service"]["hold_timeouts"] - before == len(FORMS)
    assert found["queues"]["requests_held"] == 0
    assert found["ranks"][0]["promotions"] <= 2, "what was not begun is not read for nobody"


def test_everything_else_goes_on_while_the_store_is_blocked(
    slow: SlowWorld, numbers: random.Random
) -> None:
    client, disk = slow.client, slow.cases["disk"]
    with ThreadPoolExecutor(4) as others:
        running = stream(client, native_body(random_ids(numbers, 20), 200, None))
        next(running)
        slow.faults.set(**ALL_BLOCKED)
        streamed = others.submit(lambda: list(running)[-1])

        untagged = [client.generate(random_ids(numbers, 40)) for _ in range(2)]
        during = new_talk(client, numbers, "during")
        during.say(client, random_ids(numbers, 20), "during")
        recomputed = disk.talk.peek(client, disk.message)
        assert recomputed.cached == 0
        assert_close(recomputed, disk.reference, 1e-3)
        # A turn of a conversation that is new in this process, and known to the catalog.
        assert disk.talk.peek(client, random_ids(numbers, 5), "disk").finish == "length"

        waiting = others.submit(client.save, rid=untagged[0].rid, conversation_id="sync")
        later = client.save(rid=untagged[1].rid, conversation_id="async", durability="async")
        assert later["durability"] == "async"
        twice = client.save(rid=untagged[1].rid, durability="async")
        assert twice["snapshot_id"] == later["snapshot_id"]
        until(lambda: health(client)["queues"]["saves_waiting"] == 3, "saves wait")
        found = health(client)
        assert found["queues"]["saves_running"] == 2
        assert found["ranks"][0]["bytes_held_for_writing"] > 0
        client.refused("/list_snapshots", {"conversation_id": "sync"}, 404)
        assert streamed.result(WAIT_S)["meta_info"]["completion_tokens"] == 200
        # Alone in its batch, as the same request will be later: else its last bits may differ.
        message = random_ids(numbers, 23)
        reference = during.peek(client, message)
        assert slow.faults.blocked("write") + slow.faults.blocked("fsync") > 0
        assert not waiting.done()

        slow.faults.clear()
        assert waiting.result(WAIT_S)["durability"] == "sync"
        durable = client.save(conversation_id="async")
        assert durable["snapshot_id"] == later["snapshot_id"]
        saved = client.save(conversation_id="during")
    until(lambda: saves_are_over(client), "saves are over")
    assert [s["turn_number"] for s in client.snapshots("during")] == [1, 2]
    assert [s["turn_number"] for s in client.snapshots("disk")] == [1, 2, 3], "counted on"
    client.flush()
    client.restore(conversation_id="during")
    again = during.peek(client, message)
    assert again.cached == reference.cached == saved["token_count"]
    assert again.output == reference.output


@pytest.mark.parametrize("where", ["segments", "manifests", "catalog"])
@pytest.mark.parametrize(
    ("error", "status", "code"), [("ENOSPC", 507, "store_full"), ("EIO", 500, "store_error")]
)
def test_a_full_or_broken_disk_fails_the_save_alone(
    slow: SlowWorld, numbers: random.Random, where: str, error: str, status: int, code: str
) -> None:
    client, name = slow.client, f"{where}-{error}"
    until(lambda: saves_are_over(client), "saves are over")
    files = slow.files()
    fault = {"commit": Fault(error=error)}
    if where != "catalog":
        fault = {"write": Fault(error=error, only=f"/{where}/")}
    rid = client.generate(random_ids(numbers, 40)).rid
    slow.faults.set(**fault)
    refused = client.refused("/save_snapshot", {"rid": rid, "conversation_id": name}, status)
    assert refused["error"] == code
    assert refused["hint"]
    if code == "store_full":
        assert refused["details"]["needed"] > 0
        assert refused["details"]["free"] > 0

    failures = health(client)["service"]["save_failures"]
    talk = new_talk(client, numbers, f"{name}-automatic")
    until(lambda: health(client)["service"]["save_failures"] == failures + 1, "a save failed")
    assert f"{name}-automatic/main" in health(client)["service"]["last_failures"][-1]
    new = slow.files() - files
    assert all(path.endswith(".seg") for path in new), "whole segments at most"
    assert where != "segments" or not new

    slow.faults.clear()
    assert client.save(rid=rid, conversation_id=name)["turn_number"] == 1
    assert client.save(conversation_id=f"{name}-automatic")["token_count"] == len(talk.history) - 1
    assert client.restore(conversation_id=name)["verified"] is True


def test_traffic_nobody_asked_to_keep_pushes_nothing_out_and_is_not_written(
    slow: SlowWorld, numbers: random.Random
) -> None:
    """A flood that fills RAM twice over; leases have run out by then."""
    client, case = slow.client, slow.cases["kept"]
    client.restore(conversation_id="kept")
    talk = new_talk(client, numbers, "fresh")
    talk.say(client, random_ids(numbers, 20), "fresh")
    saved = client.save(conversation_id="fresh")
    message = random_ids(numbers, 23)
    reference = talk.peek(client, message)
    until(lambda: saves_are_over(client), "saves are over")
    until(lambda: health(client)["ranks"][0]["leases"] == 0, "no lease is held")
    files = slow.files()
    before = health(client)["ranks"][0]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        prompts = [random_ids(numbers, 200) for _ in range(OUT_OF_RAM)]
        list(clients.map(lambda prompt: client.generate(prompt, 1), prompts))
    after = health(client)["ranks"][0]
    assert after["captured"] - before["captured"] == OUT_OF_RAM, "each stays saveable by its rid"
    assert after["evicted"] - before["evicted"] > OUT_OF_RAM / 2
    assert slow.files() == files
    for conversation in ("kept", "fresh"):
        assert client.restore(conversation_id=conversation)["source_tier"] == "ram", conversation
    assert talk.peek(client, message).output == reference.output
    assert reference.cached == saved["token_count"]
    assert case.talk.peek(client, case.message).output == case.reference.output
