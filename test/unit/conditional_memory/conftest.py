"""Seeds that a failing test prints, and the backends that hash here."""

import random

import pytest
import torch

from engram.conditional_memory import kernel


@pytest.fixture
def seed() -> int:
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it with a failure
    torch.manual_seed(seed)
    return seed


@pytest.fixture(params=["numpy", "torch", "kernel"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "kernel" and kernel.load() is None:
        pytest.skip("engram_kernel is not installed")
    return request.param
