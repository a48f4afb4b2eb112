"""Page keys: the published definition, SGLang's own chain, and what is put in its place, agree."""

from __future__ import annotations

import hashlib
import struct
from array import array
from random import Random
from typing import Any

import numpy as np
import pytest
from sglang.srt.mem_cache.cpp_utils import native_hash
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from engram.sglang_plugin import keys as keys_module
from engram.sglang_plugin.keys import page_keys, page_keys_after, replace_native_hash
from engram.testing.samples import seeded_random

NAMESPACES = [(None, None), ("lora", None), (None, "salt"), ("lora", "salt"), ("", "salt")]
PAGES = (1, 4, 16)


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture(scope="module")
def compiled() -> Any:
    """SGLang's own function, which it compiles at its first use."""
    try:
        return native_hash._load_native_hash_module()
    except RuntimeError as error:
        pytest.skip(f"SGLang's hash cannot be compiled here: {error.__cause__}")


def reference(
    tokens: list[int], page: int, extra_key: str | None, cache_salt: str | None
) -> list[str]:
    """The definition, by hashlib alone."""
    prior = b""
    if extra_key is not None or cache_salt is not None:
        seed = hashlib.sha256(b"sglang-cache-namespace-v1")
        for part in (extra_key, cache_salt):
            if part is None:
                seed.update(b"\x00")
            else:
                seed.update(b"\x01" + struct.pack("<Q", len(part.encode())) + part.encode())
        prior = seed.digest()
    found = []
    for end in range(page, len(tokens) + 1, page):
        prior = hashlib.sha256(prior + struct.pack(f"<{page}I", *tokens[end - page : end])).digest()
        found.append(prior.hex())
    return found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("extra_key", "cache_salt"), NAMESPACES)
def test_keys_are_those_of_the_definition(
    rng: Random, page: int, extra_key: str | None, cache_salt: str | None
) -> None:
    for length in (0, 1, page - 1, page, page + 1, 5 * page + 3):
        tokens = [rng.randrange(2**32) for _ in range(length)]
        wanted = reference(tokens, page, extra_key, cache_salt)
        assert page_keys(tokens, page, extra_key, cache_salt) == wanted
        assert len(wanted) == length // page


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("extra_key", "cache_salt"), NAMESPACES)
@pytest.mark.usefixtures("compiled")
def test_keys_are_those_of_sglang(
    rng: Random, page: int, extra_key: str | None, cache_salt: str | None
) -> None:
    tokens = [rng.randrange(2**31) for _ in range(4 * page)]
    key = RadixKey(array("q", tokens), extra_key, cache_salt=cache_salt)
    theirs = get_storage_hash_str(key, page_size=page)
    assert page_keys(tokens, page, extra_key, cache_salt) == theirs
    # A tail is hashed from the last key before it.
    tail = get_storage_hash_str(key[2 * page :], theirs[1], page_size=page)
    assert tail == theirs[2:]


def test_an_empty_salt_is_no_salt(rng: Random) -> None:
    tokens = [rng.randrange(2**31) for _ in range(3)]
    assert page_keys(tokens, 1, None, "") == page_keys(tokens, 1)


def test_namespaces_never_share_a_key(rng: Random) -> None:
    tokens = [rng.randrange(2**31) for _ in range(3)]
    pairs = [*NAMESPACES, ("loras", "alt"), ("lorasalt", None), (None, "lorasalt")]
    found = [key for pair in pairs for key in page_keys(tokens, 1, *pair)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("page", [None, *PAGES])
def test_the_stand_in_gives_what_the_compiled_function_gives(
    rng: Random, page: int | None, compiled: Any
) -> None:
    def original(tokens: object, prior: bytes | None) -> object:
        raw, length, width, bigram = native_hash._native_hash_input(tokens)
        return compiled.get_hash(raw, length, width, bigram, prior, page)

    for prior in (None, rng.randbytes(32)):
        for length in (1, 4, 16, 33):
            tokens = array("q", [rng.randrange(2**31) for _ in range(length)])
            for given in (tokens, tokens.tolist(), RadixKey(tokens)):
                assert replace_native_hash(given, prior, page) == original(given, prior)


def test_without_the_extension_hashlib_gives_the_same(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [rng.randrange(2**32) for _ in range(37)]
    wanted = [page_keys(tokens, page, "lora", "salt") for page in PAGES]

    def in_python(ids: array[int], prior: str | None, page: int) -> list[str]:
        return keys_module.hash_pages_in_python(ids, prior, page)

    monkeypatch.setattr(keys_module, "_hash_pages", in_python)
    assert [page_keys(tokens, page, "lora", "salt") for page in PAGES] == wanted


def test_bigrams_are_refused_not_hashed_wrongly() -> None:
    key = RadixKey(array("q", [1, 2, 3]), is_bigram=True)
    with pytest.raises(NotImplementedError, match="speculative"):
        replace_native_hash(key, None, 1)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("extra_key", "cache_salt"), NAMESPACES)
def test_keys_go_on_after_a_page(
    page: int, extra_key: str | None, cache_salt: str | None, rng: Random
) -> None:
    tokens = [rng.randrange(2**32) for _ in range(7 * page + page // 2)]
    keys = page_keys(tokens, page, extra_key, cache_salt)
    rest = np.array(tokens[3 * page :], dtype="<u4")
    assert page_keys_after(rest, keys[2], page) == keys[3:]
    unseeded = page_keys_after(np.array(tokens, dtype="<u4"), None, page)
    assert (unseeded == keys) is (extra_key is None and cache_salt is None)
