from random import Random

import pytest

from engram.testing.samples import seeded_random


@pytest.fixture
def rng() -> Random:
    return seeded_random()
