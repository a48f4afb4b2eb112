"""What is seen of a recurrent state while it is copied, and what becomes of one that fails."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from engram.core.settings import Settings
from engram.errors import StateUnhealthyError
from engram.store.disk import DiskStore
from engram.testing.samples import SHARD, seeded_random
from engram.tiers.base import DeviceReader, Segment
from engram.tiers.health import MAX_DRIFT, HealthPolicy, StateCheck, StateHealth
from engram.tiers.manager import TierManager
from engram.tiers.ram import RamTier
from unit.tiers.device import SLOTS, STATES, FakeDevice, TokenRun, random_run

WAIT_S = 60
BAD = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}


@pytest.fixture
def rng() -> Random:
    return seeded_random()


def random_buffer(rng: Random, dtype: torch.dtype) -> torch.Tensor:
    shape = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 5))]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("norm", [True, False])
def test_one_bad_value_among_many_is_found_and_its_buffer_named(
    rng: Random, dtype: torch.dtype, bad: str, norm: bool
) -> None:
    for _ in range(20):
        buffers = [random_buffer(rng, dtype) for _ in range(rng.randrange(1, 5))]
        check = StateCheck(norm=norm)
        for number, buffer in enumerate(buffers):
            check.look(f"ssm.{number}", buffer)
        assert check.result().problem is None
        chosen = rng.randrange(len(buffers))
        flat = buffers[chosen].view(-1)
        flat[rng.randrange(len(flat))] = BAD[bad]
        check = StateCheck(norm=norm)
        for number, buffer in enumerate(buffers):
            check.look(f"ssm.{number}", buffer)
        kind = "a NaN" if bad == "NaN" else "an infinity"
        assert check.result() == StateHealth(f"ssm.{chosen} holds {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_and_smallest_numbers_are_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, -limits.tiny, 0.0], dtype=dtype)
    check = StateCheck(norm=True)
    check.look("ssm.0", values)
    found = check.result()
    assert found.problem is None
    assert found.norm == pytest.approx(math.sqrt(2) * limits.max, rel=1e-6)


def test_the_norm_is_of_all_buffers_together(rng: Random) -> None:
    buffers = [random_buffer(rng, torch.float32) for _ in range(3)]
    check = StateCheck(norm=True)
    for buffer in buffers:
        check.look("any", buffer)
    check.look("integers are always healthy", torch.tensor([7]))
    expected = math.sqrt(sum(float(buffer.double().pow(2).sum()) for buffer in buffers))
    assert check.result().norm == pytest.approx(expected, rel=1e-12)
    assert StateCheck(norm=True).result() == StateHealth(), "a model without a state"


@pytest.mark.parametrize(
    ("before", "now", "drifts"),
    [
        (1.0, 1.0, False),
        (1.0, MAX_DRIFT, False),
        (1.0, MAX_DRIFT * 1.01, True),
        (MAX_DRIFT * 1.01, 1.0, True),
        (None, 1e30, False),
        (1.0, None, False),
        (0.0, 0.0, False),
        (0.0, 1.0, True),
    ],
)
def test_drift_is_growing_or_shrinking_by_more_than_the_factor(
    before: float | None, now: float | None, drifts: bool
) -> None:
    assert (StateHealth(norm=now).drift(before) is not None) == drifts


def test_the_policy_is_what_the_flags_say() -> None:
    assert HealthPolicy.of(Settings()) == HealthPolicy(interval=0, keep=False)
    settings = Settings(
        snapshot_health_check_interval=3, snapshot_health_failure_policy="log_and_continue"
    )
    assert HealthPolicy.of(settings) == HealthPolicy(interval=3, keep=True)


# ---- in the tiers ----


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store") as store:
        yield store


class Setup:
    """A manager over a device whose states are numbers, each `scale` times a fixed one."""

    def __init__(self, rng: Random, store: DiskStore, policy: HealthPolicy) -> None:
        self.rng = rng
        self.device = FakeDevice(rng)
        self.manager = TierManager(
            RamTier(1 << 20), store, SHARD, self.device.layout, True, health=policy
        )

    def capture(self, run: TokenRun, number: int, *values: float) -> Segment | None:
        """Capture part `number` of a run, its state all ones but for `values`; once it is done."""
        start = run.ends[number - 1] if number else 0
        parent = self.manager.ram.get(run.keys[start - 1], False) if start else None
        slots = self.rng.sample(range(SLOTS), run.ends[number] - start)
        state = torch.ones_like(self.device.buffers["ssm.1"][0])
        state.view(-1)[: len(values)] = torch.tensor(values)
        slot = self.rng.randrange(STATES)
        self.device.buffers["ssm.1"][slot] = state
        done = threading.Event()
        key = run.keys[run.ends[number] - 1]
        tokens = run.tokens[start : run.ends[number]]
        read: DeviceReader = self.device.reader(slots, slot)
        assert self.manager.capture(key, start, tokens, parent, read, on_done=done.set)
        boundary = self.manager.boundary(key)
        assert done.wait(WAIT_S)
        return boundary


@pytest.mark.parametrize("bad", BAD)
def test_a_state_that_fails_is_not_kept_and_a_save_says_why(
    rng: Random, store: DiskStore, bad: str
) -> None:
    setup, run = Setup(rng, store, HealthPolicy()), random_run(rng, (4, 3))
    first = setup.capture(run, 0)
    assert first is not None
    used = setup.manager.ram.used
    boundary = setup.capture(run, 1, BAD[bad])
    assert setup.manager.boundary(run.keys[-1]) is None
    assert setup.manager.ram.used == used, "neither the state nor its rows"
    assert setup.manager.ram.stats.unhealthy == 1
    assert boundary is not None
    with pytest.raises(StateUnhealthyError, match=r"state at token 7 .*: ssm\.1 holds") as caught:
        setup.manager.persist(boundary).result(WAIT_S)
    assert caught.value.details["boundary"] == 7
    assert setup.manager.persist(first).result(WAIT_S).health is None
    assert len(list(store.iter_segments())) == 2, "of the first turn alone"
    setup.manager.close()


def test_a_state_that_fails_is_kept_with_a_mark_where_that_is_asked_for(
    rng: Random, store: DiskStore
) -> None:
    setup, run = Setup(rng, store, HealthPolicy(keep=True)), random_run(rng, (4,))
    boundary = setup.capture(run, 0, math.nan)
    assert boundary is not None
    assert setup.manager.persist(boundary).result(WAIT_S).health == "ssm.1 holds a NaN"
    setup.manager.close()


@pytest.mark.parametrize("interval", [0, 1, 2])
def test_a_norm_is_compared_with_that_of_the_state_so_many_boundaries_before(
    rng: Random, store: DiskStore, interval: int
) -> None:
    """Norms of 1, 4, 16 and 64: four times a step."""
    setup = Setup(rng, store, HealthPolicy(interval=interval, keep=True))
    run = random_run(rng, (2, 2, 2, 2))
    healths = []
    for number, norm in enumerate((1.0, 4.0, 16.0, 64.0)):
        count = setup.device.buffers["ssm.1"][0].numel()
        boundary = setup.capture(run, number, *([norm / math.sqrt(count)] * count))
        assert boundary is not None
        healths.append(boundary.health)
    expected = [None, None, "1 to 16", "4 to 64"] if interval == 2 else [None] * 4
    assert [health and health.removeprefix("the norm went from ") for health in healths] == expected
    setup.manager.close()
