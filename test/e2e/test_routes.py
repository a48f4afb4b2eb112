"""The five routes: what they answer, what they refuse and with which status."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from e2e.helpers import Client, Reply, random_ids
from e2e.worlds import World
from engram.testing.samples import seeded_random
from refusals import refusal

ROUTES = [
    "/save_snapshot",
    "/restore_snapshot",
    "/list_snapshots",
    "/get_snapshot_info",
    "/delete_snapshot",
]
BAD_IDS = {
    "path": "../x",
    "empty": "",
    "long": "x" * 10_000,
    "unicode": "gespräch",
    "newline": "a\nb",
    "nul": "a\0b",
    "hidden": ".x",
    "slash": "a/b",
    "space": "a b",
}
GENERATION: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"model": "default", "prompt": "a"},
    "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"model": "default", "input": "a"},
}
METADATA = {
    *("conversation_id", "turn_number", "timestamp", "token_count", "model_name", "layer_config"),
    *("branch_name", "parent_snapshot", "fill_ids"),
    *("snapshot_id", "tier", "bytes", "unique_bytes", "durability", "created_at", "pinned"),
    *("expires_at", "namespace", "user_metadata", "recompute_tokens"),
}
_names = (f"routes-{n}" for n in itertools.count())


@pytest.fixture
def name() -> str:
    """A conversation that no other test has."""
    return next(_names)


def talk(client: Client, conversation: str | None, turns: int = 2) -> tuple[list[int], list[Reply]]:
    """Turns of 40 and 12 tokens; all tokens of the last one, and the replies."""
    numbers = seeded_random()
    history: list[int] = []
    replies = []
    for _ in range(turns):
        history += random_ids(numbers, 40)
        replies.append(client.generate(history, 12, conversation))
        history += replies[-1].tokens
    return history, replies


# ---- what is not there ----


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((route, {"conversation_id": "unknown"}) for route in ROUTES),
        *((route, {"conversation_id": "base", "turn_number": 99}) for route in ROUTES[:2]),
        ("/get_snapshot_info", {"conversation_id": "base", "turn_number": 99}),
        ("/delete_snapshot", {"conversation_id": "base", "turn_number": 99}),
        ("/restore_snapshot", {"conversation_id": "base", "branch_name": "unknown"}),
        ("/get_snapshot_info", {"conversation_id": "base", "branch_name": "unknown"}),
        ("/delete_snapshot", {"conversation_id": "base", "branch_name": "unknown"}),
        ("/save_snapshot", {"conversation_id": "base", "branch_name": "new", "turn_number": 99}),
        ("/save_snapshot", {"rid": "unknown"}),
        ("/restore_snapshot", {"rid": "unknown"}),
    ],
)
def test_unknown_is_404(small: World, path: str, body: dict[str, Any]) -> None:
    before = small.files()
    assert small.client.refused(path, body, 404)["error"] == "not_found"
    assert small.files() == before


def test_hint_for_an_unknown_conversation_says_both_ways(small: World) -> None:
    refused = small.client.refused("/save_snapshot", {"conversation_id": "session-1"}, 404)
    assert "conversation_id" in refused["hint"]
    assert "rid" in refused["hint"]


# ---- what is malformed ----


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("path", [*ROUTES, *GENERATION])
def test_bad_conversation_id_is_422_and_touches_nothing(small: World, path: str, bad: str) -> None:
    before = small.files()
    body = {"conversation_id": bad, **GENERATION.get(path, {})}
    refused = small.client.refused(path, body, 422)
    assert refused["error"] == "invalid_request"
    assert refused["details"]["field"] == "conversation_id"
    assert len(refused["message"]) < 500
    assert small.files() == before


@pytest.mark.parametrize("header", ["../x", "a b", ".x", "x" * 300])
def test_bad_header_is_422(small: World, header: str) -> None:
    response = small.client.http.post(
        "/generate", json={"text": "a"}, headers={"x-override-conversation-id": header}
    )
    assert response.status_code == 422
    assert refusal(response)["details"]["field"] == "conversation_id"


@pytest.mark.parametrize("field", ["snapshot_id", "branch_name"])
@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_names_are_422(small: World, field: str, bad: str) -> None:
    before = small.files()
    body = {"conversation_id": "base", field: bad}
    refused = small.client.refused("/save_snapshot", body, 422)
    assert refused["details"]["field"] == field
    assert small.files() == before


@pytest.mark.parametrize("path", ROUTES)
def test_unknown_field_is_named(small: World, path: str) -> None:
    body = {"conversation_id": "base", "colour": "red"}
    assert "colour" in small.client.refused(path, body, 422)["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/save_snapshot", {"turn_number": "2"}, "turn_number"),
        ("/save_snapshot", {"turn_number": 0}, "turn_number"),
        ("/save_snapshot", {"turn_number": True}, "turn_number"),
        ("/save_snapshot", {"turn_number": 1.5}, "turn_number"),
        ("/save_snapshot", {"conversation_id": 5}, "conversation_id"),
        ("/save_snapshot", {"durability": "maybe"}, "durability"),
        ("/save_snapshot", {"rid": 7}, "rid"),
        ("/restore_snapshot", {"create_new_request": "yes"}, "create_new_request"),
        ("/get_snapshot_info", {"branch_name": ["main"]}, "branch_name"),
        ("/list_snapshots", {"conversation_id": None}, "conversation_id"),
        ("/delete_snapshot", {"turn_number": -1}, "turn_number"),
    ],
)
def test_wrong_type_is_named(small: World, path: str, body: dict[str, Any], field: str) -> None:
    refused = small.client.refused(path, {"conversation_id": "base"} | body, 422)
    assert refused["details"]["field"] == field


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"base"', "\0"])
def test_body_that_is_no_object_is_422(small: World, path: str, content: str) -> None:
    response = small.client.http.post(path, content=content)
    assert response.status_code == 422
    assert response.json()["success"] is False


@pytest.mark.parametrize("path", ["/save_snapshot", "/restore_snapshot"])
def test_either_id_is_needed(small: World, path: str) -> None:
    assert "rid" in small.client.refused(path, {}, 422)["message"]


# ---- saves ----


def test_saving_twice_is_one_snapshot(small: World, name: str) -> None:
    talk(small.client, name)
    first = small.client.save(conversation_id=name)
    again = small.client.save(conversation_id=name)
    assert again["snapshot_id"] == first["snapshot_id"]
    assert "already" in again["message"]
    assert [s["turn_number"] for s in small.client.snapshots(name)] == [2]


def test_snapshot_id_of_another_turn_is_409(small: World, name: str) -> None:
    talk(small.client, name)
    taken = f"{name}-taken"
    assert small.client.save(conversation_id=name, turn_number=1, snapshot_id=taken)
    body = {"conversation_id": name, "turn_number": 2, "snapshot_id": taken}
    assert small.client.refused("/save_snapshot", body, 409)["error"] == "already_exists"
    assert [s["turn_number"] for s in small.client.snapshots(name)] == [1]


def test_save_says_what_it_saved(small: World, name: str) -> None:
    history, _ = talk(small.client, name)
    before = small.segments()
    saved = small.client.save(conversation_id=name, snapshot_id=f"{name}-mine")
    assert saved["snapshot_id"] == f"{name}-mine"
    assert (saved["turn_number"], saved["branch_name"]) == (2, "main")
    assert saved["durability"] == "sync"
    assert saved["token_count"] == len(history) - 1
    assert saved["recompute_tokens"] == 1
    assert saved["recomputed"] is False
    assert saved["elapsed_ms"] > 0
    new = [path for path in small.store.rglob("*.seg") if path.stem not in before]
    assert len(new) == 3, "the rows of two turns, and the state at their end"
    assert saved["bytes"] == sum(path.stat().st_size for path in new)
    assert saved["unique_bytes"] == saved["bytes"]


def test_asynchronous_save_says_so_and_comes(small: World, name: str) -> None:
    talk(small.client, name)
    saved = small.client.save(conversation_id=name, durability="async")
    assert saved["durability"] == "async"
    # A second save of the turn waits for the first and returns what that made.
    durable = small.client.save(conversation_id=name)
    assert durable["snapshot_id"] == saved["snapshot_id"]
    assert durable["durability"] == "sync"
    assert durable["token_count"] == saved["token_count"]


def test_turn_is_saved_by_its_request(small: World, name: str) -> None:
    _, replies = talk(small.client, name)
    saved = small.client.save(rid=replies[0].rid)
    assert (saved["conversation_id"], saved["turn_number"]) == (name, 1)
    assert small.client.restore(rid=replies[0].rid)["snapshot_id"] == saved["snapshot_id"]


def test_untagged_request_is_adopted(small: World, name: str) -> None:
    history, replies = talk(small.client, None)
    saved = small.client.save(rid=replies[-1].rid, conversation_id=name)
    assert (saved["conversation_id"], saved["turn_number"]) == (name, 1)
    assert small.client.info(conversation_id=name)["fill_ids"] == history


def test_untagged_request_of_no_conversation_is_one_itself(small: World) -> None:
    _, replies = talk(small.client, None, turns=1)
    saved = small.client.save(rid=replies[0].rid)
    assert saved["conversation_id"] == replies[0].rid
    assert small.client.restore(rid=replies[0].rid)["snapshot_id"] == saved["snapshot_id"]


def test_request_whose_id_cannot_name_a_conversation(small: World, name: str) -> None:
    """SGLang takes any request id; it is refused before anything is written, and not forgotten."""
    rid = f"{name}/of a client"
    small.client.generate(random_ids(seeded_random(), 30), 4, rid=rid)
    before = small.files()
    assert small.client.refused("/save_snapshot", {"rid": rid}, 422)["details"]["field"] == "rid"
    assert small.files() == before
    assert small.client.save(rid=rid, conversation_id=name)["conversation_id"] == name


def test_tagged_request_is_not_adopted_by_another(small: World, name: str) -> None:
    _, replies = talk(small.client, name, turns=1)
    body = {"rid": replies[0].rid, "conversation_id": f"{name}-other"}
    assert small.client.refused("/save_snapshot", body, 409)["error"] == "already_exists"


def test_nothing_is_written_without_a_save(small: World, name: str) -> None:
    """The policy of this server is manual_only."""
    before = small.files()
    talk(small.client, name)
    talk(small.client, None)
    assert small.files() == before
    small.client.refused("/list_snapshots", {"conversation_id": name}, 404)


# ---- branches ----


def test_branch_is_a_second_name_for_a_turn(small: World, name: str) -> None:
    client = small.client
    history, _ = talk(client, name)
    origin = client.save(conversation_id=name, turn_number=1)
    before = small.segments()
    branch = client.save(conversation_id=name, turn_number=1, branch_name="other")
    assert small.segments() == before
    assert branch["snapshot_id"] != origin["snapshot_id"]
    assert branch["unique_bytes"] == 0
    assert branch["token_count"] == origin["token_count"]
    metadata = client.info(conversation_id=name, branch_name="other")
    assert metadata["parent_snapshot"] == origin["snapshot_id"]
    assert metadata["fill_ids"] == history[:52]

    body = {"conversation_id": name, "branch_name": "other", "create_new_request": True}
    reply = client.restore(
        **body, continuation_ids=[20, 21], max_new_tokens=4, sampling_params={"temperature": 0}
    )
    on = client.save(conversation_id=name, branch_name="other")
    assert (on["turn_number"], on["branch_name"]) == (2, "other")
    metadata = client.info(conversation_id=name, branch_name="other")
    assert metadata["fill_ids"] == [*history[:52], 20, 21, *reply["output_ids"]]
    main = client.save(conversation_id=name)
    assert (main["turn_number"], main["branch_name"]) == (2, "main")
    places = [(s["branch_name"], s["turn_number"]) for s in client.snapshots(name)]
    assert sorted(places) == [("main", 1), ("main", 2), ("other", 1), ("other", 2)]


# ---- metadata ----


def test_metadata_has_what_the_contract_names(small: World, name: str) -> None:
    client = small.client
    history, replies = talk(client, name)
    first = client.save(conversation_id=name, turn_number=1)
    saved = client.save(conversation_id=name)
    metadata = client.info(conversation_id=name)
    assert set(metadata) >= METADATA
    assert metadata["conversation_id"] == name
    assert (metadata["turn_number"], metadata["branch_name"]) == (2, "main")
    assert metadata["fill_ids"] == history
    assert metadata["token_count"] == len(history) - metadata["recompute_tokens"]
    assert metadata["layer_config"] == {"num_layers": 6, "model_type": "granitemoehybrid"}
    assert metadata["parent_snapshot"] == first["snapshot_id"]
    assert metadata["snapshot_id"] == saved["snapshot_id"]
    assert metadata["bytes"] == saved["bytes"]
    assert metadata["unique_bytes"] == saved["unique_bytes"] < saved["bytes"]
    assert metadata["rid"] == replies[-1].rid
    assert metadata["tier"] == "vram"
    assert metadata["pinned"] is False
    assert metadata["user_metadata"] == {}
    listed = client.snapshots(name)
    assert [s["turn_number"] for s in listed] == [1, 2]
    assert listed[1] == metadata


def test_restore_of_a_resident_snapshot_names_its_slot(small: World, name: str) -> None:
    talk(small.client, name)
    small.client.save(conversation_id=name)
    reply = small.client.restore(conversation_id=name)
    assert (reply["source_tier"], reply["tier"]) == ("vram", "vram")
    assert reply["mamba_pool_idx"] >= 0
    small.client.flush()
    reply = small.client.restore(conversation_id=name)
    assert (reply["source_tier"], reply["tier"]) == ("ram", "ram")
    assert reply["mamba_pool_idx"] is None


# ---- deletion ----


def test_deleted_bytes_go_and_shared_ones_stay(small: World, name: str) -> None:
    client = small.client
    before = small.segments()
    history, _ = talk(client, name)
    client.save(conversation_id=name, turn_number=1)
    second = client.save(conversation_id=name, turn_number=2)
    both = small.segments() - before
    assert len(both) == 4, "rows and a state of each"

    assert client.delete(conversation_id=name, turn_number=1)
    left = small.segments() - before
    assert left < both
    assert len(left) == 3, "its rows are the later turn's too, its state is nobody's"
    client.refused("/get_snapshot_info", {"conversation_id": name, "turn_number": 1}, 404)
    client.flush()
    assert client.restore(conversation_id=name)["token_count"] == second["token_count"]
    assert client.generate([*history, 30, 31], 2).cached == second["token_count"]

    client.delete(conversation_id=name)
    assert small.segments() == before
    for path in ROUTES[1:]:
        client.refused(path, {"conversation_id": name}, 404)


def test_deleting_a_branch_leaves_the_turn_it_started_at(small: World, name: str) -> None:
    client = small.client
    talk(client, name, turns=1)
    origin = client.save(conversation_id=name)
    client.save(conversation_id=name, branch_name="other")
    client.delete(conversation_id=name, branch_name="other")
    assert client.restore(conversation_id=name)["snapshot_id"] == origin["snapshot_id"]
    assert [s["branch_name"] for s in client.snapshots(name)] == ["main"]
