"""Token ids as little-endian unsigned 32-bit arrays: conversion, digest, common prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram.core.canonical import blake3_hex
from engram.errors import InvalidRequestError

TOKEN_BYTES: Final = 4
MAX_TOKEN_ID: Final = 2**32 - 1

TokenArray: TypeAlias = NDArray[np.uint32]
"""One-dimensional, C-contiguous, little-endian u32."""


def to_tokens(values: Sequence[int] | NDArray[np.integer], field: str = "tokens") -> TokenArray:
    """Token ids as an array; no copy is made of one that is in this form already.

    Raises `InvalidRequestError` naming ``field`` for anything but whole numbers in [0, 2**32).
    """
    if len(values) == 0:
        return np.zeros(0, dtype="<u4")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise _not_tokens(field) from None
    # A list of bools or floats must not become token ids silently.
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _not_tokens(field)
    if (array.dtype.kind == "i" and int(array.min()) < 0) or int(array.max()) > MAX_TOKEN_ID:
        raise _not_tokens(field)
    return np.ascontiguousarray(array, dtype="<u4")


def tokens_to_bytes(tokens: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Four little-endian bytes a token."""
    return to_tokens(tokens).tobytes()


def tokens_from_bytes(data: bytes | bytearray | memoryview) -> TokenArray:
    """The reverse of `tokens_to_bytes`, as a copy. Raises ValueError for a partial token."""
    return np.frombuffer(bytes(data), dtype="<u4")


def tokens_digest(*parts: Sequence[int] | NDArray[np.integer]) -> str:
    """BLAKE3 (hex) of the u32-LE bytes of all ``parts`` one after another."""
    return blake3_hex(b"".join(tokens_to_bytes(part) for part in parts))


def common_prefix_length(
    left: Sequence[int] | NDArray[np.integer], right: Sequence[int] | NDArray[np.integer]
) -> int:
    """How many leading tokens both have in common."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(to_tokens(left)[:length] != to_tokens(right)[:length])
    return int(differing[0]) if differing.size else length


def _not_tokens(field: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field} must be a flat list of token ids (whole numbers from 0 to {MAX_TOKEN_ID})",
        details={"field": field},
    )
