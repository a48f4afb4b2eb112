"""LoRA adapters, told apart by what they hold.

SGLang puts an adapter's id into the page keys of all that was computed with it, and makes the id
of a name and a path.  Weights that were exchanged under that path would then be used with states
that others made.  So while snapshots are kept the id is made of the files themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

from engram.core.canonical import blake3_hex, canonical_json
from engram.core.weights import adapter_digest
from engram.errors import InvalidRequestError

ID_LENGTH: Final = 32
"""Hex digits, as many as SGLang's ids have."""

_verify: Literal["fast", "full"] | None = None


def name_by_contents(verify: Literal["fast", "full"]) -> None:
    """From now on, in this process, `adapter_id` is made of files, read as the model's weights."""
    global _verify
    _verify = verify


def adapter_id(original: Callable[[str, str], str], name: str, path: str) -> str:
    """The id of an adapter of the command line."""
    return original(name, path) if _verify is None else content_id(name, path, _verify)


def content_id(name: str, path: str, verify: Literal["fast", "full"]) -> str:
    """An id made of files: the same under the same name wherever they lie.

    Two names for the same files have different ids, since SGLang keeps one adapter an id.  Raises
    `InvalidRequestError` where there is no adapter.
    """
    return blake3_hex(canonical_json([name, adapter_digest(path, verify)]))[:ID_LENGTH]


def seed_of(extra_key: str | None, lora_id: str | None, served: Iterable[str]) -> str | None:
    """What the page keys of a request are seeded with, as SGLang's `Req` puts it together.

    Raises `InvalidRequestError` where a request without an adapter would have the keys of one that
    has: SGLang appends the id to the extra key, and its tree would mix the two as well.
    """
    if lora_id is not None:
        return (extra_key or "") + lora_id
    if extra_key is not None and extra_key.endswith(tuple(served)):
        raise InvalidRequestError(
            "extra_key ends with the id of a LoRA adapter of this server",
            hint="use another extra_key; an adapter is asked for with lora_path",
            details={"field": "extra_key"},
        )
    return extra_key


def served_by(tokenizer_manager: Any) -> tuple[str, ...]:
    """The ids of the adapters of a server, which are those it was launched with.

    Not from the arguments: SGLang keeps what it makes of `--lora-paths` apart from them.
    """
    return tuple(adapter.lora_id for adapter in tokenizer_manager.lora_ref_cache.values())
