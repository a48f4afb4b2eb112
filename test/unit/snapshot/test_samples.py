"""The builders other tests stand on."""

from random import Random

import pytest

from engram.snapshot.segment import SegmentHeader
from engram.testing.samples import SEED_VARIABLE, sample_chain, seeded_random


def test_a_seed_from_the_environment_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "5")
    assert seeded_random().random() == Random(5).random()


def test_the_seed_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(SEED_VARIABLE, raising=False)
    value = seeded_random().random()
    seed = capsys.readouterr().out.strip().removeprefix(f"{SEED_VARIABLE}=")
    assert Random(int(seed)).random() == value


def test_a_chain_is_one() -> None:
    chain = sample_chain(seeded_random(), (3, 1, 2))
    assert [(s.header.start, s.header.end) for s in chain] == [(0, 3), (3, 4), (4, 6), (6, 6)]
    assert [s.header.parent for s in chain] == [None, *(s.segment_id for s in chain[:-1])]
    assert [s.header.has_state for s in chain] == [False, False, False, True]
    assert all(SegmentHeader.decode(s.header.prefix) == s.header for s in chain)
    assert all(s.ref.bytes == len(s.file) for s in chain)
