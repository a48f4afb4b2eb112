"""Manifests: round trips, what they must fulfil, and hostile bytes, one row a rejection."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from engram.core.canonical import canonical_json
from engram.errors import InvalidRequestError, ManifestCorruptError, StoreFormatError
from engram.snapshot.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_USER_METADATA_BYTES,
    Manifest,
    change_manifest,
    decode_manifest,
    encode_manifest,
    make_manifest,
)
from engram.snapshot.segment import Shard
from engram.testing.samples import SHARD, sample_chain, sample_manifest, seeded_random

HEX = "ab" * 32


def a_manifest(**changes: Any) -> Manifest:
    return sample_manifest([sample_chain(seeded_random())], **changes)


def sealed(body: object) -> bytes:
    """A manifest file around any body, well formed or not."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return b'{"blake3":"' + blake3(text).hexdigest().encode() + b'","body":' + text + b"}\n"


def body_of(manifest: Manifest) -> dict[str, Any]:
    return json.loads(encode_manifest(manifest))["body"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = st.from_regex(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,20}", fullmatch=True)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    rng = draw(st.randoms(use_true_random=False))
    world_size = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    chains = []
    for rank in range(world_size):
        chain = sample_chain(rng, lengths, shard=Shard(SHARD.namespace, rank, world_size))
        chains.append(chain)
    # The tokens are random for each rank here; the boundary key must be theirs in common.
    refs = [[segment.ref for segment in chain] for chain in chains]
    key = refs[0][-1].key
    stateful = draw(st.booleans())
    for chain_refs in refs:
        chain_refs[-2:] = [ref.model_copy(update={"key": key}) for ref in chain_refs[-2:]]
        if not stateful:
            chain_refs.pop()
    total = sum(ref.bytes for chain_refs in refs for ref in chain_refs)
    return sample_manifest(
        chains,
        segments=refs,
        bytes=total,
        snapshot_id=draw(IDS),
        tenant=draw(IDS | st.just("")),
        conversation_id=draw(IDS),
        branch_name=draw(IDS),
        turn_number=draw(st.integers(0, 10**6)),
        parent_snapshot=draw(st.none() | IDS),
        created_at=draw(st.floats(0, 1e12)),
        model_name=draw(TEXT),
        layer_config={"num_layers": draw(st.integers(1, 200)), "model_type": draw(TEXT)},
        pending_tokens=draw(st.lists(st.integers(0, 2**32 - 1), max_size=4)),
        durability=draw(st.sampled_from(["sync", "async"])),
        unique_bytes=draw(st.integers(0, total)),
        health=draw(st.none() | TEXT),
        user_metadata=draw(st.dictionaries(TEXT, JSON_VALUES, max_size=4)),
        pinned=draw(st.booleans()),
        expires_at=draw(st.none() | st.floats(0, 1e12)),
        rid=draw(st.none() | TEXT),
    )


@given(manifests())
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert encode_manifest(decode_manifest(data)) == data


@given(manifests())
def test_the_file_is_an_envelope_in_canonical_json(manifest: Manifest) -> None:
    record = json.loads(encode_manifest(manifest))
    assert set(record) == {"blake3", "body"}
    assert record["blake3"] == blake3(canonical_json(record["body"])).hexdigest()
    assert canonical_json(record) + b"\n" == encode_manifest(manifest)


def test_what_a_manifest_knows_about_itself() -> None:
    chain = sample_chain(seeded_random(), (4, 2))
    manifest = sample_manifest([chain], pending_tokens=[5, 6])
    assert manifest.world_size == 1
    assert manifest.boundary_key == chain[-1].header.key
    assert (manifest.token_count, manifest.recorded_count) == (6, 8)
    assert manifest.boundary_keys == [manifest.boundary_key]
    rows = [segment.header.key for segment in chain[:-1]]
    assert sample_manifest([chain[:-1]]).boundary_keys == rows, "without a state, wherever rows end"


def test_a_changed_manifest_is_checked_again() -> None:
    manifest = a_manifest()
    assert change_manifest(manifest, pinned=True).pinned
    assert not manifest.pinned
    with pytest.raises(InvalidRequestError, match="token_count"):
        change_manifest(manifest, token_count=manifest.token_count + 1)


FIELDS = sorted(body_of(a_manifest()))
WRONG_VALUES = [None, 1.5, "a b/", True, [], {}, [None], {"a": []}, -1, 2**60]
OPTIONAL = {"parent_snapshot", "health", "expires_at", "rid"}
ALLOWED_EXTRA = {
    "created_at": [1.5],
    "expires_at": [1.5],
    "pinned": [True],
    "model_name": ["a b/"],
    "health": ["a b/"],
    "rid": ["a b/"],
    "user_metadata": [{}, {"a": []}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in FIELDS
        for value in WRONG_VALUES
        if not (value is None and field in OPTIONAL)
        if not any(value is v or value == v for v in ALLOWED_EXTRA.get(field, []))
        if not (field == "pending_tokens" and value == [])
    ],
    ids=repr,
)
def test_a_field_of_the_wrong_type(field: str, value: object) -> None:
    body = body_of(a_manifest())
    body[field] = value
    with pytest.raises((ManifestCorruptError, StoreFormatError)):
        decode_manifest(sealed(body))


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing(field: str) -> None:
    body = body_of(a_manifest())
    del body[field]
    with pytest.raises(ManifestCorruptError):
        decode_manifest(sealed(body))


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_in("more", to=1), "more: Extra"),
        (set_in("layer_config", "more", to=1), "layer_config.more: Extra"),
        (set_in("segments", 0, 0, "more", to=1), "segments.0.0.more: Extra"),
        (set_in("segments", 0, 0, "start", to=1), "segments of rank 0 do not follow"),
        (set_in("segments", 0, 1, "start", to=4), "segments of rank 0 do not follow"),
        (set_in("segments", 0, 1, "start", to=6), "segments of rank 0 do not follow"),
        (set_in("segments", 0, 1, "end", to=5), "segments of rank 0 do not follow"),
        (set_in("segments", 0, 2, "end", to=13), "rank 0 do not end at token_count"),
        (set_in("segments", 0, 3, "end", to=13), "a state's end is its start"),
        (lambda body: body["segments"].append(body["segments"].pop()[-1:]), "rank 0 do not end"),
        (set_in("segments", 0, 3, "start", to=11), "a state's end is its start"),
        (set_in("segments", 0, 3, "key", to=HEX), "the state of rank 0 is not that of its rows"),
        (set_in("segments", 0, 3, "has_state", to=False), "segments of rank 0 do not follow"),
        (set_in("segments", 0, 1, "has_state", to=True), "a state's end is its start"),
        (set_in("token_count", to=11), "rank 0 do not end at token_count"),
        (set_in("token_count", to=0), "token_count"),
        (set_in("segments", to=[[]]), "rank 0 do not end at token_count"),
        (set_in("segments", to=[]), "segments"),
        (set_in("segments", 0, 0, "segment_id", to="ab"), "segments.0.0.segment_id"),
        (set_in("segments", 0, 0, "key", to=HEX.upper()), "segments.0.0.key"),
        (set_in("segments", 0, 0, "bytes", to=1), "bytes is not the sum"),
        (set_in("bytes", to=1), "bytes is not the sum"),
        (set_in("unique_bytes", to=2**40), "unique_bytes is above bytes"),
        (set_in("pending_tokens", to=[2**32]), "pending_tokens.0"),
        (set_in("pending_tokens", to=[True]), "pending_tokens.0"),
        (set_in("snapshot_id", to=".."), "snapshot_id"),
        (set_in("snapshot_id", to=""), "snapshot_id"),
        (set_in("snapshot_id", to="a\n"), "snapshot_id"),
        (set_in("conversation_id", to="a/b"), "conversation_id"),
        (set_in("branch_name", to="x" * 256), "branch_name"),
        (set_in("tenant", to="."), "tenant"),
        (set_in("durability", to="never"), "durability"),
        (set_in("model_name", to="x" * 5000), "model_name"),
        (set_in("created_at", to=5), "canonical"),
        (set_in("user_metadata", to={"x": "y" * MAX_USER_METADATA_BYTES}), "user_metadata"),
        (set_in("version", to=True), "version|canonical"),
        (set_in("version", to=1.0), "version|canonical"),
        (set_in("version", to="1"), "version"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    body = body_of(a_manifest())
    change(body)
    with pytest.raises(ManifestCorruptError, match=problem):
        decode_manifest(sealed(body))


def test_ranks_must_agree_on_the_boundary() -> None:
    chains = [sample_chain(seeded_random(), shard=Shard(SHARD.namespace, r, 2)) for r in (0, 1)]
    refs = [[segment.ref for segment in chain] for chain in chains]
    refs[1][-2:] = [ref.model_copy(update={"key": HEX}) for ref in refs[1][-2:]]
    with pytest.raises(InvalidRequestError, match="different boundaries"):
        sample_manifest(chains, segments=refs)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_refused_by_name(version: int) -> None:
    with pytest.raises(StoreFormatError, match=f"a manifest has format version {version}"):
        decode_manifest(sealed({"version": version, "anything": "else"}))


def test_a_damaged_version_number_is_damage() -> None:
    data = encode_manifest(a_manifest())
    with pytest.raises(ManifestCorruptError, match="digest"):
        decode_manifest(data.replace(b'"version":1', b'"version":3'))


@pytest.mark.parametrize(
    "respell",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b",", b", ", 1),
        lambda data: data.replace(b'"pinned":false', b'"pinned":false,"pinned":false'),
        lambda data: data.replace(b'"turn_number":1', b'"turn_number":1e0'),
        lambda data: data[:-2] + b',"more":1}\n',
        lambda data: data.replace(b'{"blake3"', b'{"blake3":"' + b"0" * 64 + b'","blake3"'),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.replace(b"snap-1", b"snap\xff1"),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda _: b"null",
        lambda _: b"[]",
        lambda _: b'{"blake3":"","body":[]}',
        lambda _: b'{"blake3":1,"body":{}}',
        lambda _: b"[" * 200_000,
        lambda _: b'{"blake3":"","body":' + b'{"a":' * 100_000,
        lambda _: b'{"blake3":"","body":{"a":' + b"9" * 5000 + b"}}",
        lambda _: b'{"blake3":"","body":{"a":NaN}}',
        lambda _: b'{"blake3":"","body":{"a":1e999}}',
        lambda _: b'{"blake3":"","body":{"a":"\\ud800"}}',
    ],
)
def test_only_the_canonical_file_is_accepted(respell: Callable[[bytes], bytes]) -> None:
    data = encode_manifest(a_manifest())
    assert respell(data) != data
    with pytest.raises(ManifestCorruptError, match="manifest"):
        decode_manifest(respell(data))


