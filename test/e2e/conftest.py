"""Fixtures: worlds that tests share, because starting a server is what takes the time.

One world runs at a time in a process; tests are sorted by the world they need. With
ENGRAM_TEST_PART=1/2 a process takes one of two parts, of about the same length: those that need the
same world, or one that another has left behind, are in the same part.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from e2e.agents_world import agents_world
from e2e.battered_world import battered_world
from e2e.matrix import Recorder
from e2e.off_world import off_world
from e2e.pressured_world import alone_world, pressured_world
from e2e.slow_world import SlowWorld, slow_world
from e2e.small_world import small_world
from e2e.worlds import Stage, World, restarted_world

WORLDS = ("restarted", "other", "small", "battered", "pressured", "alone", "slow", "agents", "off")
STANDS_ON = {"other": "restarted", "alone": "pressured"}
"""Worlds that begin with what another has left behind."""
SECONDS = {
    "battered": 230,
    "small": 200,
    "restarted": 190,
    "pressured": 180,
    "agents": 150,
    "off": 120,
    "test_demo": 120,
    "slow": 110,
    "test_encryption": 130,
    "granite-hybrid-float32-extra-buffer-1": 95,
    "llama-float32-lora": 95,
    "test_docs_commands": 90,
    "test_triggers": 85,
    "mamba2-float32": 70,
}
"""About how long those take that take longer than the others."""
USUAL_S = 50
RECORDER = Recorder()
"""Of the tests of families, where results are to be recorded."""
TIMEOUT_S = 1200
"""For one test, the starts of its servers included; a busy machine takes minutes for those."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if (variant := _variant_of(item)) is not None:
            # Before any is deselected: what was run in part is not recorded.
            RECORDER.expect(variant)
    places = [index for index, item in enumerate(items) if item.path.parent == here]
    mine = [items[index] for index in places]
    for item in mine:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    for index, item in zip(places, sorted(mine, key=_world_of), strict=True):
        items[index] = item
    part, parts = map(int, os.environ.get("ENGRAM_TEST_PART", "1/1").split("/"))
    chosen = _parts({_group_of(item) for item in mine}, parts)[part - 1]
    others = [item for item in mine if _group_of(item) not in chosen]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def _variant_of(item: pytest.Item) -> str | None:
    if "variant" in getattr(item, "fixturenames", ()) and isinstance(item, pytest.Function):
        name: str = item.callspec.params["variant"].name
        return name
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    variant = _variant_of(item)
    if variant is not None and (report.when == "call" or not report.passed):
        assert isinstance(item, pytest.Function)
        RECORDER.found(variant, item.function.__name__, report.passed)
    return report


def pytest_sessionfinish() -> None:
    if RECORDER.on:
        RECORDER.write()


def _world_of(item: pytest.Item) -> tuple[int, str]:
    names = getattr(item, "fixturenames", ())
    if (variant := _variant_of(item)) is not None:
        return len(WORLDS) + 1, variant
    return next((n for n, world in enumerate(WORLDS, 1) if world in names), 0), ""


def _parts(groups: set[str], count: int) -> list[set[str]]:
    """Groups of tests in parts that take about as long as one another."""
    parts: list[set[str]] = [set() for _ in range(count)]

    def seconds(part: set[str]) -> int:
        return sum(SECONDS.get(group, USUAL_S) for group in part)

    for group in sorted(groups, key=lambda group: (-SECONDS.get(group, USUAL_S), group)):
        min(parts, key=seconds).add(group)
    return parts


def _group_of(item: pytest.Item) -> str:
    """What has to run in one process."""
    number, variant = _world_of(item)
    if number == 0:
        return item.path.stem
    if number > len(WORLDS):
        return variant
    return STANDS_ON.get(WORLDS[number - 1], WORLDS[number - 1])


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("e2e"))
    yield stage
    stage.clear()


@pytest.fixture(scope="session")
def recorder() -> Recorder:
    return RECORDER


@pytest.fixture
def restarted(stage: Stage) -> World:
    """The published launch command: recorded, killed, catalog damaged, started again."""
    return stage.world("restarted", restarted_world)


@pytest.fixture
def small(stage: Stage) -> World:
    """float32 and little room: recorded, killed, started again."""
    return stage.world("small", small_world)


@pytest.fixture
def slow(stage: Stage) -> Iterator[SlowWorld]:
    """A store that can be made slow, blocked or failing; what a test sets ends with the test."""
    world = stage.world("slow", slow_world)
    assert isinstance(world, SlowWorld)
    yield world
    world.faults.clear()


@pytest.fixture
def battered(stage: Stage) -> World:
    """float32 and much room: stormed at, killed, its scheduler killed, files damaged, started."""
    return stage.world("battered", battered_world)


@pytest.fixture
def pressured(stage: Stage) -> World:
    """float32 and too little of everything: small chunks, a small pool, few requests."""
    return stage.world("pressured", pressured_world)


@pytest.fixture
def alone(stage: Stage) -> World:
    """What the server under pressure stored, on one that runs one request at a time."""
    return stage.world("alone", alone_world)


@pytest.fixture
def off(stage: Stage) -> World:
    """float32 without the plug-in's flag, beside SGLang without the plug-in."""
    return stage.world("off", off_world)


@pytest.fixture
def agents(stage: Stage) -> World:
    """float32 with agents: killed in the middle of two runs, and started again."""
    return stage.world("agents", agents_world)
