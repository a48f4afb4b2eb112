"""Records: JSON bodies under their own digest."""

import json
from collections.abc import Callable

import pytest

from engram.snapshot.envelope import open_record, seal_record

BODY = {"b": 1.5, "a": ["\u00e9", None, True], "c": {"z": 0, "y": 2**60}}


def test_a_record_comes_back() -> None:
    assert open_record(seal_record(BODY)) == BODY
    assert seal_record(open_record(seal_record(BODY))) == seal_record(BODY)


@pytest.mark.parametrize(
    ("respell", "problem"),
    [
        (lambda data: data[:-1], "canonical"),
        (lambda data: data + b" ", "canonical"),
        (lambda data: data.replace(b":1.5", b":15e-1"), "canonical"),
        (lambda data: data.replace(b":1.5", b": 1.5"), "canonical"),
        (lambda data: data.replace(b'"z":0', b'"z":1,"z":0'), "canonical"),
        (lambda data: json.dumps(json.loads(data)).encode(), "canonical"),
        (lambda data: data.replace(b":1.5", b":1.6"), "digest"),
        (lambda data: data.replace(b"null", b"NaN"), "JSON compliant"),
        (lambda data: data.replace(b"null", b"1e999"), "JSON compliant"),
        (lambda data: data.replace(b'"blake3"', b'"blake2"'), "exactly"),
        (lambda data: data.replace(b'"blake3"', b'"":0,"blake3"'), "exactly"),
        (lambda data: b'{"blake3":"","body":1}', "not an object"),
        (lambda data: b"[]", "exactly"),
        (lambda data: b"", "not JSON"),
        (lambda data: b"\xff", "not JSON"),
        (lambda data: b"[" * 100_000, "not JSON"),
    ],
)
def test_only_the_canonical_record_is_accepted(
    respell: Callable[[bytes], bytes], problem: str
) -> None:
    data = seal_record(BODY)
    assert respell(data) != data
    with pytest.raises(ValueError, match=problem):
        open_record(respell(data))


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        seal_record({"a": float("nan")})
    with pytest.raises(ValueError, match="surrogates"):
        seal_record({"a": "\ud800"})
