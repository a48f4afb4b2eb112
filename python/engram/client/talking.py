"""The calls of one conversation; `Conversation` and `AsyncConversation` have each as a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx

from engram.client import calls
from engram.client.binding import Place
from engram.client.chat import Message, Reply, chat_body, reply_of, turn_body
from engram.client.exchange import Call
from engram.client.results import (
    ConversationDeleted,
    ConversationDetails,
    Durability,
    Pinned,
    Prioritised,
    Restored,
    Saved,
    Snapshot,
    SnapshotPage,
    Unpinned,
)


def send(
    place: Place, /, message: Message, *, from_turn: int | None = None, **options: Any
) -> Call[Reply]:
    """Say something and wait for the whole reply; the server has what was said before.

    Args:
        message: what the user says; or messages in OpenAI's form, for other roles.
        from_turn: go on from this turn instead of the newest.
        options: more fields of a chat completion: `max_tokens`, `temperature`, `tools`, ...
    """
    body = chat_body(place, message, options, from_turn)
    return Call("POST", path_of(place, "chat"), reply_of, body)


def regenerate(place: Place, /, **options: Any) -> Call[Reply]:
    """Have the last reply written once more, as another turn; `options` as for `send`."""
    return Call("POST", path_of(place, "regenerate"), reply_of, turn_body(place, options))


def extend(place: Place, /, **options: Any) -> Call[Reply]:
    """Have the last reply written further, as another turn; `options` as for `send`."""
    return Call("POST", path_of(place, "continue"), reply_of, turn_body(place, options))


def streamed(
    place: Place, message: Message, from_turn: int | None, options: Mapping[str, Any]
) -> Call[httpx.Response]:
    """`send` as a stream."""
    return _streamed(place, "chat", chat_body(place, message, options, from_turn))


def streamed_again(
    place: Place, kind: Literal["regenerate", "continue"], options: Mapping[str, Any]
) -> Call[httpx.Response]:
    """`regenerate`, or with "continue" `extend`, as a stream."""
    return _streamed(place, kind, turn_body(place, options))


def _streamed(place: Place, kind: str, body: dict[str, Any]) -> Call[httpx.Response]:
    body["stream"] = True
    body.setdefault("stream_options", {"include_usage": True})
    return Call("POST", path_of(place, kind), lambda response: response, body, stream=True)


def path_of(place: Place, kind: str) -> str:
    """Where a conversation goes on."""
    return f"{calls.conversation_path(place.conversation_id)}/{kind}"


def save(
    place: Place,
    *,
    turn: int | None = None,
    snapshot_id: str | None = None,
    durability: Durability | None = None,
) -> Call[Saved]:
    """Make a turn durable, the newest if not said otherwise."""
    return calls.save(
        place.conversation_id,
        branch_name=place.branch_name,
        turn_number=turn,
        snapshot_id=snapshot_id,
        durability=durability,
    )


def restore(
    place: Place,
    *,
    turn: int | None = None,
    continuation_ids: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    sampling_params: Mapping[str, Any] | None = None,
) -> Call[Restored]:
    """Bring a saved turn into memory, verified, the newest if not said otherwise.

    With `continuation_ids` (and `max_new_tokens`) also generate from it.
    """
    return calls.restore(
        place.conversation_id,
        branch_name=place.branch_name,
        turn_number=turn,
        continuation_ids=continuation_ids,
        max_new_tokens=max_new_tokens,
        sampling_params=sampling_params,
    )


def info(place: Place, *, turn: int | None = None) -> Call[Snapshot]:
    """Describe a saved turn, the newest if not said otherwise."""
    return calls.find_snapshot(place.conversation_id, turn, place.branch_name)


def snapshots(place: Place, *, limit: int = 100, after: str | None = None) -> Call[SnapshotPage]:
    """A page of the branch's snapshots, oldest first."""
    return calls.list_snapshots(place.conversation_id, place.branch_name, limit, after)


def details(place: Place) -> Call[ConversationDetails]:
    """Describe the conversation as a whole."""
    return calls.get_conversation(place.conversation_id)


def delete(place: Place) -> Call[ConversationDeleted]:
    """Delete all snapshots of the whole conversation."""
    return calls.delete_conversation(place.conversation_id)


def set_priority(place: Place, priority: int) -> Call[Prioritised]:
    """Say what the conversation is worth, from 0 to 100."""
    return calls.set_priority(place.conversation_id, priority)


def pin(place: Place) -> Call[Pinned]:
    """Keep the branch's newest state in VRAM, turn after turn."""
    return calls.pin(place.conversation_id, place.branch_name)


def unpin(place: Place) -> Call[Unpinned]:
    """Let the branch leave VRAM again."""
    return calls.unpin(place.conversation_id, place.branch_name)
