"""Kept replies of `/v1/responses`."""

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InvalidRequestError, StoreError, StoreFormatError
from engram.snapshot import response
from engram.snapshot.envelope import seal_record
from engram.snapshot.response import (
    ResponseRecord,
    decode_response,
    encode_response,
    response_name,
)
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.testing.samples import seeded_random

BODY = {"version": 1, "response_id": "resp_a", "response": "{}", "usage": "null", "messages": "[]"}


def record(response_id: str = "resp_a", messages: str = "[]") -> ResponseRecord:
    return ResponseRecord(response_id=response_id, response="{}", usage="null", messages=messages)


@given(st.text(min_size=1, max_size=255).filter(str.isprintable))
def test_every_record_comes_back(response_id: str) -> None:
    one = record(response_id, '[{"b": 1, "a": "\\ud800"}]')
    assert decode_response(encode_response(one)) == one


@pytest.mark.parametrize(
    "changes",
    [
        {"response_id": ""},
        {"response_id": "x" * 256},
        {"response_id": 1},
        {"response": {}},
        {"response": "{"},
        {"usage": ""},
        {"messages": "[" * 100_000},
        {"more": 1},
        {"version": 2},
        {"version": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_is_not_one_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Input should|String should|Extra|not JSON|canonical"):
        decode_response(seal_record({**BODY, **changes}))


def test_a_flipped_bit_is_seen() -> None:
    data = encode_response(record())
    for position in range(len(data) * 8):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"not |digest"):
            decode_response(bytes(changed))


def test_a_store_keeps_the_newest_of_each(tmp_path: Path) -> None:
    ids = ["resp_a", "../resp", "resp_\0", "\ud800"]
    with DiskStore.open(tmp_path) as store:
        assert [store.get_response(one) for one in ids] == [None] * 4
        for one in (record("resp_a"), record("resp_a", "[1]"), record("../resp")):
            store.put_response(one)
    with DiskStore.open(tmp_path) as store:
        assert store.get_response("resp_a") == record("resp_a", "[1]")
        assert store.get_response("../resp") == record("../resp")
        assert store.get_response("\ud800") is None
    files = [path for path in tmp_path.rglob("*.json") if "responses" in path.parts]
    assert sorted(path.name for path in files) == sorted(map(response_name, ids[:2]))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_one_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response, "MAX_RESPONSE_BYTES", 300)
    with DiskStore.open(tmp_path) as store:
        store.put_response(record())
        with pytest.raises(InvalidRequestError, match=r"'resp_a' has \d+ bytes, over the limit"):
            store.put_response(record(messages='["' + "x" * 300 + '"]'))
        assert store.get_response("resp_a") == record()


def test_damage_is_moved_aside_and_a_newer_version_is_left(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with DiskStore.open(tmp_path) as store:
        for name in "abc":
            store.put_response(record(name))
        files = {name: layout.response(record(name).name) for name in "abc"}
        files["b"].write_bytes(files["a"].read_bytes())
        files["c"].write_bytes(seal_record({"version": 2, "text": ""}))
        assert store.get_response("a") == record("a")
        assert store.get_response("b") is None
        assert store.health().quarantined == 1
        with pytest.raises(StoreFormatError, match="the record of response 'c' has format version"):
            store.get_response("c")
        assert files["c"].exists()


def test_the_oldest_go(tmp_path: Path) -> None:
    numbers, layout = seeded_random(), Layout(tmp_path)
    ages = numbers.sample(range(10_000), 20)
    with DiskStore.open(tmp_path) as store:
        assert store.trim_responses(5, 10, 100.0) == 0
        for age in ages:
            store.put_response(record(f"resp_{age}"))
            then = time.time() - age
            os.utime(layout.response(record(f"resp_{age}").name), (then, then))

        def kept() -> list[int]:
            return [age for age in sorted(ages) if store.get_response(f"resp_{age}")]

        assert store.trim_responses(15, 1 << 20, 1e6) == 5
        assert kept() == sorted(ages)[:15]
        limit = (sorted(ages)[7] + sorted(ages)[8]) / 2
        assert store.trim_responses(15, 1 << 20, limit) == 7
        assert kept() == sorted(ages)[:8]
        sizes = {age: len(encode_response(record(f"resp_{age}"))) for age in kept()}
        assert store.trim_responses(15, sum(sizes[age] for age in kept()[:3]), 1e6) == 5
        assert kept() == sorted(ages)[:3]


def test_what_cannot_be_listed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DiskStore.open(tmp_path) as store:
        store.put_response(record())

        def refuse(path: object = ".") -> object:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "scandir", refuse)
        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(StoreError, match="cannot list"):
            store.trim_responses(0, 0, 0.0)
        monkeypatch.undo()
        assert store.get_response("resp_a") == record()
