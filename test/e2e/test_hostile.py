"""Ids, bodies and values that nobody sends by accident: a clear refusal and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.helpers import random_ids
from e2e.test_routes import BAD_IDS, GENERATION, ROUTES
from e2e.worlds import World
from engram.testing.samples import seeded_random
from refusals import refusal

MEGABYTE = 1 << 20
HUGE = 100 * MEGABYTE
ID_FIELDS = [
    *(("/save_snapshot", field) for field in ("conversation_id", "snapshot_id", "branch_name")),
    *(("/restore_snapshot", field) for field in ("conversation_id", "branch_name", "request_id")),
    *(("/get_snapshot_info", field) for field in ("conversation_id", "branch_name")),
    *(("/delete_snapshot", field) for field in ("conversation_id", "branch_name")),
    ("/list_snapshots", "conversation_id"),
]
BAD_RIDS = {name: BAD_IDS[name] for name in ("empty", "long", "newline", "nul")}
DEEP = 100_000
BODIES = {
    "deep-list": b'{"conversation_id": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep-object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "nan": b'{"conversation_id": "base", "turn_number": NaN}',
    "infinity": b'{"conversation_id": "base", "turn_number": -Infinity}',
    "overflow": b'{"conversation_id": "base", "turn_number": 1e999}',
    "twice": b'{"conversation_id": "base", "conversation_id": "short"}',
    "huge-number": b'{"conversation_id": "base", "turn_number": ' + b"9" * 5000 + b"}",
    "large-number": b'{"conversation_id": "base", "turn_number": ' + b"9" * 40 + b"}",
    "no-utf8": b'{"conversation_id": "\xff\xfe"}',
    "utf16": '{"conversation_id": "base"}'.encode("utf-16"),
    "half-a-pair": rb'{"conversation_id": "\ud800"}',
    "half-a-pair-as-a-field": rb'{"conversation_id": "base", "\udfff": 1}',
    "long-field": b'{"conversation_id": "base", "' + b"x" * MEGABYTE + b'": 1}',
    "trailing": b'{"conversation_id": "base"} {}',
}


def serves(world: World) -> None:
    assert world.client.generate(random_ids(seeded_random(), 20), 1).tokens


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize(("path", "field"), ID_FIELDS)
def test_bad_id_in_any_field(small: World, path: str, field: str, bad: str) -> None:
    before = small.files()
    refused = small.client.refused(path, {"conversation_id": "base", field: bad}, 422)
    assert refused["error"] == "invalid_request"
    assert refused["details"]["field"] == field
    assert len(refused["message"]) < 500
    assert small.files() == before


@pytest.mark.parametrize("bad", BAD_RIDS.values(), ids=BAD_RIDS)
@pytest.mark.parametrize("path", ROUTES[:2])
def test_bad_rid(small: World, path: str, bad: str) -> None:
    """Request ids are SGLang's, which takes any text: what could be one is unknown, not bad."""
    assert small.client.refused(path, {"rid": bad}, 422)["details"]["field"] == "rid"


@pytest.mark.parametrize("odd", ["../x", "a/b", "gespräch", ".x"])
def test_odd_rid_is_unknown_and_names_no_conversation(small: World, odd: str) -> None:
    """A save of a request of no conversation would make one of its id."""
    before = small.files()
    assert small.client.refused("/restore_snapshot", {"rid": odd}, 404)["error"] == "not_found"
    assert small.client.refused("/save_snapshot", {"rid": odd}, 422)["details"]["field"] == "rid"
    place = {"rid": odd, "conversation_id": "adopted"}
    assert small.client.refused("/save_snapshot", place, 404)["error"] == "not_found"
    assert small.files() == before


@pytest.mark.parametrize("path", GENERATION)
@pytest.mark.parametrize("bad", [b"../x", b"x" * 10_000, "gespräch".encode(), b"a\tb", b""])
def test_bad_header_on_any_route(small: World, path: str, bad: bytes) -> None:
    before = small.files()
    response = small.client.http.post(
        path, json=GENERATION[path], headers={b"x-override-conversation-id": bad}
    )
    assert response.status_code == 422
    assert refusal(response)["details"]["field"] == "conversation_id"
    assert small.files() == before


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", ROUTES)
def test_body_that_is_no_strict_json(small: World, path: str, body: bytes) -> None:
    before = small.files()
    response = small.client.http.post(path, content=body)
    assert response.status_code == 422, response.text
    refused = refusal(response)
    assert refused["error"] == "invalid_request"
    assert len(refused["message"]) < 500
    assert small.files() == before


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_such_bodies_where_tokens_are_generated(small: World, body: bytes) -> None:
    """The rules there are SGLang's; none of these is a request, and none harms the server."""
    before = small.files()
    response = small.client.http.post("/generate", content=body)
    assert 400 <= response.status_code < 500, response.text
    serves(small)
    assert small.files() == before


