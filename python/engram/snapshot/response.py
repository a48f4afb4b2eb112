"""The response record, version 1: one kept reply of `/v1/responses`, and what was said up to it.

The field table is in ``docs/format/response.md``.
"""

from __future__ import annotations

import json
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field, Strict, ValidationError

from engram.core.canonical import blake3_hex
from engram.snapshot.envelope import open_record, seal_record
from engram.snapshot.fields import CLOSED, first_problem

MAX_RESPONSE_ID: Final = 255
MAX_RESPONSE_BYTES: Final = 64 << 20

Text = Annotated[str, Strict()]


class ResponseRecord(BaseModel):
    """A reply under the id by which a later request names it as `previous_response_id`.

    `response`, `usage` and `messages` are JSON texts: canonical JSON orders the keys of objects,
    and a chat template that writes an object out would write another prompt.
    """

    model_config = CLOSED

    version: Literal[1] = 1
    response_id: Annotated[str, Strict(), Field(min_length=1, max_length=MAX_RESPONSE_ID)]
    response: Text
    usage: Text
    messages: Text

    @property
    def name(self) -> str:
        """The name of its file: a digest, because ids are never paths."""
        return response_name(self.response_id)


def response_name(response_id: str) -> str:
    """The name of the file of the response of that id."""
    return blake3_hex(response_id.encode("utf-8", "surrogatepass")) + ".json"


def encode_response(record: ResponseRecord) -> bytes:
    """The bytes of a record's file. Raises ValueError for one that is too long."""
    data = seal_record(record.model_dump(mode="json"))
    if len(data) > MAX_RESPONSE_BYTES:
        raise ValueError(f"has {len(data)} bytes, over the limit of {MAX_RESPONSE_BYTES}")
    return data


def decode_response(data: bytes) -> ResponseRecord:
    """The record in ``data``, every field checked. Raises ValueError telling what is wrong."""
    if len(data) > MAX_RESPONSE_BYTES:
        raise ValueError(f"is longer than {MAX_RESPONSE_BYTES} bytes")
    try:
        record = ResponseRecord.model_validate(open_record(data))
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    for field in ("response", "usage", "messages"):
        try:
            json.loads(getattr(record, field))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{field}: not JSON: {error}") from None
    if encode_response(record) != data:
        raise ValueError("not in canonical form")
    return record
