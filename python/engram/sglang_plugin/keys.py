"""Page keys: upstream's chained hash of each page of tokens.

SHA-256 over the key of the page before and the page's tokens as u32; the first page is seeded with
the request's extra key and cache salt.  Upstream compiles a C++ module for this at the first
lookup, inside the scheduler loop, and fails there without a compiler; its bundled tree extension
exports the same function, which is put in its place (`replace_native_hash`).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.utils import storage_namespace_seed

from engram.core.tokens import TokenArray


def page_keys(
    tokens: Sequence[int],
    page_size: int,
    extra_key: str | None = None,
    cache_salt: str | None = None,
) -> list[str]:
    """One key a whole page of `tokens`, 64 hex digits each."""
    whole = len(tokens) // page_size * page_size
    ids = array("q", tokens[:whole])
    return _hash_pages(ids, storage_namespace_seed(extra_key, cache_salt or None), page_size)


def page_keys_after(tokens: TokenArray, before: str | None, page_size: int) -> list[str]:
    """As `page_keys` for tokens that follow the page with the key `before`, or if that is None,
    that begin a sequence without extra key and salt."""
    ids = array("q", tokens[: len(tokens) // page_size * page_size].tolist())
    return _hash_pages(ids, before or storage_namespace_seed(None, None), page_size)


def replace_native_hash(
    token_ids: Any, prior_digest: bytes | None, page_size: int | None = None
) -> str | list[str]:
    """Stands in for upstream's `get_native_hash`, which compiles C++ at its first use."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import _native_hash_input

    raw, length, width, _ = _native_hash_input(token_ids)
    if width != 1:
        raise NotImplementedError(
            "page keys over bigrams: speculative decoding is refused at launch"
        )
    prior = prior_digest.hex() if prior_digest else None
    ids = array("q", raw[:length])
    return _hash_pages(ids, prior, page_size or max(1, length)) if page_size else _whole(ids, prior)


def _whole(ids: array[int], prior: str | None) -> str:
    return _hash_pages(ids, prior, max(1, len(ids)))[-1] if ids else _digest(b"", prior)


def _hash_pages(ids: array[int], prior: str | None, page_size: int) -> list[str]:
    try:
        from sglang.srt.mem_cache.rust_tree_core.extension import bindings
    except ImportError:
        return hash_pages_in_python(ids, prior, page_size)
    keys: list[str] = bindings.get_hash_str(ids, prior, page_size)
    return keys


def hash_pages_in_python(ids: Sequence[int], prior: str | None, page_size: int) -> list[str]:
    """The definition of page keys; where upstream's extension is, that computes them instead."""
    keys = []
    for first in range(0, len(ids), page_size):
        page = ids[first : first + page_size]
        prior = _digest(struct.pack(f"<{len(page)}I", *page), prior)
        keys.append(prior)
    return keys


def _digest(data: bytes, prior: str | None) -> str:
    return hashlib.sha256((bytes.fromhex(prior) if prior else b"") + data).hexdigest()
