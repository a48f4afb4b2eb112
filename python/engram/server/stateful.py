"""What a stateful request asks for, on its way from the route to where the prompt is made."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal

from engram.core.ids import check_id
from engram.errors import InvalidRequestError
from engram.service.recorded import Place

PLACE_FIELDS: Final = frozenset({"conversation_id", "branch_name", "turn_number"})
MAX_TURN: Final = 2**63


@dataclass(frozen=True, slots=True)
class Stateful:
    """A request that goes on from recorded tokens.

    `chat` says something new, `regenerate` has the last reply written once more, `continue` has it
    written further.
    """

    kind: Literal["chat", "regenerate", "continue"] = "chat"
    branch_name: str | None = None
    source: Place | None = None


CURRENT_STATEFUL: ContextVar[Stateful | None] = ContextVar("CURRENT_STATEFUL", default=None)
"""What the request that is served in this task asks for; None if it sends its whole history."""


def stateful_of(kind: Any, conversation_id: str, branch_name: Any, source: Any) -> Stateful:
    """From the fields of a body.  `InvalidRequestError` naming the field that is wrong."""
    branch = None if branch_name is None else check_id("branch_name", branch_name)
    return Stateful(kind, branch, None if source is None else _place(source, conversation_id))


def _place(source: Any, conversation_id: str) -> Place:
    if not isinstance(source, dict):
        raise InvalidRequestError(
            "continue_from must be an object", details={"field": "continue_from"}
        )
    unknown = sorted(source.keys() - PLACE_FIELDS)
    if unknown:
        raise InvalidRequestError(
            f"continue_from has no field {unknown[0]!r}",
            hint=f"there are {', '.join(sorted(PLACE_FIELDS))}",
            details={"field": f"continue_from.{unknown[0][:80]}"},
        )
    number = source.get("turn_number")
    if number is not None and not (type(number) is int and 1 <= number < MAX_TURN):
        raise InvalidRequestError(
            "continue_from.turn_number must be an integer from 1",
            details={"field": "continue_from.turn_number"},
        )
    ids = {
        name: None if source.get(name) is None else check_id(f"continue_from.{name}", source[name])
        for name in ("conversation_id", "branch_name")
    }
    return Place(ids["conversation_id"] or conversation_id, ids["branch_name"], number)
