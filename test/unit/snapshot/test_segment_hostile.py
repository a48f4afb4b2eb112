"""Hostile segment headers: one row a rejection."""

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

from engram.core.canonical import canonical_json
from engram.errors import SegmentCorruptError, StoreFormatError
from engram.snapshot.digest import verify
from engram.snapshot.segment import MAX_HEADER_BYTES, SegmentHeader, payload_offset
from engram.testing.samples import sample_segment, sample_state, seeded_random


def header_body() -> dict[str, Any]:
    return sample_segment(seeded_random()).header.model_dump(mode="json")


def with_header(encoded: bytes, *, magic: bytes = b"ENGRSEG\0", version: int = 1) -> bytes:
    start = struct.pack("<8sII", magic, version, len(encoded)) + encoded
    return start + b"\0" * (-len(start) % 4096)


def changed(path: list[str | int], value: Any) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        target: Any = body
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


def removed(path: list[str | int]) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        target: Any = body
        for step in path[:-1]:
            target = target[step]
        del target[path[-1]]

    return change


def test_the_builder_of_these_tests_builds_a_valid_header() -> None:
    segment = sample_segment(seeded_random())
    body = segment.header.model_dump(mode="json")
    assert with_header(canonical_json(body)) == segment.header.prefix


HEX = "ab" * 32
FIELDS = [
    "namespace",
    "rank",
    "world_size",
    "key",
    "start",
    "end",
    "parent",
    "has_state",
    "buffers",
]
BUFFER_FIELDS = ["name", "dtype", "shape", "offset", "length"]
WRONG_VALUES = [None, 1.5, "1", True, [], {}, float("nan"), -1, 2**60]
# Of these, the ones that are valid where they stand.
ALLOWED = [("parent", None), ("name", "1")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (path, value)
        for path in [*([field] for field in FIELDS), *(["buffers", 1, f] for f in BUFFER_FIELDS)]
        for value in WRONG_VALUES
        if (path[-1], value) not in ALLOWED
    ],
    ids=repr,
)
def test_a_field_of_the_wrong_type(path: list[str | int], value: object) -> None:
    body = header_body()
    changed(path, value)(body)
    encoded = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(SegmentCorruptError, match="segment header"):
        SegmentHeader.decode(with_header(encoded))


