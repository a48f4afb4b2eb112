"""What OpenAPI says of the routes: all of them, with examples that are true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engram.conversation.turns import Tag
from engram.server.examples import BODIES, REPLIES
from engram.server.prefixes import PrefixBody
from engram.server.schemas import (
    BranchPlace,
    ConversationPatch,
    ListBody,
    MemoryPlace,
    Place,
    RestoreBody,
    SaveBody,
    SnapshotBranch,
    SnapshotPatch,
    SnapshotRestore,
)
from engram.testing.samples import seeded_random
from unit.server.test_compatible import client_of
from unit.server.test_refusals import app_of
from unit.service.engine import Server, on_a_loop


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(tmp_path / "store", seeded_random())
    yield server
    server.stop()


def test_every_route_has_examples_and_the_form_of_its_failures(server: Server) -> None:
    for path, methods in app_of(server).openapi()["paths"].items():
        for method, said in methods.items():
            name = f"{method.upper()} {path}"
            assert said["summary"], name
            found = said["responses"]["200"]["content"]
            assert "application/octet-stream" in found or found["application/json"]["example"], name
            failures = [reply for status, reply in said["responses"].items() if status[0] == "4"]
            assert failures, name
            for failure in failures:
                error = failure["content"]["application/json"]["example"]["error"]
                assert set(error) == {"code", "message", "hint", "details"}, name
            body = said.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                assert "example" in body, name


MODELS: dict[str, type[BaseModel]] = {
    "POST /save_snapshot": SaveBody,
    "POST /restore_snapshot": RestoreBody,
    "POST /list_snapshots": ListBody,
    "POST /get_snapshot_info": Place,
    "POST /delete_snapshot": Place,
    "POST /v1/snapshots": SaveBody,
    "PATCH /v1/snapshots/{snapshot_id}": SnapshotPatch,
    "PATCH /v1/conversations/{conversation_id}": ConversationPatch,
    "POST /v1/snapshots/{snapshot_id}/restore": SnapshotRestore,
    "POST /v1/snapshots/{snapshot_id}/branch": SnapshotBranch,
    "POST /v1/prefixes": PrefixBody,
    "POST /v1/memory/promote": MemoryPlace,
    "POST /v1/memory/demote": MemoryPlace,
    "POST /v1/memory/pin": BranchPlace,
    "POST /v1/memory/unpin": BranchPlace,
}


def test_bodies_that_are_shown_are_taken() -> None:
    assert set(BODIES) == set(MODELS)
    for name, example in BODIES.items():
        assert MODELS[name].model_validate(example), name


@on_a_loop
async def test_replies_have_the_fields_that_the_examples_show(server: Server) -> None:
    tokens = await server.chat("c", 2)
    rid, _ = await server.serve([*tokens, 5], Tag("c"))
    server.service.gate.served.cached(rid, 3, 0, 3)
    place, names = {"conversation_id": "c"}, {"conversation_id": "c", "rid": rid}
    asked: dict[str, dict[str, Any]] = {
        "POST /save_snapshot": {"json": {**place, "snapshot_id": "s", "turn_number": 1}},
        "POST /restore_snapshot": {"json": place},
        "POST /v1/snapshots/{snapshot_id}/restore": {"json": {}},
        "POST /list_snapshots": {"json": place},
        "POST /get_snapshot_info": {"json": place},
        "PATCH /v1/snapshots/{snapshot_id}": {"json": {"pinned": True}},
        "PATCH /v1/conversations/{conversation_id}": {"json": {"priority": 3}},
        "GET /v1/snapshots/{snapshot_id}/compare": {"params": {"to": "s"}},
        "GET /v1/requests/{rid}": {},
        "GET /v1/memory/tiers": {},
        "GET /v1/memory/health": {},
        "POST /v1/memory/promote": {"json": place},
        "POST /v1/memory/pin": {"json": place},
        "POST /v1/memory/unpin": {"json": place},
        "POST /v1/memory/demote": {"json": place},
        "POST /delete_snapshot": {"json": place},
        "DELETE /v1/snapshots/{snapshot_id}": {},
    }
    assert set(asked) == set(REPLIES)
    async with client_of(app_of(server)) as client:
        for name, given in asked.items():
            method, path = name.split()
            if name.startswith("DELETE"):
                await client.post("/save_snapshot", json={**place, "snapshot_id": "t"})
                names["snapshot_id"] = "t"
            response = await client.request(
                method, path.format(**{"snapshot_id": "s", **names}), **given
            )
            assert response.status_code == 200, (name, response.text)
            same(response.json(), REPLIES[name], name)


def same(found: Any, example: Any, where: str) -> None:
    """The same fields, and of fields that are objects theirs; of health an example shows some."""
    if where == "GET /v1/memory/health":
        assert set(example) <= set(found)
    elif isinstance(example, dict) and isinstance(found, dict) and example:
        assert set(example) == set(found), where
        for field, value in example.items():
            if field not in ("details", "user_metadata"):
                same(found[field], value, f"{where} {field}")
    elif isinstance(example, list) and isinstance(found, list) and example and found:
        same(found[0], example[0], where)
