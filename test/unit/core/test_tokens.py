"""Tokens: conversion, digest, common prefix."""

import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from engram.core.tokens import (
    common_prefix_length,
    to_tokens,
    tokens_digest,
    tokens_from_bytes,
    tokens_to_bytes,
)
from engram.errors import InvalidRequestError

TOKENS = st.lists(st.integers(0, 2**32 - 1))


@given(TOKENS)
def test_bytes_are_u32_little_endian_and_come_back(tokens: list[int]) -> None:
    data = tokens_to_bytes(tokens)
    assert data == struct.pack(f"<{len(tokens)}I", *tokens)
    assert tokens_from_bytes(data).tolist() == tokens


@given(TOKENS, st.integers(0, 50))
def test_the_digest_is_of_the_concatenation(tokens: list[int], split: int) -> None:
    expected = blake3(struct.pack(f"<{len(tokens)}I", *tokens)).hexdigest()
    assert tokens_digest(tokens) == expected
    assert tokens_digest(tokens[:split], tokens[split:]) == expected


@given(TOKENS, TOKENS, TOKENS)
def test_the_common_prefix(prefix: list[int], left: list[int], right: list[int]) -> None:
    length = common_prefix_length(prefix + left, prefix + right)
    both_left, both_right = prefix + left, prefix + right
    assert length >= len(prefix)
    assert both_left[:length] == both_right[:length]
    assert both_left[length : length + 1] != both_right[length : length + 1] or length == min(
        len(both_left), len(both_right)
    )


@pytest.mark.parametrize("dtype", ["<i8", "<i4", ">i4", "<u2", "<u4", ">u4", "<u8"])
def test_arrays_of_any_integer_type(dtype: str) -> None:
    array = np.array([0, 1, 70, 65535], dtype="<i8").astype(dtype)[::2]
    assert to_tokens(array).tolist() == array.tolist()
    assert to_tokens(array).dtype == np.dtype("<u4")


def test_an_array_that_fits_is_not_copied() -> None:
    array = np.arange(5, dtype="<u4")
    assert np.shares_memory(to_tokens(array), array)


@pytest.mark.parametrize(
    "values",
    [
        [-1],
        [2**32],
        [2**70],
        [1.0],
        [True],
        ["1"],
        [None],
        [[1], [2]],
        [[1], [2, 3]],
        "12",
        np.array([-1]),
        np.array([2**40]),
        np.array([1.5]),
    ],
    ids=repr,
)
def test_what_is_no_token_id_is_refused(values: object) -> None:
    with pytest.raises(InvalidRequestError, match="continuation_ids") as caught:
        to_tokens(values, "continuation_ids")  # type: ignore[arg-type]
    assert caught.value.details == {"field": "continuation_ids"}


def test_a_partial_token_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        tokens_from_bytes(b"\0" * 5)
