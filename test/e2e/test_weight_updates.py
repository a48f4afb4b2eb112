"""Weights that change while the server runs: old states are never used with them, and come back."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from e2e.helpers import Client, Reply, assert_close, random_ids, until
from e2e.pressured_world import check_at_rest, cold, nothing_is_held, rank, talked
from e2e.talks import NEW_TOKENS, GenerateTalk
from e2e.test_pressure import Underway, goes_on_exactly
from e2e.worlds import Stage, World, save_and_peek
from engram.server.refusing import REFUSED_ROUTES
from engram.sglang_plugin.weights import FLUSH_REFUSED
from engram.testing.samples import seeded_random
from refusals import refusal

HOME, OTHER = 1, 2
"""Seeds of the models: the one of the launch, and another of the same shapes."""
TOLERANCE = 1e-3


def update(world: World, model: Path, status: int = 200, **fields: Any) -> dict[str, Any]:
    body = {"model_path": str(model), **fields}
    response = world.client.post("/update_weights_from_disk", body)
    if status == 200 and FLUSH_REFUSED in response.text:
        # A client has its reply a moment before the batch has ended. The weights are the new ones;
        # what is left to do is what SGLang's message says.
        world.client.flush()
        status = 400
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply


def mismatch(client: Client, conversation: str) -> dict[str, Any]:
    refused = client.refused("/restore_snapshot", {"conversation_id": conversation}, 409)
    assert refused["error"] == "namespace_mismatch"
    details: dict[str, Any] = refused["details"]
    return details


@pytest.fixture
def at_home(stage: Stage, pressured: World) -> Iterator[World]:
    """The server, with the weights of its launch before and after."""
    yield pressured
    pressured.client.post("/continue_generation", {})
    update(pressured, stage.model(HOME))
    pressured.client.flush()


def test_old_states_come_back_with_their_weights(stage: Stage, at_home: World) -> None:
    client, numbers = at_home.client, seeded_random()
    talk = talked(client, numbers, "home")
    case = save_and_peek(client, numbers, "home", talk)
    prompt = [*talk.history, *case.message]

    update(at_home, stage.model(OTHER))
    details = mismatch(client, "home")
    assert details["field"] == "model.weights"
    assert details["wanted"] != details["found"]
    reply = client.generate(prompt, NEW_TOKENS)
    assert reply.cached == 0, "nothing made by the old weights is used"
    assert reply.output != case.reference.output
    assert_close(reply, cold(client, prompt, NEW_TOKENS), TOLERANCE)
    other = save_and_peek(client, numbers, "other", talked(client, numbers, "other"))
    assert client.info(conversation_id="other")["namespace"] != case.saved.get("namespace")
    assert client.info(conversation_id="home")["tier"] == "disk"

    update(at_home, stage.model(HOME))
    assert mismatch(client, "other") == {
        **details,
        "wanted": details["found"],
        "found": details["wanted"],
        "differences": [["model.weights", details["found"], details["wanted"]]],
    }
    assert client.restore(conversation_id="home")["source_tier"] == "disk"
    back = talk.peek(client, case.message)
    assert back.cached == case.saved["token_count"]
    assert back.output == case.reference.output

    update(at_home, stage.model(OTHER))
    # This time nobody restores it: the request finds it by itself.
    found = other.talk.peek(client, other.message)
    assert found.cached == other.saved["token_count"]
    assert found.output == other.reference.output
    check_at_rest(at_home)


def test_a_turn_of_the_weights_before_is_computed_again(stage: Stage, at_home: World) -> None:
    client, numbers = at_home.client, seeded_random()
    talk = talked(client, numbers, "between")
    update(at_home, stage.model(OTHER))
    saved = client.save(conversation_id="between")
    assert saved["recomputed"] is True
    assert saved["token_count"] == len(talk.history) - 1
    goes_on_exactly(at_home, "between", talk)


def test_a_directory_that_is_not_there_changes_nothing(at_home: World, tmp_path: Path) -> None:
    client, numbers = at_home.client, seeded_random()
    changes = rank(at_home)["weights_changes"]
    case = save_and_peek(client, numbers, "kept", talked(client, numbers, "kept"))
    reply = update(at_home, tmp_path / "missing", 400)
    assert "Failed to get weights iterator" in reply["message"]
    assert rank(at_home)["weights_changes"] == changes
    client.flush()
    assert client.restore(conversation_id="kept")["verified"] is True
    again = case.talk.peek(client, case.message)
    assert (again.cached, again.output) == (case.saved["token_count"], case.reference.output)


def test_a_directory_with_some_of_the_weights_is_no_namespace(
    stage: Stage, at_home: World, tmp_path: Path
) -> None:
    """What it leaves of the weights before is not in its fingerprint."""
    part = tmp_path / "part"
    part.mkdir()
    for path in stage.model(OTHER).iterdir():
        if path.suffix != ".safetensors":
            (part / path.name).write_bytes(path.read_bytes())
    tensors = load_file(stage.model(OTHER) / "model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    assert 0 < len(some) < len(tensors)
    save_file(some, part / "model.safetensors", {"format": "pt"})
    seen = set()
    for name in ("part-1", "part-2"):
        update(at_home, part)
        talked(at_home.client, seeded_random(), name, 40)
        at_home.client.save(conversation_id=name)
        seen.add(at_home.client.info(conversation_id=name)["namespace"])
        update(at_home, stage.model(HOME))
        assert mismatch(at_home.client, name)["found"].startswith("runtime-")
    assert len(seen) == 2, "the same directory, over other weights"


def test_an_update_without_a_flush_is_saved_from_after_one(stage: Stage, at_home: World) -> None:
    client, numbers = at_home.client, seeded_random()
    talk = talked(client, numbers, "unflushed")
    update(at_home, stage.model(OTHER), flush_cache=False)
    assert rank(at_home)["stale_tree"] is True
    captured = rank(at_home)["captured"]
    reply = talk.say(client, talk.message(numbers, 20), "unflushed")
    assert reply.cached > 0, "SGLang goes on with the states of the weights before, as asked"
    refused = client.refused("/save_snapshot", {"conversation_id": "unflushed"}, 409)
    assert refused["error"] == "stale_tree"
    assert "/flush_cache" in refused["hint"]
    assert rank(at_home)["captured"] == captured
    client.flush()
    assert rank(at_home)["stale_tree"] is False
    assert client.save(conversation_id="unflushed")["recomputed"] is True
    goes_on_exactly(at_home, "unflushed", talk)


def test_a_request_that_ran_across_an_update_is_not_saved_as_it_is(
    stage: Stage, at_home: World
) -> None:
    """Paused in place, it goes on with keys and values of both weights; so SGLang means it."""
    client, numbers = at_home.client, seeded_random()
    prompt = random_ids(numbers, 50)
    running = Underway(at_home, "across-1", prompt, 200, "across")
    until(lambda: running.steps("Decode batch") >= 1, "the decode never began")
    client.post("/pause_generation", {"mode": "in_place"}).raise_for_status()
    stale = rank(at_home)["capture_stale"]
    reply = update(at_home, stage.model(OTHER), 400)
    assert "the cache was not flushed" in reply["message"]
    client.post("/continue_generation", {}).raise_for_status()
    mixed = running.reply()
    assert len(mixed.tokens) == 200
    assert rank(at_home)["capture_stale"] > stale
    client.refused("/save_snapshot", {"conversation_id": "across"}, 409)
    client.flush()
    assert client.save(conversation_id="across")["recomputed"] is True
    talk = GenerateTalk()
    talk.history = [*prompt, *mixed.tokens]
    goes_on_exactly(at_home, "across", talk)


def test_a_request_that_was_retracted_for_an_update_is_saved(stage: Stage, at_home: World) -> None:
    """It begins again: its state is the new weights' alone, though not all of its tokens are."""
    client, numbers = at_home.client, seeded_random()
    prompt = random_ids(numbers, 50)
    running = Underway(at_home, "retracted-1", prompt, 200, "again")
    until(lambda: running.steps("Decode batch") >= 1, "the decode never began")
    client.post("/pause_generation", {"mode": "retract"}).raise_for_status()
    update(at_home, stage.model(OTHER))
    client.post("/continue_generation", {}).raise_for_status()
    reply = running.reply()
    saved = client.save(conversation_id="again")
    assert saved["recomputed"] is False
    talk = GenerateTalk()
    talk.history = [*prompt, *reply.tokens]
    goes_on_exactly(at_home, "again", talk)


