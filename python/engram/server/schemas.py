"""Bodies of the routes: closed, strict, and bounded."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from engram.core.ids import check_id
from engram.errors import InvalidIdError
from engram.snapshot.conversation import Priority

TokenId = Annotated[int, Strict(), Field(ge=0, lt=2**32)]


def _id(value: str) -> str:
    try:
        return check_id("id", value)
    except InvalidIdError as error:
        # The field's name is pydantic's to say.
        raise ValueError(error.hint) from None


Id = Annotated[str, Strict(), AfterValidator(_id)]
Rid = Annotated[str, Strict(), Field(min_length=1, max_length=255, pattern=r"^\P{C}+$")]
"""The id of a request, which SGLang lets clients choose freely; control characters name nothing."""
TurnNumber = Annotated[int, Strict(), Field(ge=1, lt=2**63)]
MAX_CONTINUATION: Final = 2**22
"""Tokens; more than any context is long."""


class Place(BaseModel):
    """Where a snapshot stands; `rid` is the id of the reply that was the turn."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id
    turn_number: TurnNumber | None = None
    branch_name: Id | None = None


class SaveBody(BaseModel):
    """`POST /save_snapshot`."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id | None = None
    rid: Rid | None = None
    snapshot_id: Id | None = None
    turn_number: TurnNumber | None = None
    branch_name: Id | None = None
    durability: Literal["sync", "async"] = "sync"


class RestoreBody(BaseModel):
    """`POST /restore_snapshot`."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id | None = None
    rid: Rid | None = None
    turn_number: TurnNumber | None = None
    branch_name: Id | None = None
    create_new_request: Annotated[bool, Strict()] = False
    continuation_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CONTINUATION)] | None
    ) = None
    max_new_tokens: Annotated[int, Strict(), Field(ge=1, lt=2**31)] | None = None
    sampling_params: dict[str, Any] | None = None
    request_id: Id | None = None

    @model_validator(mode="after")
    def _continuation_is_whole(self) -> RestoreBody:
        check_continuation(self)
        return self


class SnapshotRestore(BaseModel):
    """`POST /v1/snapshots/{snapshot_id}/restore`: as `RestoreBody`, but for the place."""

    model_config = ConfigDict(extra="forbid")

    create_new_request: Annotated[bool, Strict()] = False
    continuation_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CONTINUATION)] | None
    ) = None
    max_new_tokens: Annotated[int, Strict(), Field(ge=1, lt=2**31)] | None = None
    sampling_params: dict[str, Any] | None = None
    request_id: Id | None = None

    @model_validator(mode="after")
    def _continuation_is_whole(self) -> SnapshotRestore:
        check_continuation(self)
        return self


def check_continuation(body: RestoreBody | SnapshotRestore) -> None:
    """What a new request needs is there, and nothing of it without one.  Raises ValueError."""
    needed: dict[str, object] = {
        "continuation_ids": body.continuation_ids,
        "max_new_tokens": body.max_new_tokens,
    }
    for name in ("n", "beam_width"):
        if (body.sampling_params or {}).get(name) not in (None, 1):
            raise ValueError(f"sampling_params.{name} must be 1: a turn has one reply")
    if body.create_new_request:
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ValueError(f"create_new_request needs {' and '.join(missing)}")
        return
    needed |= {"sampling_params": body.sampling_params, "request_id": body.request_id}
    given = [name for name, value in needed.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only with create_new_request")


class SnapshotBranch(BaseModel):
    """`POST /v1/snapshots/{snapshot_id}/branch`."""

    model_config = ConfigDict(extra="forbid")

    branch_name: Id | None = None
    conversation_id: Id | None = None
    snapshot_id: Id | None = None

    @model_validator(mode="after")
    def _names_something_new(self) -> SnapshotBranch:
        if self.branch_name is None and self.conversation_id is None:
            raise ValueError("give branch_name, conversation_id or both")
        return self


class ListBody(BaseModel):
    """`POST /list_snapshots`."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id


MAX_SECONDS: Final = 2.0**40
"""Tens of thousands of years: of times that clients give."""


class SnapshotPatch(BaseModel):
    """`PATCH /v1/snapshots/{snapshot_id}`: what is not there stays as it is."""

    model_config = ConfigDict(extra="forbid")

    pinned: Annotated[bool, Strict()] = False
    expires_at: Annotated[float, Strict(), Field(ge=0, le=MAX_SECONDS)] | None = None
    ttl_seconds: Annotated[float, Strict(), Field(ge=0, le=MAX_SECONDS)] | None = None
    user_metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _something_is_changed(self) -> SnapshotPatch:
        if not self.model_fields_set:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}")
        if {"expires_at", "ttl_seconds"} <= self.model_fields_set:
            raise ValueError("expires_at, ttl_seconds: give one of them")
        if "ttl_seconds" in self.model_fields_set and self.ttl_seconds is None:
            raise ValueError("ttl_seconds: null says nothing; expires_at: null is never")
        return self


class ConversationPatch(BaseModel):
    """`PATCH /v1/conversations/{conversation_id}`."""

    model_config = ConfigDict(extra="forbid")

    priority: Priority


class MemoryPlace(BaseModel):
    """`POST /v1/memory/promote` and `/v1/memory/demote`."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id | None = None
    snapshot_id: Id | None = None
    turn_number: TurnNumber | None = None
    branch_name: Id | None = None

    @model_validator(mode="after")
    def _names_one_thing(self) -> MemoryPlace:
        if (self.conversation_id is None) == (self.snapshot_id is None):
            raise ValueError("give conversation_id or snapshot_id")
        if self.snapshot_id is not None and (self.turn_number or self.branch_name):
            raise ValueError("turn_number, branch_name: only with conversation_id")
        return self


class BranchPlace(BaseModel):
    """`POST /v1/memory/pin` and `/v1/memory/unpin`."""

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id
    branch_name: Id | None = None
