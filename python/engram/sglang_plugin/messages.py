"""What the HTTP process and the ranks say to each other.

Requests travel SGLang's own way to the scheduler and are handled on its thread between two steps,
in the same order on every rank.  Replies come over a socket of Engram's own straight from whichever
thread has the answer, so that a save does not wait for a scheduler step, and from every rank.

msgspec structs, as `sglang.srt.managers.io_struct.hook_custom_types` wants them.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

# Upstream's decoder resolves these annotations itself: `X | None` there needs Python 3.10+, which
# holds, but the names must be importable at run time, so nothing here hides behind TYPE_CHECKING.


class EngramRequest(BaseReq, kw_only=True):
    """Base of the requests; `call_id` correlates the replies.

    `replica` is the data-parallel replica that is meant, None for all.
    """

    call_id: str
    replica: int | None = None


class DescribeRequest(EngramRequest, kw_only=True):
    """Ask a rank who it is: namespace, page size, model, store shard."""


class StateRequest(EngramRequest, kw_only=True):
    """Base of those that speak of stored state: `namespace` is the one they believe the rank has.

    Weights may change while a request is on its way.  A rank with another namespace answers with
    `NamespaceChangedError` instead of taking what is named for missing or damaged.
    """

    namespace: str


class PersistRequest(StateRequest, kw_only=True):
    """Make the state at the end of a sequence durable.

    `request_rid` names the finished request whose tokens these are, when it is known; `tokens` are
    all recorded ones; `boundary` is where the state is expected if the rank does not remember.
    With `locate` nothing is written yet: the reply tells the boundary alone, and with `measure`
    how much would be written.
    """

    request_rid: str | None
    tokens: list[int]
    boundary: int
    locate: bool = False
    measure: bool = False
    extra_key: str | None = None
    cache_salt: str | None = None


class PromoteRequest(StateRequest, kw_only=True):
    """Bring a stored chain into RAM and lease it; `refs` has one chain a rank, as plain dicts."""

    refs: list[list[dict[str, Any]]]
    owner: str
    seconds: float
    exact: bool
    tokens: list[int] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


class ProbeRequest(StateRequest, kw_only=True):
    """Ask in which tier a stored sequence is; `key` is the page key at the end of `tokens`."""

    key: str
    tokens: list[int]
    extra_key: str | None = None
    cache_salt: str | None = None


class DropRequest(StateRequest, kw_only=True):
    """Delete segment files that no manifest names; `segment_ids` has one list a rank."""

    segment_ids: list[list[str]]


class ResidentsRequest(StateRequest, kw_only=True):
    """Ask which durable segments are in RAM."""


class DemoteRequest(StateRequest, kw_only=True):
    """Let segments leave RAM; `segment_ids` has one list a rank."""

    segment_ids: list[list[str]]


class PinRequest(PersistRequest, kw_only=True):
    """Keep the state at the end of a sequence in SGLang's tree, if it is there, for `owner`."""

    owner: str


class UnpinRequest(EngramRequest, kw_only=True):
    """Let go of what its owner has pinned."""

    owner: str


class ReleaseRequest(EngramRequest, kw_only=True):
    """Its owner wants no chain any longer, leased or still to be promoted; there is no reply."""

    owner: str


class StatsRequest(EngramRequest, kw_only=True):
    """Ask for the counters of the tiers."""


class EngramReply(BaseReq, kw_only=True):
    """A rank's answer: a result, or an error as `EngramError.to_dict()`."""

    call_id: str
    rank: int
    replica: int = 0
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


REQUESTS: tuple[type[EngramRequest], ...] = (
    DescribeRequest,
    PersistRequest,
    PromoteRequest,
    ProbeRequest,
    DropRequest,
    ResidentsRequest,
    DemoteRequest,
    PinRequest,
    UnpinRequest,
    ReleaseRequest,
    StatsRequest,
)


def register_messages() -> None:
    """Teach SGLang's decoder these types; once in every process."""
    hook_custom_types(*REQUESTS, EngramReply)
