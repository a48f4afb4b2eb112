"""The conversation record, version 1: what a client has set of a conversation as a whole.

The field table is in ``docs/format/conversation.md``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field, Strict, ValidationError

from engram.core.canonical import blake3_hex
from engram.snapshot.envelope import open_record, seal_record
from engram.snapshot.fields import CLOSED, Id, IdOrEmpty, first_problem

DEFAULT_PRIORITY: Final = 50
MAX_PRIORITY: Final = 100
MAX_CONVERSATION_BYTES: Final = 4096

Priority = Annotated[int, Strict(), Field(ge=0, le=MAX_PRIORITY)]


class ConversationRecord(BaseModel):
    """What one conversation is worth: ``priority`` from 0 to `MAX_PRIORITY`."""

    model_config = CLOSED

    version: Literal[1] = 1
    tenant: IdOrEmpty
    conversation_id: Id
    priority: Priority

    @property
    def name(self) -> str:
        """The name of its file: a digest, because ids are never paths."""
        return blake3_hex(f"{self.tenant}/{self.conversation_id}".encode()) + ".json"


def encode_conversation(record: ConversationRecord) -> bytes:
    """The bytes of a record's file."""
    return seal_record(record.model_dump(mode="json"))


def decode_conversation(data: bytes) -> ConversationRecord:
    """The record in ``data``, every field checked. Raises ValueError telling what is wrong."""
    if len(data) > MAX_CONVERSATION_BYTES:
        raise ValueError(f"has {len(data)} bytes, over the limit")
    try:
        record = ConversationRecord.model_validate(open_record(data))
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    if encode_conversation(record) != data:
        raise ValueError("not in canonical form")
    return record