def serialized(tensors: dict[str, torch.Tensor]) -> str:
    """As a trainer on the same machine sends them: the server maps this process's memory."""
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_system")
    payload = MultiprocessingSerializer.serialize(list(tensors.items()))
    return base64.b64encode(payload).decode()


def test_weights_that_come_as_tensors_match_nothing_else(stage: Stage, at_home: World) -> None:
    client, numbers = at_home.client, seeded_random()
    case = save_and_peek(client, numbers, "tensors-home", talked(client, numbers, "tensors-home"))
    tensors = load_file(stage.model(OTHER) / "model.safetensors")
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    client.post("/begin_weight_update", {}).raise_for_status()
    for number, half in enumerate(halves):
        body = {"serialized_named_tensors": [serialized(half)], "flush_cache": number == 1}
        response = client.post("/update_weights_from_tensor", body)
        assert response.status_code == 200, response.text
    client.post("/end_weight_update", {}).raise_for_status()
    assert rank(at_home)["stale_tree"] is False, "flushed with the last of them"
    assert mismatch(client, "tensors-home")["wanted"].startswith("runtime-")
    reply = case.talk.peek(client, case.message)
    assert reply.cached == 0
    goes_on_exactly(at_home, "tensors", talked(client, numbers, "tensors"))

    update(at_home, stage.model(OTHER))
    same = case.talk.peek(client, case.message)
    assert same.cached == 0, "the same values, but nobody vouches for it"
    assert_close(same, reply, TOLERANCE)
    assert mismatch(client, "tensors")["found"].startswith("runtime-")
    update(at_home, stage.model(HOME))
    back = case.talk.peek(client, case.message)
    assert (back.cached, back.output) == (case.saved["token_count"], case.reference.output)


