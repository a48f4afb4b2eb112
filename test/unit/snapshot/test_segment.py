"""Segments: planning, round trips, digests, and the bytes a file really has."""

import json
import struct
from random import Random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InternalError, InvalidRequestError, SegmentCorruptError
from engram.snapshot import digest as digest_module
from engram.snapshot.digest import pieces, seal, verify
from engram.snapshot.dtypes import ITEM_BYTES
from engram.snapshot.segment import (
    MAX_HEADER_BYTES,
    PREAMBLE,
    SegmentHeader,
    Shard,
    payload_offset,
)
from engram.testing.samples import SHARD, sample_segment, seeded_random

HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
BUFFERS = st.lists(
    st.tuples(
        st.from_regex(r"[A-Za-z0-9._/-]{1,20}", fullmatch=True).filter(lambda n: n != "tokens"),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(1, 5), max_size=4),
    ),
    max_size=6,
    unique_by=lambda buffer: buffer[0],
)


@st.composite
def headers(draw: st.DrawFn) -> SegmentHeader:
    has_state = draw(st.booleans())
    start = draw(st.integers(int(has_state), 1000))
    world_size = draw(st.integers(1, 9))
    return SegmentHeader.plan(
        shard=Shard(draw(HEX), draw(st.integers(0, world_size - 1)), world_size),
        key=draw(HEX),
        start=start,
        end=start if has_state else start + draw(st.integers(1, 40)),
        parent=draw(HEX) if start else None,
        has_state=has_state,
        buffers=draw(BUFFERS.filter(bool) if has_state else BUFFERS),
    )


@given(headers())
def test_a_header_comes_back(header: SegmentHeader) -> None:
    assert SegmentHeader.decode(header.prefix) == header
    assert payload_offset(header.prefix[: PREAMBLE.size]) == len(header.prefix)


@given(headers())
def test_the_layout_keeps_the_rules_of_the_format(header: SegmentHeader) -> None:
    magic, version, length = struct.unpack_from("<8sII", header.prefix)
    assert (magic, version) == (b"ENGRSEG\0", 1)
    body = json.loads(header.prefix[16 : 16 + length])
    assert list(body) == sorted(body)
    assert len(header.prefix) % 4096 == 0
    assert not any(header.prefix[16 + length :])
    position = 0
    for buffer in body["buffers"]:
        assert buffer["offset"] % 64 == 0
        assert position <= buffer["offset"] < position + 64
        position = buffer["offset"] + buffer["length"]
    assert header.payload_length == position
    assert (body["buffers"][0]["name"] == "tokens") is not body["has_state"]
    assert header.file_length == len(header.prefix) + position + 32


@given(headers(), st.randoms(use_true_random=False))
def test_a_seal_is_blake3_of_all_that_comes_before(header: SegmentHeader, rng: Random) -> None:
    payload = memoryview(bytearray(rng.randbytes(header.payload_length)))
    header.clear_padding(payload)
    digest = seal(header, payload)
    assert digest == blake3(header.prefix + bytes(payload)).digest()
    verify(header, payload, digest)


def test_clearing_touches_the_padding_only() -> None:
    header = sample_segment(seeded_random()).header
    payload = memoryview(bytearray(b"\xff" * header.payload_length))
    assert not header.padding_is_zero(payload)
    header.clear_padding(payload)
    assert header.padding_is_zero(payload)
    for buffer in header.buffers:
        assert set(header.view(payload, buffer.name)) == {0xFF}
    assert bytes(payload).count(0) == header.payload_length - sum(b.length for b in header.buffers)


def test_verify_refuses_another_digest_and_bytes_in_the_padding() -> None:
    segment = sample_segment(seeded_random())
    payload = memoryview(bytearray(segment.payload))
    verify(segment.header, payload, bytes.fromhex(segment.segment_id))
    with pytest.raises(SegmentCorruptError, match="digest"):
        verify(segment.header, payload, bytes(32))
    (start, _), *_ = segment.header.gaps()
    payload[start] = 1
    with pytest.raises(SegmentCorruptError, match="between its buffers"):
        verify(segment.header, payload, seal(segment.header, payload))


