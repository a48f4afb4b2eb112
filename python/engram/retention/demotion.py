"""Which conversations leave RAM. They stay on disk, so what this costs is reading them back.

Three rules, in this order: idle for too long, too many conversations, too many bytes. By the last
two those go first that are least likely to go on; that is all that counts, since what reading back
costs grows with the very bytes that leaving frees. Conversations in active use go after all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from engram.core.settings import Settings
from engram.retention.base import check_entries
from engram.retention.plan import interest
from engram.snapshot.conversation import DEFAULT_PRIORITY


@dataclass(frozen=True, slots=True)
class Resident:
    """One conversation that has bytes in RAM.

    ``bytes`` are those that only it needs there; what it shares leaves with the last that needs it.
    ``held`` says that something is being done with it: it is leased, copied or saved.
    ``durable`` that everything of it is on disk already.
    """

    conversation_id: str
    used_at: float
    bytes: int
    tenant: str = ""
    priority: int = DEFAULT_PRIORITY
    pinned: bool = False
    held: bool = False
    durable: bool = True


@dataclass(frozen=True)
class DemotionPolicy:
    """The rules for RAM. None switches a limit off; times are seconds, sizes bytes.

    A conversation used within ``active_timeout`` leaves only if a limit cannot be kept otherwise.
    """

    active_timeout: float = 300.0
    warm_timeout: float = 1800.0
    max_conversations: int | None = None
    max_bytes: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> DemotionPolicy:
        """The policy that an operator's settings ask for."""
        return cls(
            active_timeout=settings.conversation_active_timeout,
            warm_timeout=settings.conversation_warm_timeout,
            max_conversations=settings.max_warm_conversations,
            max_bytes=settings.max_warm_bytes,
        )


class DemotionReason(Enum):
    """Why a conversation leaves RAM."""

    IDLE = "idle"
    COUNT = "count"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Demotion:
    """One conversation that leaves. With ``save_first`` its bytes are nowhere else yet."""

    resident: Resident
    reason: DemotionReason
    text: str

    @property
    def save_first(self) -> bool:
        return not self.resident.durable


@dataclass(frozen=True)
class DemotionPlan:
    """Who leaves, in this order, and by how much the limits cannot be kept (0: they are)."""

    demotions: tuple[Demotion, ...]
    over_conversations: int
    over_bytes: int


def plan_demotions(
    residents: Iterable[Resident], policy: DemotionPolicy, now: float
) -> DemotionPlan:
    """Decide who leaves RAM at the time ``now`` (seconds since the epoch).

    Pinned and held conversations stay, and count. The order of ``residents`` decides nothing;
    carrying the plan out and planning again at the same time asks for nothing more.

    Raises `InvalidRequestError` for a priority outside 0 to 100, or one conversation twice.
    """
    everyone = list(residents)
    check_entries("conversation", ((one, one.conversation_id) for one in everyone))
    movable = [resident for resident in everyone if not resident.pinned and not resident.held]

    def worth(resident: Resident) -> tuple[object, ...]:
        idle = max(0.0, now - resident.used_at)
        active = idle < policy.active_timeout
        likely = interest(idle, resident.priority, policy.warm_timeout)
        return active, likely, resident.used_at, resident.tenant, resident.conversation_id

    movable.sort(key=worth)
    count, held_bytes = len(everyone), sum(resident.bytes for resident in everyone)
    demotions: list[Demotion] = []
    for demotion in _idle(movable, policy, now):
        demotions.append(demotion)
        count -= 1
        held_bytes -= demotion.resident.bytes
    gone = {id(demotion.resident) for demotion in demotions}
    for resident in (resident for resident in movable if id(resident) not in gone):
        if policy.max_conversations is not None and count > policy.max_conversations:
            text = f"{count} conversations in RAM, {policy.max_conversations} allowed"
            demotions.append(Demotion(resident, DemotionReason.COUNT, text))
        elif policy.max_bytes is not None and held_bytes > policy.max_bytes and resident.bytes:
            text = f"{held_bytes} bytes in RAM, {policy.max_bytes} allowed"
            demotions.append(Demotion(resident, DemotionReason.MEMORY, text))
        else:
            continue
        count -= 1
        held_bytes -= resident.bytes
    return DemotionPlan(
        tuple(demotions),
        over_conversations=_over(count, policy.max_conversations),
        over_bytes=_over(held_bytes, policy.max_bytes),
    )


def _idle(movable: list[Resident], policy: DemotionPolicy, now: float) -> Iterator[Demotion]:
    longest = max(policy.warm_timeout, policy.active_timeout)
    for resident in movable:
        idle = now - resident.used_at
        if idle > longest:
            text = f"unused for {idle:.0f} s, {longest:.0f} s allowed"
            yield Demotion(resident, DemotionReason.IDLE, text)


def _over(found: int, allowed: int | None) -> int:
    return 0 if allowed is None else max(0, found - allowed)
