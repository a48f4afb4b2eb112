"""Other weights under the same path: nothing stored is served, and the error says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from e2e.worlds import CONTRACT, QUICK, Stage, World, fresh, restarted_world, start

SEED = 2
"""Weights other than those the store was filled with; the shape is the same."""


def other_world(stage: Stage, folder: Path) -> World:
    """What the recorded world had stored, and a server of the same model directory, in which other
    weights have been put meanwhile."""
    recorded = stage.past("restarted", restarted_world)
    folder = fresh(folder)
    store = folder / "store" / "snapshots"
    shutil.copytree(recorded.facts["copy"], store)
    weights = stage.model(1) / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes((stage.model(SEED) / weights.name).read_bytes())
    try:
        world = start(stage.server(folder, (*CONTRACT, *QUICK), store=store), store)
    finally:
        weights.write_bytes(original)  # for the worlds to come
    world.cases = recorded.cases
    return world


@pytest.fixture
def other(stage: Stage) -> World:
    return stage.world("other", other_world)


def test_restore_names_the_weights_and_both_values(other: World) -> None:
    refused = other.client.refused("/restore_snapshot", {"conversation_id": "generate"}, 409)
    assert refused["error"] == "namespace_mismatch"
    assert "model.weights" in refused["message"]
    differences = {name: values for name, *values in refused["details"]["differences"]}
    assert list(differences) == ["model.weights"]
    wanted, found = differences["model.weights"]
    assert wanted != found
    assert wanted in refused["message"]
    assert found in refused["message"]


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
def test_requests_just_miss(other: World, tagged: bool) -> None:
    case = other.cases["generate" if tagged else "generate-untagged"]
    reply = case.talk.peek(other.client, case.message, case.name if tagged else None)
    assert reply.cached == 0
    assert reply.output.logprobs != case.reference.output.logprobs


def test_its_snapshots_are_still_listed(other: World) -> None:
    saved = other.cases["chat"].saved
    listed = other.client.snapshots("chat")
    assert saved["snapshot_id"] in {metadata["snapshot_id"] for metadata in listed}
    assert {metadata["tier"] for metadata in listed} == {"disk"}
