"""`SnapshotManager`: the five routes of the published Engram fork, replies as they come."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import httpx

from engram.client.calls import given
from engram.client.exchange import Call, Retries, reply_as_json
from engram.client.transport import DEFAULT_TIMEOUT, Transport


class SnapshotManager:
    """Snapshots of one server as JSON, for scripts written for the fork; others have
    `EngramClient`.

        manager = SnapshotManager("http://localhost:30000")
        manager.save("tour")
        manager.restore("tour", turn_number=1)

    Raises `engram.errors.EngramError` where the fork returned ``success: false``.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Describe a server; nothing is sent.  `endpoint` is its address."""
        self._transport = Transport(
            endpoint, api_key=api_key, timeout=timeout, retries=Retries(), transport=transport
        )

    def list_conversation(self, conversation_id: str) -> list[dict[str, Any]]:
        """The metadata of a conversation's snapshots, oldest first."""
        found: list[dict[str, Any]] = self._post(
            "/list_snapshots", conversation_id=conversation_id
        )["snapshots"]
        return found

    def get_info(
        self,
        conversation_id: str,
        turn_number: int | None = None,
        branch_name: str | None = None,
    ) -> dict[str, Any]:
        """The metadata of a turn's snapshot, of the newest without `turn_number`."""
        found: dict[str, Any] = self._post(
            "/get_snapshot_info",
            conversation_id=conversation_id,
            turn_number=turn_number,
            branch_name=branch_name,
        )["metadata"]
        return found

    def save(self, conversation_id: str | None = None, **fields: Any) -> dict[str, Any]:
        """Save a turn; `fields` are those of `POST /save_snapshot`."""
        return self._post("/save_snapshot", conversation_id=conversation_id, **fields)

    def restore(
        self,
        conversation_id: str | None = None,
        turn_number: int | None = None,
        branch_name: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Bring a snapshot into memory; `fields` are those of `POST /restore_snapshot`."""
        return self._post(
            "/restore_snapshot",
            conversation_id=conversation_id,
            turn_number=turn_number,
            branch_name=branch_name,
            **fields,
        )

    def delete(
        self,
        conversation_id: str,
        turn_number: int | None = None,
        branch_name: str | None = None,
    ) -> dict[str, Any]:
        """Delete a turn's snapshot, the newest without `turn_number`."""
        return self._post(
            "/delete_snapshot",
            conversation_id=conversation_id,
            turn_number=turn_number,
            branch_name=branch_name,
        )

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> SnapshotManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, path: str, **fields: Any) -> dict[str, Any]:
        return self._transport.run(Call("POST", path, reply_as_json, given(**fields)))