def test_no_flipped_bit_goes_unnoticed() -> None:
    data = encode_manifest(a_manifest())
    for position in range(len(data)):
        for bit in (1, 32):
            damaged = bytearray(data)
            damaged[position] ^= bit
            with pytest.raises(ManifestCorruptError):
                decode_manifest(bytes(damaged))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"turn_number": "1"}, "turn_number"),
        ({"turn_number": True}, "turn_number"),
        ({"created_at": float("nan")}, "created_at"),
        ({"created_at": float("inf")}, "created_at"),
        ({"pending_tokens": [True]}, "pending_tokens.0"),
        ({"user_metadata": {"a": object()}}, "user_metadata"),
        ({"user_metadata": {"a": float("nan")}}, "user_metadata"),
        ({"user_metadata": {"a": "\ud800"}}, "user_metadata"),
        ({"user_metadata": {1: 2}}, "user_metadata"),
        ({"model_name": "\ud800"}, "model_name"),
        ({"unknown": 1}, "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_manifest_cannot_be_made_of_wrong_values(changes: dict[str, Any], field: str) -> None:
    manifest = a_manifest()
    with pytest.raises(InvalidRequestError, match=field):
        change_manifest(manifest, **changes)


def test_metadata_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InvalidRequestError, match="user_metadata"):
        a_manifest(user_metadata=deep)


