"""Which finished turns are saved by themselves, and when.  Pure: plain values in and out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engram.core.settings import Settings


class When(Enum):
    """What to do with a turn that has just finished."""

    NEVER = "never"
    NOW = "now"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class Trigger:
    """A decision; `delay` seconds from now for `When.LATER`."""

    when: When
    delay: float = 0.0


def decide(
    settings: Settings,
    turn_number: int,
    since_last_save: float | None,
    *,
    tool_calls: bool = False,
) -> Trigger:
    """Whether to save turn `turn_number`; `since_last_save` is None if none was saved yet.

    With `tool_calls` its reply is known to contain some.
    The least interval puts a save off, it never drops the last turn: whoever carries this out
    saves, when the delay is over, the newest turn that was due by then.
    """
    policy = settings.snapshot_trigger_policy
    if policy == "manual_only" or (policy == "on_tool_call" and not tool_calls):
        return Trigger(When.NEVER)
    if policy == "every_n_turns" and turn_number % settings.snapshot_every_n_turns:
        return Trigger(When.NEVER)
    wait = settings.snapshot_min_interval_seconds
    if since_last_save is None or since_last_save >= wait:
        return Trigger(When.NOW)
    return Trigger(When.LATER, wait - since_last_save)
