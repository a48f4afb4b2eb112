"""Random histories of every family: a server that ends every 50 says what one says that does not.

ENGRAM_HISTORY_COUNT histories without branches a family (1,000 unless it says otherwise), compared
bit by bit in bfloat16, and a fifth as many that branch, compared in float32.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Protocol

import pytest

from e2e.exactness import Variant
from e2e.helpers import Client
from e2e.worlds import launcher
from engram.testing.samples import drawn_seed
from engram.testing.tiny_model import FAMILIES, write_tiny_model
from histories import linear, trees
from histories.results import KINDS, record

COUNT = int(os.environ.get("ENGRAM_HISTORY_COUNT", "1000"))
A_RESTART = 50
TIMEOUT_S = 4 * 3600

MORE = ("--snapshot-trigger-policy", "manual_only", "--max-warm-conversations", "10000")
FLAGS = {"--max-total-tokens": "16384", "--max-mamba-cache-size": "128"}


class Play(Protocol):
    def start(self, client: Client) -> None: ...
    def finish(self, client: Client) -> None: ...
    def check(self) -> None: ...


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_histories_have_the_bits_of_an_uninterrupted_server(tmp_path: Path, family: str) -> None:
    variant, seed = Variant(family, KINDS["linear"]), drawn_seed()
    numbers = Random(seed)
    counts: Counter[str] = Counter()

    def plays() -> Iterator[tuple[Play, bool]]:
        for number, count in enumerate(_blocks(COUNT)):
            block = linear.draw_block(numbers, number, count)
            yield linear.Play(block, variant.boundary, counts), block.killed

    play_all(tmp_path, variant, plays)
    print(f"{family}: {dict(counts)}")  # noqa: T201  for the report of a run
    assert counts["histories"] == COUNT
    assert counts["killed"] + counts["stopped"] == len(_blocks(COUNT))
    record(family, "linear", seed, counts)


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_branches_say_what_an_uninterrupted_server_says(tmp_path: Path, family: str) -> None:
    variant, seed = Variant(family, KINDS["branching"]), drawn_seed()
    numbers = Random(seed)
    counts: Counter[str] = Counter()
    total = max(1, COUNT // 5)

    def plays() -> Iterator[tuple[Play, bool]]:
        for number, count in enumerate(_blocks(total)):
            forest = trees.draw_forest(numbers, number, count)
            yield trees.Play(forest, variant.boundary, counts, numbers), forest.killed

    play_all(tmp_path, variant, plays)
    print(f"{family}, branches: {dict(counts)}")  # noqa: T201  for the report of a run
    assert counts["histories"] == total
    record(family, "branching", seed, counts)


def _blocks(total: int) -> list[int]:
    """So many histories in blocks, of each of which the server ends once."""
    return [min(A_RESTART, total - done) for done in range(0, total, A_RESTART)]


def play_all(
    folder: Path, variant: Variant, plays: Callable[[], Iterator[tuple[Play, bool]]]
) -> None:
    """Every play, each over one end of the server; the next starts on what that left."""
    model = write_tiny_model(folder / "model", variant.family, seed=1, dtype=variant.dtype)
    args = [*_flags(variant), *MORE, "--snapshot-dir", str(folder / "snapshots")]
    server = launcher()(model, args, variant.env, folder / "server.log", timeout=600)
    with server:
        client = Client(server.url)
        for play, killed in plays():
            play.start(client)
            server.kill() if killed else server.stop()
            server.start()
            play.finish(client)
            play.check()


def _flags(variant: Variant) -> list[str]:
    flags = list(variant.flags)
    for name, value in FLAGS.items():
        flags[flags.index(name) + 1] = value
    return flags