def test_a_payload_longer_than_a_piece_is_hashed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "PIECE_BYTES", 100)
    segment = sample_segment(seeded_random(), length=50)
    assert len(list(pieces(memoryview(segment.payload)))) > 3
    assert seal(segment.header, memoryview(segment.payload)).hex() == segment.segment_id


def test_a_buffer_may_be_of_any_type_if_its_bytes_fit() -> None:
    numpy = pytest.importorskip("numpy")
    segment = sample_segment(seeded_random())
    array = numpy.frombuffer(segment.payload, dtype="u1").copy()
    assert seal(segment.header, memoryview(array)).hex() == segment.segment_id
    two_dimensional = memoryview(array[:, None])
    assert seal(segment.header, two_dimensional).hex() == segment.segment_id
    strided = memoryview(numpy.repeat(array, 2)[::2])
    with pytest.raises(InternalError, match="contiguous"):
        seal(segment.header, strided)


PLAN = {
    "shard": SHARD,
    "key": "ab" * 32,
    "start": 0,
    "end": 4,
    "parent": None,
    "has_state": False,
    "buffers": [],
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shard": Shard("ab", 0, 1)}, "namespace"),
        ({"shard": Shard("AB" * 32, 0, 1)}, "namespace"),
        ({"shard": Shard("ab" * 32, 1, 1)}, "rank is not below world_size"),
        ({"shard": Shard("ab" * 32, -1, 1)}, "rank"),
        ({"shard": Shard("ab" * 32, 0, 0)}, "world_size"),
        ({"key": "ab"}, "key"),
        ({"key": "ab" * 32 + "\n"}, "key"),
        ({"end": 0}, "end is not after start"),
        ({"start": 5}, "end is not after start"),
        ({"start": 2}, "parent must be null exactly when start is 0"),
        ({"parent": "ab" * 32}, "parent must be null exactly when start is 0"),
        ({"has_state": 1}, "has_state"),
        ({"has_state": True}, "the end of a state is its start"),
        ({"has_state": True, "start": 0, "end": 0}, "the end of a state is its start, and not 0"),
        ({"has_state": True, "start": 4}, "parent must be null"),
        ({"has_state": True, "start": 4, "parent": "ab" * 32}, "a segment must have a buffer"),
        (
            {
                "has_state": True,
                "start": 4,
                "parent": "ab" * 32,
                "buffers": [("tokens", "U32", (4,))],
            },
            "a state has no 'tokens'",
        ),
        ({"buffers": [("kv", "F33", (1,))]}, "unknown dtype 'F33'"),
        ({"buffers": [("kv", "F32", (0,))]}, "buffers"),
        ({"buffers": [("kv", "F32", (-1, -1))]}, "buffers"),
        ({"buffers": [("kv", "F32", (1,) * 9)]}, "buffers"),
        ({"buffers": [("", "F32", (1,))]}, "name"),
        ({"buffers": [("k v", "F32", (1,))]}, "name"),
        ({"buffers": [("n" * 129, "F32", (1,))]}, "name"),
        ({"buffers": [("kv", "F32", (1,)), ("kv", "F32", (1,))]}, "two buffers have one name"),
        ({"buffers": [("tokens", "F32", (1,))]}, "two buffers have one name"),
        ({"buffers": [("kv", "F32", (2**53,))]}, "buffers"),
        ({"buffers": [(f"kv.{i}", "F32", (1,)) for i in range(20_000)]}, str(MAX_HEADER_BYTES)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_plan_the_format_does_not_allow_is_refused(change: dict, problem: str) -> None:
    assert SegmentHeader.plan(**PLAN).end == 4
    with pytest.raises(InvalidRequestError, match=problem):
        SegmentHeader.plan(**{**PLAN, **change})


def test_views() -> None:
    segment = sample_segment(seeded_random())
    payload = memoryview(segment.payload)
    tokens = segment.header.view(payload, "tokens")
    assert struct.unpack(f"<{len(segment.tokens)}I", tokens) == segment.tokens
    assert segment.header.tokens_length == len(tokens)
    with pytest.raises(KeyError):
        segment.header.view(payload, "kv.9")
