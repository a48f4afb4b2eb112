"""A rank of SGLang's own parts, over either of its tree cores."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sglang.srt.mem_cache import utils

from engram.sglang_plugin.keys import replace_native_hash
from engram.store.disk import DiskStore
from engram.testing.samples import seeded_random
from unit.sglang_plugin.tree import NewRank, Rank, sglang_settings


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store") as store:
        yield store


@pytest.fixture(params=["python", "rust"])
def new_rank(
    request: pytest.FixtureRequest, store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NewRank]:
    # As the plug-in does in a scheduler: nothing is compiled.
    monkeypatch.setattr(utils, "get_native_hash", replace_native_hash)
    made: list[Rank] = []

    def new(capacity: int = 1 << 24, **options: Any) -> Rank:
        made.append(Rank(store, core=request.param, capacity=capacity, **options))
        return made[-1]

    with sglang_settings():
        yield new
        for rank in made:
            rank.close()


@pytest.fixture
def rank(new_rank: NewRank) -> Rank:
    return new_rank()
