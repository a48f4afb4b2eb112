"""The words of retention: what is planned over, by which policy, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from engram.core.settings import Settings
from engram.errors import InvalidRequestError
from engram.snapshot.conversation import DEFAULT_PRIORITY, MAX_PRIORITY

if TYPE_CHECKING:
    from engram.retention.demotion import Resident

TRUNK: Final = "main"
"""The branch that is not named: every conversation begins on it."""


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """One stored segment: rows from the token ``start`` on, or the state at the token ``start``.

    Compared by identity: whoever makes the data makes one object for each stored segment.
    """

    segment_id: str
    parent: Segment | None
    start: int
    bytes: int
    is_state: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. Times are seconds since the epoch.

    ``tips`` are the last segments of its chains, one a rank: its state, where the model has one.
    ``used_at`` is the last use of its
    *conversation*, ``priority`` (0 to 100) its conversation's.
    """

    snapshot_id: str
    conversation_id: str
    branch_name: str
    turn_number: int
    token_count: int
    used_at: float
    tips: tuple[Segment, ...]
    tenant: str = ""
    priority: int = DEFAULT_PRIORITY
    pinned: bool = False
    expires_at: float | None = None

    @property
    def conversation(self) -> tuple[str, str]:
        """Tenant and conversation."""
        return self.tenant, self.conversation_id


@dataclass(frozen=True)
class RetentionPolicy:
    """The rules for the disk. None switches a rule off; times are seconds, sizes bytes.

    ``half_interest`` is the idle time after which a conversation is half as likely to go on.
    """

    keep_last: int | None = None
    keep_named_branches: bool = True
    cold_retention: float | None = None
    disk_quota: int | None = None
    half_interest: float = 1800.0

    @classmethod
    def of(cls, settings: Settings) -> RetentionPolicy:
        """The policy that an operator's settings ask for."""
        quota = settings.snapshot_disk_quota_gb
        return cls(
            keep_last=settings.snapshot_retention_count,
            keep_named_branches=settings.snapshot_keep_named_branches,
            cold_retention=settings.conversation_cold_retention,
            disk_quota=None if quota is None else int(quota * 1e9),
            half_interest=settings.conversation_warm_timeout,
        )


class Reason(Enum):
    """Why a snapshot goes."""

    EXPIRED = "expired"
    COLD = "cold"
    COUNT = "count"
    QUOTA = "quota"


class Keep(Enum):
    """Why a snapshot stays; ``ONLY_ONE`` and ``SHARED`` are about the quota alone."""

    PINNED = "pinned"
    NAMED_BRANCH = "named branch"
    ONLY_ONE = "the conversation's only one"
    SHARED = "frees nothing by itself"
    WANTED = "within the policy"


@dataclass(frozen=True, slots=True)
class Removal:
    """One snapshot that goes. ``freed_bytes`` is what becomes free when it goes at its turn."""

    snapshot: Snapshot
    reason: Reason
    text: str
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One snapshot that stays."""

    snapshot: Snapshot
    reason: Keep


@dataclass(frozen=True)
class RetentionPlan:
    """What goes, in the order in which it is to go, and what stays, least recently used first.

    ``bytes_before`` counts every segment once, ``bytes_after`` those that something kept names.
    ``over_quota`` is how many bytes too many stay because everything left is exempt; 0 is well.
    """

    removals: tuple[Removal, ...]
    kept: tuple[Kept, ...]
    bytes_before: int
    bytes_after: int
    over_quota: int

    @property
    def freed_bytes(self) -> int:
        """What all removals free together."""
        return self.bytes_before - self.bytes_after


def check_entries(kind: str, entries: Iterable[tuple[Snapshot | Resident, str]]) -> None:
    """Raise `InvalidRequestError` for a priority out of bounds, or a name twice in a tenant.

    ``entries`` are what is planned over, each with its name; ``kind`` says what they are.
    """
    seen: set[tuple[str, str]] = set()
    for entry, name in entries:
        if not 0 <= entry.priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority of {entry.conversation_id!r} must be from 0 to {MAX_PRIORITY}, "
                f"not {entry.priority}"
            )
        if (entry.tenant, name) in seen:
            raise InvalidRequestError(f"{kind} {name!r} is there twice")
        seen.add((entry.tenant, name))
