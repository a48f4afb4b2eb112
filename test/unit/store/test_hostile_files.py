"""Hostile files, a few thousand of them; `scripts/test --faults` runs a hundred thousand."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engram.snapshot import envelope
from engram.snapshot.segment import SegmentHeader
from engram.store import keyring, marker, record_files, segment_files
from faults.hostile import run
from faults.hostile_child import judge
from faults.mutations import BYTES, mutate_json


def test_hostile_files_are_refused_or_right(tmp_path: Path) -> None:
    judge(tmp_path, cases=2000)


def broken(tmp_path: Path, kind: str, cases: int = 100) -> int:
    """How many cases of a kind are found wrong."""
    return len(run(tmp_path / kind, range(cases), 9, only=kind).wrong)


def test_the_run_is_the_same_again(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, range(150), 5) for name in ("one", "two"))
    assert one.outcomes == two.outcomes
    assert one.wrong == two.wrong == []


def test_a_store_that_does_not_compare_digests_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_files, "check_sealed", lambda *_: None)
    assert broken(tmp_path, "segment", cases=600)


def test_a_record_whose_digest_is_not_compared_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(data: bytes) -> Any:
        try:
            body = json.loads(data)["body"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        if not isinstance(body, dict):
            raise ValueError("no object")
        return body

    assert envelope.open_record is not careless
    for module in (keyring, marker):
        monkeypatch.setattr(module, "open_record", careless)
    assert broken(tmp_path, "marker")
    assert broken(tmp_path, "keyring")


def test_a_size_that_is_believed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header's sizes are compared with the file's before memory is set aside."""
    real = segment_files._read_header

    def believing(read: Any, size: int, shard: Any, segment_id: str) -> SegmentHeader:
        header: SegmentHeader | None = None
        try:
            return real(read, size, shard, segment_id)
        except segment_files.SegmentCorruptError as error:
            if "instead of" not in error.message:
                raise
            prefix = bytearray(segment_files.payload_offset(_first(read)))
            read(memoryview(prefix), 0)
            header = SegmentHeader.decode(bytes(prefix))
        return header

    monkeypatch.setattr(segment_files, "_read_header", believing)
    assert broken(tmp_path, "segment")


def _first(read: Any) -> bytes:
    preamble = bytearray(16)
    read(memoryview(preamble), 0)
    return bytes(preamble)


def test_damage_that_is_left_in_its_place_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_files.Quarantine, "take", lambda *_: None)
    assert record_files.Quarantine is segment_files.Quarantine
    for kind in ("manifest", "segment", "encrypted segment", "namespace"):
        assert broken(tmp_path, kind, cases=20), kind


def test_every_way_to_change_bytes_changes_them() -> None:
    rng = Random(3)
    data, others = rng.randbytes(9000), [rng.randbytes(5000)]
    for name, mutate in BYTES.items():
        assert any(mutate(rng, data, others) != data for _ in range(5)), name
    texts = {mutate_json(rng, {"a": [1, {"b": "c"}], "d": None})[1] for _ in range(300)}
    assert len(texts) > 100
