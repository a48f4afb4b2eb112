"""What is known of a request while it runs, and of a turn after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engram.core.ids import DEFAULT_BRANCH, DEFAULT_TENANT
from engram.core.tokens import TokenArray


@dataclass(frozen=True, slots=True)
class Tag:
    """To which conversation and branch a request belongs.

    `parent_snapshot` is set where the request continues a snapshot by name (a restore).
    `priority` is what the request says that its conversation is worth; None if it says nothing.
    `after_turn` is the turn it goes on from where its branch begins with it; turns count on from
    that one.
    """

    conversation_id: str
    branch_name: str = DEFAULT_BRANCH
    tenant: str = DEFAULT_TENANT
    parent_snapshot: str | None = None
    priority: int | None = None
    after_turn: int = 0

    @property
    def branch(self) -> tuple[str, str, str]:
        """What names a branch among all tenants and conversations."""
        return (self.tenant, self.conversation_id, self.branch_name)


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request on its way: its prompt and what its page keys are seeded with.

    It has been held for `waited` seconds before it had a prompt.
    """

    rid: str
    prompt: TokenArray
    tag: Tag | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A completed request: `tokens` are prompt and output, u32, all of them.

    The first `prompt_count` of them are the prompt; None where nobody counted.
    """

    rid: str
    tokens: TokenArray
    finished_at: float
    extra_key: str | None = None
    cache_salt: str | None = None
    prompt_count: int | None = None


@dataclass(slots=True)
class Turn:
    """One completed reply of a conversation; the server counts, the first is turn 1."""

    tag: Tag
    number: int
    request: FinishedRequest
    snapshot_id: str | None = field(default=None)