def saved(client: Client, body: dict[str, Any]) -> bool:
    """False while the tree is stale or the weights never rest: that is for the client to repeat."""
    response = client.post("/save_snapshot", body)
    if response.status_code == 409:
        assert refusal(response)["error"] in ("stale_tree", "namespace_changed")
        return False
    assert response.status_code == 200, response.text
    return True


def test_turns_and_saves_while_the_weights_go_back_and_forth(stage: Stage, at_home: World) -> None:
    """Nothing is taken for damaged, nothing is lost, and each snapshot is of one of the two."""
    numbers = seeded_random()
    names = [f"torn-{n}" for n in range(3)]
    messages = {name: [random_ids(numbers, 15) for _ in range(5)] for name in names}
    over = threading.Event()
    updates = 0

    def back_and_forth() -> None:
        nonlocal updates
        with Client(at_home.server.url).http as http:
            while not over.is_set():
                model = stage.model((OTHER, HOME)[updates % 2])
                response = http.post("/update_weights_from_disk", json={"model_path": str(model)})
                updates += 1
                # A request that has just been answered may still be in SGLang's last batch.
                while response.status_code != 200:
                    assert "flush" in response.text.lower(), response.text
                    response = http.post("/flush_cache")

    def talk(name: str) -> None:
        client, mine = Client(at_home.server.url), GenerateTalk()
        body = {"conversation_id": name}
        for message in messages[name]:
            mine.say(client, message, name)
            until(lambda: saved(client, body), "the cache was never flushed")

    updating = threading.Thread(target=back_and_forth)
    updating.start()
    try:
        with ThreadPoolExecutor(len(names)) as clients:
            list(clients.map(talk, names))
    finally:
        over.set()
        updating.join()
    assert updates >= 4
    client = at_home.client
    until(lambda: nothing_is_held(at_home), "something is held")
    check_at_rest(at_home)
    assert rank(at_home)["corrupt"] == 0
    restored = {HOME: 0, OTHER: 0}
    for seed in restored:
        update(at_home, stage.model(seed))
        for name in names:
            for row in client.snapshots(name):
                place = {"conversation_id": name, "turn_number": row["turn_number"]}
                response = client.post("/restore_snapshot", place)
                if response.status_code == 409:
                    assert refusal(response)["error"] == "namespace_mismatch"
                    continue
                assert response.status_code == 200, response.text
                restored[seed] += 1
                tokens = row["fill_ids"]
                prompt = [*tokens, *random_ids(numbers, 5)]
                reply: Reply = client.generate(prompt, 4)
                assert reply.cached >= row["token_count"]
                assert_close(reply, cold(client, prompt, 4), TOLERANCE)
    assert sum(restored.values()) == sum(len(client.snapshots(name)) for name in names) == 15
    assert min(restored.values()) > 0, "all of them fell between the same two updates"


def test_routes_that_snapshots_cannot_survive_say_why(pressured: World) -> None:
    client = pressured.client
    for path in REFUSED_ROUTES:
        refused = client.refused(path, {"action": "reset_tensors"}, 422)
        assert refused["error"] == "unsupported"
        assert path in refused["message"]
