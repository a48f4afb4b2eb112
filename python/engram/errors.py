"""The one error tree. Every error knows its HTTP status, a stable code and, mostly, a hint.

::

    EngramError                      500  internal_error
    |-- InternalError                500  internal_error      a bug of ours, or an invariant broken
    |-- ForeignOriginError           403  foreign_origin      a page of another site asks
    |-- NotFoundError                404  not_found
    |-- AlreadyExistsError           409  already_exists
    |-- InvalidRequestError          422  invalid_request
    |   |-- InvalidIdError           422  invalid_request     names the field
    |   `-- BodyTooLargeError        413  body_too_large
    |-- UnsupportedError             422  unsupported
    |-- NamespaceMismatchError       409  namespace_mismatch  names field, wanted, found
    |-- NamespaceChangedError        409  namespace_changed   new weights came in between: ask again
    |-- ConversationBusyError        409  conversation_busy   its last reply is still being written
    |-- StaleTreeError               409  stale_tree          the tree has states of other weights
    |-- SnapshotCorruptError         409  snapshot_corrupt    names the file and what to do
    |   |-- SegmentCorruptError      409  snapshot_corrupt
    |   `-- ManifestCorruptError     409  snapshot_corrupt
    |-- CaptureLostError             409  capture_lost        bytes gone, cannot be recomputed
    |-- StateUnhealthyError          409  state_unhealthy     NaN, infinity, or a norm that ran away
    |-- RamTierFullError             503  ram_tier_full
    |-- PinBudgetError               409  pin_budget          more pinned in VRAM than may be
    |-- SaveQueueFullError           503  save_queue_full     more is saved than the store can write
    |-- GenerationAbortedError       503  generation_aborted  by SGLang, with its reason
    |-- DeadlineError                504  deadline
    |-- ToolError                    502  tool_failed         a tool raised, or returned no JSON
    |   |-- ToolCrashedError         502  tool_crashed        its process ended in the middle
    |   |-- ToolTimeoutError         504  tool_timeout        ended, with its process
    |   `-- ToolResultTooLargeError  502  tool_result_too_large
    |-- AgentsBusyError              503  agents_busy         more at once than is served
    |-- RunConflictError             409  run_conflict        the run's status does not allow it
    |-- OutcomeUnknownError          409  outcome_unknown     a call may have been carried out
    |-- ServerUnreachableError       502  server_unreachable  of clients: no answer, or half of one
    |-- UpstreamError                502  upstream_error      SGLang's own failures
    `-- StoreError                   500  store_error         the disk or its driver failed
        |-- StoreFullError           507  store_full          needed and free bytes
        |-- StoreFormatError         500  store_format        written by a newer version
        |-- StoreBusyError           409  store_busy          another server holds the directory
        |-- EncryptionKeyError       500  encryption_key      no key, another one, or unfit for use
        `-- KeyringCorruptError      500  keyring_corrupt     without it nothing encrypted is read

Every class takes ``(message, hint=, details=)``, so that an error survives pickling and the way
from a rank to the HTTP process (`to_dict`, `error_from_dict`). ``details`` holds JSON values only.
Over HTTP every one is told in the form of `to_reply`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

__all__ = [
    "AgentsBusyError",
    "AlreadyExistsError",
    "BodyTooLargeError",
    "CaptureLostError",
    "ConversationBusyError",
    "DeadlineError",
    "EncryptionKeyError",
    "EngramError",
    "ForeignOriginError",
    "GenerationAbortedError",
    "InternalError",
    "InvalidIdError",
    "InvalidRequestError",
    "KeyringCorruptError",
    "ManifestCorruptError",
    "NamespaceChangedError",
    "NamespaceMismatchError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PinBudgetError",
    "RamTierFullError",
    "RunConflictError",
    "SaveQueueFullError",
    "SegmentCorruptError",
    "ServerUnreachableError",
    "SnapshotCorruptError",
    "StaleTreeError",
    "StateUnhealthyError",
    "StoreBusyError",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "ToolCrashedError",
    "ToolError",
    "ToolResultTooLargeError",
    "ToolTimeoutError",
    "UnsupportedError",
    "UpstreamError",
    "error_from_dict",
    "walk_error_classes",
]


class EngramError(Exception):
    """Root of all errors Engram raises on purpose.

    ``message`` says what is wrong, ``hint`` what to do about it, ``details`` the facts as JSON
    values for programs.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500

    def __init__(
        self, message: str, *, hint: str = "", details: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, object] = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_dict(self) -> dict[str, object]:
        """As one flat object, for events and for the way between processes."""
        return {
            "success": False,
            "error": self.code,
            "message": self.message,
            "hint": self.hint,
            "details": dict(self.details),
        }

    def to_reply(self) -> dict[str, object]:
        """The body of a failed reply over HTTP.

        ``error`` is an object, as OpenAI's clients read it; ``success`` and ``message`` stand
        beside it for clients of the published fork.
        """
        return {
            "success": False,
            "message": self.message,
            "error": {
                "code": self.code,
                "message": self.message,
                "hint": self.hint,
                "details": dict(self.details),
            },
        }