def test_a_manifest_over_the_limit_is_refused_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_MANIFEST_BYTES == 16 << 20
    manifest = a_manifest()
    data = encode_manifest(manifest)
    monkeypatch.setattr("engram.snapshot.manifest.MAX_MANIFEST_BYTES", len(data))
    assert decode_manifest(encode_manifest(manifest)) == manifest
    monkeypatch.setattr("engram.snapshot.manifest.MAX_MANIFEST_BYTES", len(data) - 1)
    with pytest.raises(InvalidRequestError, match=f"{len(data) - 1} are allowed"):
        encode_manifest(manifest)
    with pytest.raises(ManifestCorruptError, match="over the limit"):
        decode_manifest(data)


def test_make_manifest_names_a_missing_field() -> None:
    with pytest.raises(InvalidRequestError, match="snapshot_id"):
        make_manifest()


def test_the_number_of_prompt_tokens_is_there_or_it_is_not() -> None:
    for count in (0, 1, 3):
        manifest = a_manifest(prompt_count=count)
        data = encode_manifest(manifest)
        assert json.loads(data)["body"]["prompt_count"] == count
        assert decode_manifest(data) == manifest
    manifest = a_manifest()
    data = encode_manifest(manifest)
    assert "prompt_count" not in json.loads(data)["body"]
    assert decode_manifest(data) == manifest
    for wrong in (None, -1, 1.0, manifest.recorded_count + 1):
        body = {**json.loads(data)["body"], "prompt_count": wrong}
        with pytest.raises(ManifestCorruptError):
            decode_manifest(sealed(body))
