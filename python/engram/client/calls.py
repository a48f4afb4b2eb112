"""One function a route: what is sent, and what comes back.

`EngramClient` and `AsyncEngramClient` have each as a method.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx

from engram.client.exchange import Call, reply_as, reply_as_json
from engram.client.failures import unexpected
from engram.client.results import (
    Changed,
    Comparison,
    ConversationDeleted,
    ConversationDetails,
    ConversationPage,
    Deleted,
    Demoted,
    Durability,
    Explanation,
    Imported,
    Pinned,
    Prefix,
    PrefixDeleted,
    PrefixPage,
    Prioritised,
    Promoted,
    Restored,
    Saved,
    Snapshot,
    SnapshotPage,
    Tiers,
    TreePage,
    Unpinned,
)
from engram.core.ids import check_id
from engram.errors import InvalidRequestError


def list_conversations(limit: int = 100, after: str | None = None) -> Call[ConversationPage]:
    """A page of the conversations that have snapshots, by id."""
    query = given(limit=limit, after=after)
    return Call("GET", "/v1/conversations", reply_as(ConversationPage), query=query)


def get_conversation(conversation_id: str) -> Call[ConversationDetails]:
    """Describe a conversation."""
    return Call("GET", conversation_path(conversation_id), reply_as(ConversationDetails))


def delete_conversation(conversation_id: str) -> Call[ConversationDeleted]:
    """Delete all snapshots of a conversation."""
    return Call("DELETE", conversation_path(conversation_id), reply_as(ConversationDeleted))


def set_priority(conversation_id: str, priority: int) -> Call[Prioritised]:
    """Say what a conversation is worth, from 0 to 100."""
    body = {"priority": priority}
    return Call("PATCH", conversation_path(conversation_id), reply_as(Prioritised), body)


def tree_page(conversation_id: str, limit: int = 500, after: str | None = None) -> Call[TreePage]:
    """A page of the turns of a conversation, and all its branches."""
    query = given(limit=limit, after=after)
    path = f"{conversation_path(conversation_id)}/tree"
    return Call("GET", path, reply_as(TreePage), query=query)


def list_snapshots(
    conversation_id: str | None = None,
    branch_name: str | None = None,
    limit: int = 100,
    after: str | None = None,
) -> Call[SnapshotPage]:
    """A page of snapshots, oldest first: of all, of a conversation or of a branch."""
    query = given(conversation_id=conversation_id, branch=branch_name, limit=limit, after=after)
    return Call("GET", "/v1/snapshots", reply_as(SnapshotPage), query=query)


def get_snapshot(snapshot_id: str) -> Call[Snapshot]:
    """Describe a snapshot, its recorded tokens included."""
    return Call("GET", snapshot_path(snapshot_id), reply_as(Snapshot, "snapshot"))


def find_snapshot(
    conversation_id: str, turn_number: int | None = None, branch_name: str | None = None
) -> Call[Snapshot]:
    """The snapshot of a turn, or the newest of a branch, which is `main` if not given."""
    body = given(conversation_id=conversation_id, turn_number=turn_number, branch_name=branch_name)
    return Call("POST", "/get_snapshot_info", reply_as(Snapshot, "metadata"), body)


def delete_snapshot(snapshot_id: str) -> Call[Deleted]:
    """Delete a snapshot, and the bytes that no other shares."""
    return Call("DELETE", snapshot_path(snapshot_id), reply_as(Deleted))


def update_snapshot(
    snapshot_id: str,
    *,
    pinned: bool | None = None,
    expires_at: float | Literal["never"] | None = None,
    ttl_seconds: float | None = None,
    user_metadata: Mapping[str, Any] | None = None,
) -> Call[Changed]:
    """Change what may change of a snapshot; what is left out stays as it is.

    Args:
        snapshot_id: the snapshot.
        pinned: exempt from retention.
        expires_at: seconds since the epoch after which retention removes it, or "never".
        ttl_seconds: the same from now on; one of the two.
        user_metadata: takes the place of what was there.
    """
    body = given(pinned=pinned, ttl_seconds=ttl_seconds, user_metadata=user_metadata)
    if expires_at is not None:
        body["expires_at"] = None if expires_at == "never" else expires_at
    return Call("PATCH", snapshot_path(snapshot_id), reply_as(Changed), body)


def compare(snapshot_id: str, other_id: str) -> Call[Comparison]:
    """Where two snapshots part, and how many bytes they share."""
    query = {"to": check_id("snapshot_id", other_id)}
    path = f"{snapshot_path(snapshot_id)}/compare"
    return Call("GET", path, reply_as(Comparison), query=query)


def save(
    conversation_id: str | None = None,
    *,
    rid: str | None = None,
    snapshot_id: str | None = None,
    turn_number: int | None = None,
    branch_name: str | None = None,
    durability: Durability | None = None,
) -> Call[Saved]:
    """Make a turn durable; one that is saved is returned as it is.

    Args:
        conversation_id: this or `rid` is needed; with both, the request becomes its next turn.
        rid: id of a finished request.
        snapshot_id: name of the snapshot; without it one is made.
        turn_number: the turn, else the newest.
        branch_name: its branch, else `main`; a new name starts a branch at that turn of `main`.
        durability: "async" answers before the snapshot is durable.
    """
    body = given(
        conversation_id=conversation_id,
        rid=rid,
        snapshot_id=snapshot_id,
        turn_number=turn_number,
        branch_name=branch_name,
        durability=durability,
    )
    return Call("POST", "/save_snapshot", reply_as(Saved), body)


def restore(
    conversation_id: str | None = None,
    *,
    rid: str | None = None,
    turn_number: int | None = None,
    branch_name: str | None = None,
    continuation_ids: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    sampling_params: Mapping[str, Any] | None = None,
    request_id: str | None = None,
) -> Call[Restored]:
    """Bring a snapshot into memory, verified; with `continuation_ids`, generate from it as well.

    Args:
        conversation_id: this or `rid` is needed.
        rid: id of the request that was saved.
        turn_number: the turn, else the newest that is saved.
        branch_name: its branch, else `main`.
        continuation_ids: token ids that follow the recorded ones; needs `max_new_tokens`.
        max_new_tokens: most tokens to generate.
        sampling_params: as on `/generate`.
        request_id: id for the new request.
    """
    body = given(
        conversation_id=conversation_id,
        rid=rid,
        turn_number=turn_number,
        branch_name=branch_name,
        **_generating(continuation_ids, max_new_tokens, sampling_params, request_id),
    )
    return Call("POST", "/restore_snapshot", reply_as(Restored), body)


def restore_snapshot(
    snapshot_id: str,
    *,
    continuation_ids: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    sampling_params: Mapping[str, Any] | None = None,
    request_id: str | None = None,
) -> Call[Restored]:
    """`restore`, of a snapshot by its id."""
    body = _generating(continuation_ids, max_new_tokens, sampling_params, request_id)
    return Call("POST", f"{snapshot_path(snapshot_id)}/restore", reply_as(Restored), body)


def _generating(
    continuation_ids: Sequence[int] | None,
    max_new_tokens: int | None,
    sampling_params: Mapping[str, Any] | None,
    request_id: str | None,
) -> dict[str, Any]:
    body = given(
        continuation_ids=None if continuation_ids is None else list(continuation_ids),
        max_new_tokens=max_new_tokens,
        sampling_params=sampling_params,
        request_id=request_id,
    )
    if continuation_ids is not None:
        body["create_new_request"] = True
    return body


def exported(snapshot_id: str) -> Call[httpx.Response]:
    """The file of a snapshot, as a stream."""
    path = f"{snapshot_path(snapshot_id)}/export"
    return Call("GET", path, lambda response: response, stream=True)


def import_snapshots(
    path: str | os.PathLike[str],
    *,
    conversation_id: str | None = None,
    snapshot_id: str | None = None,
) -> Call[Imported]:
    """Store the snapshots of a file that an export has made: verified, all of them or none.

    Args:
        path: the file.
        conversation_id: under which they are stored, each with a new id.
        snapshot_id: the id of the only one in the file.
    """
    query = given(conversation_id=conversation_id, snapshot_id=snapshot_id)
    url = "/v1/snapshots/import"
    return Call("POST", url, reply_as(Imported), query=query, file=Path(path))


def branch(
    snapshot_id: str,
    *,
    branch_name: str | None = None,
    conversation_id: str | None = None,
    new_snapshot_id: str | None = None,
) -> Call[Saved]:
    """Make a snapshot the start of a branch, or of a new conversation; no state is copied."""
    body = given(
        branch_name=branch_name, conversation_id=conversation_id, snapshot_id=new_snapshot_id
    )
    return Call("POST", f"{snapshot_path(snapshot_id)}/branch", reply_as(Saved), body)


def create_prefix(
    name: str,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    text: str | None = None,
    input_ids: Sequence[int] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Call[Prefix]:
    """Compute the beginning of prompts once, store it and pin it.

    Args:
        name: of the prefix; the same one again is answered as it is.
        messages: the first messages of a chat; this, `text` or `input_ids`.
        text: the beginning of a text.
        input_ids: the tokens themselves.
        tools: as in a chat; only with `messages`.
    """
    body = given(name=name, messages=messages, text=text, input_ids=input_ids, tools=tools)
    return Call("POST", "/v1/prefixes", reply_as(Prefix), body)


def list_prefixes(limit: int = 100, after: str | None = None) -> Call[PrefixPage]:
    """A page of the prefixes, by name."""
    return Call("GET", "/v1/prefixes", reply_as(PrefixPage), query=given(limit=limit, after=after))


def get_prefix(name: str) -> Call[Prefix]:
    """Describe a prefix."""
    return Call("GET", f"/v1/prefixes/{_part('name', name)}", reply_as(Prefix))


def delete_prefix(name: str) -> Call[PrefixDeleted]:
    """Delete a prefix, and the bytes that nothing else shares."""
    return Call("DELETE", f"/v1/prefixes/{_part('name', name)}", reply_as(PrefixDeleted))


def promote(
    conversation_id: str | None = None,
    *,
    snapshot_id: str | None = None,
    turn_number: int | None = None,
    branch_name: str | None = None,
) -> Call[Promoted]:
    """Bring a snapshot into RAM, and hold it there for a while."""
    body = _memory_place(conversation_id, snapshot_id, turn_number, branch_name)
    return Call("POST", "/v1/memory/promote", reply_as(Promoted), body)


def demote(
    conversation_id: str | None = None,
    *,
    snapshot_id: str | None = None,
    turn_number: int | None = None,
    branch_name: str | None = None,
) -> Call[Demoted]:
    """Let snapshots leave RAM; they stay on disk."""
    body = _memory_place(conversation_id, snapshot_id, turn_number, branch_name)
    return Call("POST", "/v1/memory/demote", reply_as(Demoted), body)


def pin(conversation_id: str, branch_name: str | None = None) -> Call[Pinned]:
    """Keep the newest state of a branch in VRAM, turn after turn."""
    body = given(conversation_id=conversation_id, branch_name=branch_name)
    return Call("POST", "/v1/memory/pin", reply_as(Pinned), body)


def unpin(conversation_id: str, branch_name: str | None = None) -> Call[Unpinned]:
    """Let a branch leave VRAM again."""
    body = given(conversation_id=conversation_id, branch_name=branch_name)
    return Call("POST", "/v1/memory/unpin", reply_as(Unpinned), body)


def explain(rid: str) -> Call[Explanation]:
    """Why so many tokens of a finished request were cached; `rid` is the id of its reply."""
    if not rid or rid in (".", ".."):
        raise InvalidRequestError(f"{rid!r} names no request", details={"field": "rid"})
    return Call("GET", f"/v1/requests/{quote(rid, safe='')}", reply_as(Explanation))


def tiers() -> Call[Tiers]:
    """What VRAM, RAM and disk hold now."""
    return Call("GET", "/v1/memory/tiers", reply_as(Tiers, "tiers"))


def health() -> Call[dict[str, Any]]:
    """Counters since the server's start and what waits now, as JSON: they are for operators."""
    return Call("GET", "/v1/memory/health", reply_as_json)


