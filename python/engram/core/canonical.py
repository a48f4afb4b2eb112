"""Canonical JSON and BLAKE3: one byte string for one value, and its digest.

Canonical means sorted keys, no spaces, UTF-8 without escapes where JSON needs none, and finite
numbers only. Two values are the same exactly when their canonical bytes are.
"""

from __future__ import annotations

import json
from typing import Final

from blake3 import blake3

DIGEST_BYTES: Final = 32
HEX_DIGEST_PATTERN: Final = r"^[0-9a-f]{64}$"


def canonical_json(value: object) -> bytes:
    """Canonical bytes of a JSON value.

    Raises ValueError for NaN, infinities, text that is no valid Unicode, or nesting too deep, and
    TypeError for what JSON cannot say.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return text.encode("utf-8")


def blake3_hex(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3-256 of ``data`` as 64 lower-case hex digits."""
    return blake3(data).hexdigest()