PARAMS: dict[str, dict[str, Any]] = {
    "text-for-a-number": {"temperature": "hot"},
    "fraction-for-an-integer": {"top_k": 1.5},
    "more-than-32-bits": {"top_k": 2**40},
    "more-than-64-bits": {"min_new_tokens": 2**70},
    "number-for-text": {"stop": 5},
    "number-for-a-list": {"stop_token_ids": 7},
    "list-for-an-object": {"logit_bias": [1]},
    "text-for-a-flag": {"ignore_eos": "yes"},
    "no-token-of-the-vocabulary": {"min_new_tokens": 1, "stop_token_ids": [1_000_000]},
    "nested": {"custom_params": {"a": [[[[{}]]]]}, "stop": [["a"]]},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_parameters_of_a_wrong_type_never_reach_the_scheduler(
    small: World, params: dict[str, Any]
) -> None:
    body = {
        "conversation_id": "base",
        "create_new_request": True,
        "continuation_ids": [20],
        "max_new_tokens": 2,
        "sampling_params": params,
    }
    refused = small.client.refused("/restore_snapshot", body, 422)
    assert "sampling_params" in refused["details"]["field"]
    serves(small)


def test_a_client_that_leaves_its_save(small: World) -> None:
    """The save completes, or leaves nothing: what is there afterwards is whole either way."""
    client, numbers = small.client, seeded_random()
    for patience in (0.0005, 0.002, 0.005, 0.02, 0.05):
        reply = client.generate(random_ids(numbers, 40), 4, "left")
        with contextlib.suppress(httpx.TimeoutException):
            client.http.post("/save_snapshot", json={"rid": reply.rid}, timeout=patience)
        # Saves of one turn go one after another: this one meets what the first has left.
        saved = client.save(rid=reply.rid)
        client.flush()
        restored = client.restore(rid=reply.rid)
        assert restored["snapshot_id"] == saved["snapshot_id"]
        assert restored["token_count"] == saved["token_count"] == 43


# ---- 100 MB ----


def memory(world: World, name: str) -> int:
    """A figure of the HTTP process's /proc/<pid>/status, in bytes."""
    assert world.server.process is not None
    status = Path(f"/proc/{world.server.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def chunks(start: bytes) -> Iterator[bytes]:
    yield start
    for _ in range(HUGE // MEGABYTE):
        yield b"x" * MEGABYTE


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
@pytest.mark.parametrize("path", ["/save_snapshot", "/restore_snapshot", *GENERATION])
def test_body_of_100_megabytes_is_refused_in_bounded_memory(
    small: World, path: str, announced: bool
) -> None:
    assert small.server.process is not None
    start = b'{"conversation_id": "'
    content: Any = chunks(start)
    headers = {"content-length": str(len(start) + HUGE)} if announced else {}
    before = memory(small, "VmRSS")
    Path(f"/proc/{small.server.process.pid}/clear_refs").write_text("5")  # resets VmHWM
    response = small.client.http.post(path, content=content, headers=headers)
    assert response.status_code == 413
    refused = refusal(response)
    assert refused["error"] == "body_too_large"
    limit = refused["details"]["limit"]
    assert limit < HUGE
    grown = memory(small, "VmHWM") - before
    # What is announced is not even read; the rest is what is read until the bound is met.
    allowed = 0 if announced else limit
    assert grown < allowed + 16 * MEGABYTE, f"{grown / MEGABYTE:.0f} MB"
    serves(small)


def test_bodies_up_to_the_bound_are_read(small: World) -> None:
    """Blanks are no reason to refuse: 15 MB of them."""
    body = json.dumps({"conversation_id": "base"}).encode() + b" " * (15 * MEGABYTE)
    response = small.client.http.post("/list_snapshots", content=body)
    assert response.status_code == 200