@pytest.mark.parametrize(
    "path", [*([field] for field in FIELDS), *(["buffers", 1, f] for f in BUFFER_FIELDS)], ids=repr
)
def test_a_field_that_is_missing(path: list[str | int]) -> None:
    body = header_body()
    removed(path)(body)
    with pytest.raises(SegmentCorruptError, match="Field required"):
        SegmentHeader.decode(with_header(canonical_json(body)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(["more"], 1), "more: Extra"),
        (changed(["buffers", 0, "more"], 1), "buffers.0.more: Extra"),
        (changed(["rank"], 1), "rank is not below"),
        (changed(["end"], 0), "end is not after start"),
        (changed(["end"], 6), "'tokens' must have one entry"),
        (changed(["start"], 1), "parent must be null"),
        (changed(["parent"], HEX), "parent must be null"),
        (changed(["key"], HEX.upper()), "key"),
        (changed(["buffers"], []), "a segment must have a buffer"),
        (changed(["has_state"], True), "the end of a state is its start"),
        (changed(["buffers", 0, "name"], "ids"), "first buffer must be 'tokens'"),
        (changed(["buffers", 0, "dtype"], "I32"), "first buffer must be 'tokens'"),
        (changed(["buffers", 0, "dtype"], "u32"), "unknown dtype"),
        (changed(["buffers", 1, "name"], "tokens"), "two buffers have one name"),
        (changed(["buffers", 1, "offset"], 0), "does not follow"),  # overlaps the tokens
        (changed(["buffers", 1, "offset"], 20), "does not follow"),  # not aligned
        (changed(["buffers", 1, "offset"], 128), "does not follow"),  # leaves a hole
        (changed(["buffers", 0, "offset"], 64), "does not follow"),
        (changed(["buffers", 1, "length"], 61), "not the size of its shape"),
        (changed(["buffers", 1, "shape"], [5, 2, 0]), "shape"),
        (changed(["buffers", 1, "shape"], [2**40, 2**40]), "not the size of its shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_contradicts_itself(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    body = header_body()
    change(body)
    with pytest.raises(SegmentCorruptError, match=problem):
        SegmentHeader.decode(with_header(canonical_json(body)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(["end"], 6), "the end of a state is its start"),
        (changed(["has_state"], False), "end is not after start"),
        (changed(["parent"], None), "parent must be null exactly"),
        (changed(["buffers", 0, "name"], "tokens"), "a state has no 'tokens'"),
        (changed(["buffers"], []), "a segment must have a buffer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_contradicts_itself(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    rng = seeded_random()
    body = sample_state(rng, sample_segment(rng)).header.model_dump(mode="json")
    change(body)
    with pytest.raises(SegmentCorruptError, match=problem):
        SegmentHeader.decode(with_header(canonical_json(body)))


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text.replace(b",", b", ", 1),
        lambda text: text + b" ",
        lambda text: b" " + text,
        lambda text: text.replace(b'"rank":0', b'"rank":0,"rank":0'),
        lambda text: text.replace(b'"rank":0', b'"rank":1,"rank":0'),
        lambda text: text.replace(b'"rank":0', b'"rank":0.0'),
        lambda text: text.replace(b'"rank":0', b'"rank":-0'),
        lambda text: text.replace(b'"rank":0', b'"rank":0e0'),
        lambda text: text.replace(b'"rank"', b'"r\\u0061nk"'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode(),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.replace(b"kv.0", b"kv.\xff"),
        lambda text: text[:-1],
        lambda text: b"[" * 5000,
        lambda text: b"{}",
        lambda text: b"null",
    ],
)
def test_only_the_canonical_spelling_is_accepted(respell: Callable[[bytes], bytes]) -> None:
    text = canonical_json(header_body())
    assert respell(text) != text
    with pytest.raises(SegmentCorruptError, match="segment header"):
        SegmentHeader.decode(with_header(respell(text)))


def test_magic_version_and_length() -> None:
    text = canonical_json(header_body())
    with pytest.raises(SegmentCorruptError, match="magic"):
        SegmentHeader.decode(with_header(text, magic=b"ENGRSEG1"))
    with pytest.raises(StoreFormatError, match="a segment has format version 2") as caught:
        SegmentHeader.decode(with_header(text, version=2))
    assert caught.value.details["found"] == 2
    for length in (0, 1, MAX_HEADER_BYTES + 1, 2**32 - 1):
        with pytest.raises(SegmentCorruptError, match=f"header length {length} is out of bounds"):
            payload_offset(struct.pack("<8sII", b"ENGRSEG\0", 1, length))


def test_the_prefix_must_be_whole_and_its_padding_zero() -> None:
    prefix = sample_segment(seeded_random()).header.prefix
    for length in (0, 1, 15, 16, 100, len(prefix) - 1):
        with pytest.raises(SegmentCorruptError, match="short"):
            SegmentHeader.decode(prefix[:length])
    with pytest.raises(SegmentCorruptError, match="short"):
        SegmentHeader.decode(prefix + b"\0")
    with pytest.raises(SegmentCorruptError, match="canonical"):
        SegmentHeader.decode(prefix[:-1] + b"\1")


def test_no_flipped_bit_goes_unnoticed() -> None:
    segment = sample_segment(seeded_random(), length=2)
    whole = segment.file
    prefix = len(segment.header.prefix)
    encoded = len(segment.header.prefix.rstrip(b"\0"))
    # All of the file but the long run of zeros, of which every 61st byte.
    positions = [*range(encoded), *range(encoded, prefix, 61), *range(prefix, len(whole))]
    for position in positions:
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            with pytest.raises((SegmentCorruptError, StoreFormatError)):
                check_file(damaged, prefix)


def check_file(data: bytearray, prefix: int) -> None:
    header = SegmentHeader.decode(bytes(data[:prefix]))
    verify(header, memoryview(data)[prefix:-32], bytes(data[-32:]))
