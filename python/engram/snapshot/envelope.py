"""Small JSON records with their own digest: a line ``{"blake3": hex, "body": {...}}``, canonical.

Manifests and the store's marker are such records. The file is exactly the canonical encoding, so
that key order, spaces, duplicate keys or trailing bytes are damage like a flipped bit.
"""

from __future__ import annotations

import json

from engram.core.canonical import blake3_hex, canonical_json


def seal_record(body: dict[str, object]) -> bytes:
    """The bytes of a record. Raises ValueError for values canonical JSON cannot say."""
    return canonical_json({"blake3": blake3_hex(canonical_json(body)), "body": body}) + b"\n"


def open_record(data: bytes) -> dict[str, object]:
    """The body of a record. Raises ValueError telling what is wrong with it."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict) or record.keys() != {"blake3", "body"}:
        raise ValueError("not an object of exactly 'blake3' and 'body'")
    body = record["body"]
    if not isinstance(body, dict):
        raise ValueError("'body' is not an object")
    if record["blake3"] != blake3_hex(canonical_json(body)):
        raise ValueError("the body does not match its digest")
    if seal_record(body) != data:
        raise ValueError("not in canonical form")
    return body