class InternalError(EngramError):
    """An invariant of Engram's own does not hold."""


class ForeignOriginError(EngramError):
    """A page of another origin asks; a browser lets it reach any server, so the server refuses."""

    code = "foreign_origin"
    http_status = 403


class NotFoundError(EngramError):
    """No conversation, snapshot, branch, turn or namespace of that name."""

    code = "not_found"
    http_status = 404


class AlreadyExistsError(EngramError):
    """The name is taken by something else."""

    code = "already_exists"
    http_status = 409


class InvalidRequestError(EngramError):
    """Input from outside that cannot be accepted; the message names the field."""

    code = "invalid_request"
    http_status = 422


class InvalidIdError(InvalidRequestError):
    """An id outside ``[A-Za-z0-9._:-]{1,255}`` or with a leading dot."""


class BodyTooLargeError(InvalidRequestError):
    """The body of a request is larger than the route allows."""

    code = "body_too_large"
    http_status = 413


class UnsupportedError(EngramError):
    """Understood, but not something this build or configuration can do."""

    code = "unsupported"
    http_status = 422


class NamespaceMismatchError(EngramError):
    """Bytes made under other weights, dtypes or layout than the server runs with."""

    code = "namespace_mismatch"
    http_status = 409

    @classmethod
    def of(cls, field: str, wanted: object, found: object) -> NamespaceMismatchError:
        """``wanted`` is the server's value of ``field``, ``found`` the snapshot's."""
        return cls(
            f"namespace mismatch in {field!r}: this server has {wanted!r}, "
            f"the snapshot was made with {found!r}",
            hint="restore it on a server started with the same model and settings",
            details={"field": field, "wanted": wanted, "found": found},
        )


class NamespaceChangedError(EngramError):
    """The server's weights changed while something was asked of the ones before."""

    code = "namespace_changed"
    http_status = 409


class ConversationBusyError(EngramError):
    """A branch is gone on from while its newest reply is still being written."""

    code = "conversation_busy"
    http_status = 409


class StaleTreeError(EngramError):
    """SGLang's tree still holds states that other weights made, so nothing can be saved from it."""

    code = "stale_tree"
    http_status = 409


class SnapshotCorruptError(EngramError):
    """A stored file is damaged or missing. It has been quarantined where that was possible."""

    code = "snapshot_corrupt"
    http_status = 409


class SegmentCorruptError(SnapshotCorruptError):
    """A segment is damaged, missing, or not where its header says it belongs."""


class ManifestCorruptError(SnapshotCorruptError):
    """A manifest is damaged, or not where its snapshot id says it belongs."""


class CaptureLostError(EngramError):
    """State that was captured is gone from memory and cannot be computed again."""

    code = "capture_lost"
    http_status = 409


class StateUnhealthyError(EngramError):
    """A recurrent state is not kept because it holds a NaN or an infinity, or its norm ran away."""

    code = "state_unhealthy"
    http_status = 409


class RamTierFullError(EngramError):
    """The RAM tier cannot make room: what it holds is pinned or leased."""

    code = "ram_tier_full"
    http_status = 503


class PinBudgetError(EngramError):
    """Pins would hold more of the device's memory than they may."""

    code = "pin_budget"
    http_status = 409


class SaveQueueFullError(EngramError):
    """Too many saves wait to be written: the store is slower than what is saved."""

    code = "save_queue_full"
    http_status = 503


class GenerationAbortedError(EngramError):
    """SGLang ended a generation without completing it."""

    code = "generation_aborted"
    http_status = 503