def texts(tokens: Sequence[Sequence[int]]) -> Call[list[str]]:
    """The text of each list of token ids, special tokens included."""

    def parse(response: httpx.Response) -> list[str]:
        found = reply_as_json(response).get("text")
        if not isinstance(found, list) or len(found) != len(tokens):
            raise unexpected(response.status_code, "not one text a list", response.content)
        return [str(text) for text in found]

    if not tokens:
        raise InvalidRequestError("tokens: there is no list", details={"field": "tokens"})
    body = {"tokens": [list(ids) for ids in tokens], "skip_special_tokens": False}
    return Call("POST", "/v1/detokenize", parse, body)


def _memory_place(
    conversation_id: str | None,
    snapshot_id: str | None,
    turn_number: int | None,
    branch_name: str | None,
) -> dict[str, Any]:
    return given(
        conversation_id=conversation_id,
        snapshot_id=snapshot_id,
        turn_number=turn_number,
        branch_name=branch_name,
    )


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def conversation_path(conversation_id: str) -> str:
    """The path of a conversation's routes."""
    return f"/v1/conversations/{_part('conversation_id', conversation_id)}"


def snapshot_path(snapshot_id: str) -> str:
    """The path of a snapshot's routes."""
    return f"/v1/snapshots/{_part('snapshot_id', snapshot_id)}"


def _part(field: str, value: str) -> str:
    """An id as a part of a path; one that is none must not become another path."""
    return quote(check_id(field, value), safe="")