class DeadlineError(EngramError):
    """Something did not finish in the time it was given."""

    code = "deadline"
    http_status = 504


class ToolError(EngramError):
    """A tool of an agent raised an error, or returned what cannot be written as JSON."""

    code = "tool_failed"
    http_status = 502


class ToolCrashedError(ToolError):
    """The process of a tool ended before its result came."""

    code = "tool_crashed"


class ToolTimeoutError(ToolError):
    """A tool took longer than it may; it was ended, with all it had started."""

    code = "tool_timeout"
    http_status = 504


class ToolResultTooLargeError(ToolError):
    """The result of a tool has more bytes, written as JSON, than a result may."""

    code = "tool_result_too_large"


class AgentsBusyError(EngramError):
    """More runs, tool calls or connections at once than the server takes."""

    code = "agents_busy"
    http_status = 503


class RunConflictError(EngramError):
    """What is asked of an agent run does not fit its status."""

    code = "run_conflict"
    http_status = 409


class OutcomeUnknownError(EngramError):
    """The server ended while a tool was at work: whether it had its effect is not known."""

    code = "outcome_unknown"
    http_status = 409


class ServerUnreachableError(EngramError):
    """Raised by clients: there is no answer from the server, or it broke off."""

    code = "server_unreachable"
    http_status = 502


class UpstreamError(EngramError):
    """SGLang itself failed, or, of clients, something else answered; ``details.status`` is its."""

    code = "upstream_error"
    http_status = 502


class StoreError(EngramError):
    """The operating system refused an operation on the snapshot directory."""

    code = "store_error"
    http_status = 500


class StoreFullError(StoreError):
    """No space (or quota) left for a write. Nothing partial stays behind."""

    code = "store_full"
    http_status = 507

    @classmethod
    def of(cls, *, needed: int, free: int | None, where: str) -> StoreFullError:
        """``needed`` and ``free`` are bytes; ``free`` is None where it cannot be told."""
        shown = "unknown" if free is None else str(free)
        return cls(
            f"the snapshot store is full: {needed} bytes needed, {shown} free in {where}",
            hint="free space, delete snapshots, or lower the retention count",
            details={"needed": needed, "free": free, "where": where},
        )

    @classmethod
    def over_quota(cls, *, needed: int, used: int, quota: int) -> StoreFullError:
        """A save of ``needed`` bytes for which no room could be made; all are bytes."""
        return cls(
            f"the snapshot store is at its quota: {needed} bytes needed, {used} of {quota} used, "
            "and nothing more may be removed for it",
            hint="raise --snapshot-disk-quota-gb, unpin or delete snapshots",
            details={"needed": needed, "used": used, "quota": quota},
        )


class StoreFormatError(StoreError):
    """Something stored has a format version this build does not know."""

    code = "store_format"
    http_status = 500

    @classmethod
    def of(cls, what: str, found: int, supported: int) -> StoreFormatError:
        """``what`` names the file kind and, where known, the file."""
        return cls(
            f"{what} has format version {found}, this Engram reads version {supported}",
            hint="use the Engram version that wrote it, or another snapshot directory",
            details={"what": what, "found": found, "supported": supported},
        )


class StoreBusyError(StoreError):
    """Another server holds the snapshot directory."""

    code = "store_busy"
    http_status = 409


class EncryptionKeyError(StoreError):
    """A key for encryption at rest is missing, malformed, readable by others or not the store's."""

    code = "encryption_key"
    http_status = 500


class KeyringCorruptError(StoreError):
    """The store's keyring is damaged or missing: no encrypted segment can be read without it."""

    code = "keyring_corrupt"
    http_status = 500


def walk_error_classes(root: type[EngramError] = EngramError) -> Iterator[type[EngramError]]:
    """Every class of the tree, parents before children."""
    yield root
    for child in root.__subclasses__():
        yield from walk_error_classes(child)


def error_from_dict(body: Mapping[str, object]) -> EngramError:
    """The error a `to_dict` came from: the most general class that has its code."""
    code = body.get("error")
    cls = next((c for c in walk_error_classes() if c.code == code), EngramError)
    details = body.get("details")
    return cls(
        str(body.get("message", "")),
        hint=str(body.get("hint", "")),
        details=details if isinstance(details, Mapping) else None,
    )
