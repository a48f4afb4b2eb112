"""The snapshots table: insert, change, delete, find, list."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from engram.catalog.checksum import row_is_intact
from engram.catalog.database import Database
from engram.catalog.rows import (
    BranchRow,
    ConversationRow,
    SnapshotPage,
    SnapshotRow,
)
from engram.core.canonical import canonical_json
from engram.core.ids import check_id
from engram.errors import AlreadyExistsError, InvalidRequestError, NotFoundError
from engram.snapshot.listing import ManifestEntry
from engram.snapshot.manifest import Manifest, SegmentRef

MAX_PAGE: Final = 1000
# In an id "~" cannot occur, so that it ends the time in a cursor.
_CURSOR_SEPARATOR: Final = "~"


class SnapshotTable:
    """The part of the catalog about snapshots. Every snapshot id is scoped by its tenant."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def atomic(self) -> AbstractContextManager[None]:
        """``with catalog.atomic():`` all changes within are committed together, or none is."""
        return self._db.atomic()

    def ensure_free(self, manifest: Manifest) -> None:
        """Raise `AlreadyExistsError` if the snapshot's id, or its place in the tree, is taken.

        For the caller to ask before it writes the manifest's file.
        """
        if self._db.row(
            "SELECT 1 FROM snapshots WHERE tenant = ? AND snapshot_id = ?",
            (manifest.tenant, manifest.snapshot_id),
        ):
            raise AlreadyExistsError(
                f"snapshot {manifest.snapshot_id!r} exists already",
                hint="choose another snapshot_id, or none to have one made",
                details={"snapshot_id": manifest.snapshot_id},
            )
        taken = self._db.row(
            "SELECT snapshot_id FROM snapshots WHERE tenant = ? AND conversation_id = ?"
            " AND branch_name = ? AND turn_number = ?",
            (
                manifest.tenant,
                manifest.conversation_id,
                manifest.branch_name,
                manifest.turn_number,
            ),
        )
        if taken:
            raise AlreadyExistsError(
                f"turn {manifest.turn_number} of branch {manifest.branch_name!r} of conversation "
                f"{manifest.conversation_id!r} is snapshot {taken[0]!r} already",
                hint="delete that snapshot first, or save on another branch",
                details={"snapshot_id": taken[0]},
            )

    def insert(self, manifest: Manifest, entry: ManifestEntry) -> None:
        """Add a stored manifest. Raises `AlreadyExistsError` as `ensure_free` does."""
        with self._db.atomic():
            self.ensure_free(manifest)
            self._db.insert("snapshots", [_columns_of(manifest, entry)])
            self._insert_segments(manifest)

    def replace(self, manifest: Manifest, entry: ManifestEntry) -> None:
        """Take over a manifest that was written again (pinned, expiry, metadata, durability).

        Raises `NotFoundError` if the catalog does not hold the snapshot.
        """
        with self._db.atomic():
            self.get(manifest.snapshot_id, manifest.tenant)
            self.delete(manifest.snapshot_id, manifest.tenant)
            self.insert(manifest, entry)

    def delete(self, snapshot_id: str, tenant: str = "") -> bool:
        """Remove a snapshot's row; whether there was one. Its segments stay, unreferenced."""
        return bool(
            self._db.run(
                "DELETE FROM snapshots WHERE tenant = ? AND snapshot_id = ?", (tenant, snapshot_id)
            )
        )

    def get(self, snapshot_id: str, tenant: str = "") -> SnapshotRow:
        """One snapshot. Raises `NotFoundError`."""
        row = self._db.row(
            "SELECT * FROM snapshots WHERE tenant = ? AND snapshot_id = ?", (tenant, snapshot_id)
        )
        if row is None:
            raise NotFoundError(
                f"no snapshot {snapshot_id!r}", details={"snapshot_id": snapshot_id}
            )
        return self._snapshot(row)

    def find(
        self, tenant: str, conversation_id: str, branch_name: str, turn_number: int | None = None
    ) -> SnapshotRow:
        """The snapshot of a turn; of the branch's newest without ``turn_number``.

        Raises `NotFoundError` saying which of conversation, branch and turn is unknown.
        """
        row = self._db.row(
            "SELECT * FROM snapshots WHERE tenant = ?1 AND conversation_id = ?2"
            " AND branch_name = ?3 AND (?4 IS NULL OR turn_number = ?4)"
            " ORDER BY turn_number DESC LIMIT 1",
            (tenant, conversation_id, branch_name, turn_number),
        )
        if row is None:
            raise self._unknown(tenant, conversation_id, branch_name, turn_number)
        return self._snapshot(row)

    def before(
        self, tenant: str, conversation_id: str, branch_name: str, turn_number: int
    ) -> SnapshotRow | None:
        """The snapshot of a branch's newest saved turn below ``turn_number``; None without one."""
        row = self._db.row(
            "SELECT * FROM snapshots WHERE tenant = ? AND conversation_id = ? AND branch_name = ?"
            " AND turn_number < ? ORDER BY turn_number DESC LIMIT 1",
            (tenant, conversation_id, branch_name, turn_number),
        )
        return None if row is None else self._snapshot(row)

    def find_rid(self, rid: str, tenant: str = "") -> SnapshotRow | None:
        """The newest snapshot of the request ``rid``, on whichever branch; None without one."""
        row = self._db.row(
            "SELECT * FROM snapshots WHERE tenant = ? AND rid = ? ORDER BY created_at DESC LIMIT 1",
            (tenant, rid),
        )
        return None if row is None else self._snapshot(row)

    def ending_at(
        self, tenant: str, namespace: str, boundary_key: str, limit: int
    ) -> list[SnapshotRow]:
        """The newest snapshots whose state stands at ``boundary_key``."""
        rows = self._db.rows(
            "SELECT * FROM snapshots WHERE namespace = ? AND boundary_key = ? AND tenant = ?"
            " ORDER BY created_at DESC LIMIT ?",
            (namespace, boundary_key, tenant, limit),
        )
        return [self._snapshot(row) for row in rows]

    def branches_of_many(self, tenant: str, id_prefix: str, limit: int) -> list[tuple[str, str]]:
        """(conversation id, branch) of conversations whose id begins so, the newest first."""
        rows = self._db.rows(
            "SELECT conversation_id, branch_name FROM snapshots WHERE tenant = ?"
            " AND conversation_id >= ? AND conversation_id < ?"
            " GROUP BY conversation_id, branch_name ORDER BY MAX(created_at) DESC LIMIT ?",
            # Ids are ASCII, and "~" is above all that may be in one.
            (tenant, id_prefix, id_prefix + "~", limit),
        )
        return [(row["conversation_id"], row["branch_name"]) for row in rows]

    def earlier(
        self, tenant: str, conversation_id: str, branch_name: str, before_turn: int
    ) -> Iterator[tuple[str, str]]:
        """(snapshot id, boundary key) of a branch's turns below ``before_turn``, newest first."""
        rows = self._db.rows(
            "SELECT snapshot_id, boundary_key FROM snapshots WHERE tenant = ?"
            " AND conversation_id = ? AND branch_name = ? AND turn_number < ?"
            " ORDER BY turn_number DESC",
            (tenant, conversation_id, branch_name, before_turn),
        )
        return ((row[0], row[1]) for row in rows)

    def list_snapshots(
        self,
        tenant: str,
        conversation_id: str | None = None,
        branch_name: str | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
    ) -> SnapshotPage:
        """A tenant's snapshots, oldest first, at most ``limit`` (1 to `MAX_PAGE`) of them.

        ``after`` is the cursor of the page before. An unknown conversation is an empty list.
        Raises `InvalidRequestError` for a bad limit or cursor.
        """
        _check_limit(limit)
        created_at, snapshot_id = (-1.0, "") if after is None else _parse_cursor(after)
        # Only the conditions there are: "? IS NULL OR ..." would hide the index from SQLite.
        wanted = {"conversation_id": conversation_id, "branch_name": branch_name}
        given = {name: value for name, value in wanted.items() if value is not None}
        # A conversation is found by its own index; "+" keeps SQLite from walking that of the age.
        age = "created_at, snapshot_id" if conversation_id is None else "+created_at, +snapshot_id"
        rows = self._db.rows(
            "SELECT * FROM snapshots WHERE tenant = ?"
            + "".join(f" AND {name} = ?" for name in given)
            + f" AND ({age}) > (?, ?) ORDER BY {age} LIMIT ?",
            (tenant, *given.values(), created_at, snapshot_id, limit + 1),
        )
        page = tuple(self._snapshot(row) for row in rows[:limit])
        more = len(rows) > limit
        return SnapshotPage(page, _cursor(page[-1]) if more else None)

    def all_snapshots(self) -> list[SnapshotRow]:
        """The snapshots of all tenants, oldest first: for retention, never for a listing."""
        rows = self._db.rows("SELECT * FROM snapshots ORDER BY created_at, tenant, snapshot_id")
        return [self._snapshot(row) for row in rows]

    def boundary_keys(self, namespace: str) -> dict[tuple[str, str], list[str]]:
        """(Tenant, snapshot id) -> page keys at which it can be gone on from
        (`Manifest.boundary_keys`), of all snapshots that one namespace can restore."""
        stateful = self._db.row(
            "SELECT 1 FROM segments WHERE namespace = ? AND has_state LIMIT 1", (namespace,)
        )
        if stateful:
            rows = self._db.rows(
                "SELECT tenant, snapshot_id, boundary_key FROM snapshots WHERE namespace = ?",
                (namespace,),
            )
        else:
            rows = self._db.rows(
                "SELECT tenant, snapshot_id, segments.key FROM snapshots"
                " JOIN snapshot_segments AS link ON link.snapshot = snapshots.id AND link.rank = 0"
                " JOIN segments ON segments.id = link.segment"
                " WHERE snapshots.namespace = ? ORDER BY snapshots.id, link.position",
                (namespace,),
            )
        found: dict[tuple[str, str], list[str]] = {}
        for tenant, snapshot_id, key in rows:
            found.setdefault((tenant, snapshot_id), []).append(key)
        return found

    def newest_at(self, namespace: str, key: str) -> tuple[str, str] | None:
        """(Tenant, snapshot id) of the newest snapshot of a namespace whose boundary is this page
        key; None without one."""
        row = self._db.row(
            "SELECT tenant, snapshot_id FROM snapshots WHERE namespace = ? AND boundary_key = ?"
            " ORDER BY created_at DESC LIMIT 1",
            (namespace, key),
        )
        return None if row is None else (row[0], row[1])

    def boundary_keys_of(self, snapshot_id: str, tenant: str = "") -> list[str]:
        """`boundary_keys` of one snapshot; none if there is no such snapshot."""
        rows = self._db.rows(
            "SELECT segments.key, segments.has_state FROM snapshots"
            " JOIN snapshot_segments AS link ON link.snapshot = snapshots.id AND link.rank = 0"
            " JOIN segments ON segments.id = link.segment"
            " WHERE tenant = ? AND snapshot_id = ? ORDER BY link.position",
            (tenant, snapshot_id),
        )
        return [key for key, has_state in rows if has_state] or [key for key, _ in rows]

    def conversations(
        self, tenant: str, *, limit: int = 100, after: str | None = None
    ) -> list[ConversationRow]:
        """A tenant's conversations by id, those past the id ``after``.

        Raises `InvalidRequestError` for a limit outside 1 to `MAX_PAGE`.
        """
        return self.conversations_from(tenant, "", limit=limit, after=after)

    def conversation(self, tenant: str, conversation_id: str) -> ConversationRow | None:
        """One conversation; None if nothing of it is saved."""
        found = self._conversations("conversation_id = ?2", (tenant, conversation_id))
        return found[0] if found else None

    def conversations_from(
        self, tenant: str, id_prefix: str, *, limit: int = 100, after: str | None = None
    ) -> list[ConversationRow]:
        """`conversations`, of those whose id begins with ``id_prefix``."""
        _check_limit(limit)
        # Ids are ASCII, and "~" is above all that may be in one.
        return self._conversations(
            "conversation_id > ?2 AND conversation_id < ?3",
            (tenant, max(after or "", id_prefix), id_prefix + "~"),
            limit,
        )

    def _conversations(
        self, condition: str, values: tuple[str, ...], limit: int = 1
    ) -> list[ConversationRow]:
        rows = self._db.rows(
            "SELECT conversation_id, count(*) AS snapshots,"
            " count(DISTINCT branch_name) AS branches, max(turn_number) AS newest_turn,"
            " min(created_at) AS created_at, max(created_at) AS updated_at,"
            " (SELECT sum(bytes) FROM (SELECT DISTINCT namespace, rank, segment_id, bytes"
            "  FROM segments WHERE id IN"
            "  (SELECT segment FROM snapshot_segments JOIN snapshots AS s ON snapshot = s.id"
            "   WHERE s.tenant = ?1 AND s.conversation_id = snapshots.conversation_id))) AS bytes"
            f" FROM snapshots WHERE tenant = ?1 AND {condition}"
            f" GROUP BY conversation_id ORDER BY conversation_id LIMIT {int(limit)}",
            values,
        )
        return [ConversationRow(**dict(row)) for row in rows]

    def branches(self, tenant: str, conversation_id: str) -> list[BranchRow]:
        """The branches of a conversation by name. Raises `NotFoundError` if it is unknown."""
        rows = self._db.rows(
            "SELECT branch_name, count(*) AS snapshots, max(turn_number) AS newest_turn,"
            " min(created_at) AS created_at, max(created_at) AS updated_at"
            " FROM snapshots WHERE tenant = ? AND conversation_id = ?"
            " GROUP BY branch_name ORDER BY branch_name",
            (tenant, conversation_id),
        )
        if not rows:
            raise _not_found(f"no conversation {conversation_id!r}", conversation_id)
        return [BranchRow(**dict(row)) for row in rows]

    def totals(self) -> tuple[int, int]:
        """How many snapshots there are, and of how many conversations, of all tenants."""
        row = self._db.row(
            "SELECT (SELECT count(*) FROM snapshots),"
            " (SELECT count(*) FROM (SELECT DISTINCT tenant, conversation_id FROM snapshots))"
        )
        assert row is not None
        return row[0], row[1]

    def manifest_entries(self) -> dict[str, tuple[ManifestEntry, str, str]]:
        """What is indexed: manifest name -> (entry, snapshot id, tenant)."""
        rows = self._db.rows(
            "SELECT manifest_name, manifest_stamp, snapshot_id, tenant FROM snapshots"
        )
        return {row[0]: (ManifestEntry(row[0], row[1]), row[2], row[3]) for row in rows}

    def _insert_segments(self, manifest: Manifest) -> None:
        refs = [
            (rank, position, ref)
            for rank, chain in enumerate(manifest.segments)
            for position, ref in enumerate(chain)
        ]
        self._db.insert(
            "segments",
            [_segment_columns(manifest, rank, ref) for rank, _, ref in refs],
            or_keep=True,
        )
        self._db.run_many(
            "INSERT INTO snapshot_segments (snapshot, rank, position, segment)"
            " SELECT s.id, ?, ?, g.id FROM snapshots AS s, segments AS g"
            " WHERE s.tenant = ? AND s.snapshot_id = ?"
            ' AND g.namespace = ? AND g.rank = ? AND g.segment_id = ? AND g."end" = ?',
            [
                (
                    rank,
                    position,
                    manifest.tenant,
                    manifest.snapshot_id,
                    manifest.namespace,
                    rank,
                    ref.segment_id,
                    ref.end,
                )
                for rank, position, ref in refs
            ],
        )

    def _snapshot(self, row: sqlite3.Row) -> SnapshotRow:
        """What a row says. One that nobody has checked yet is checked now."""
        if not self._db.checked and not row_is_intact(row):
            raise self._db.damaged(f"row {row['id']} of snapshots does not match its checksum")
        return _snapshot(row)

    def _unknown(
        self, tenant: str, conversation_id: str, branch_name: str, turn_number: int | None
    ) -> NotFoundError:
        known = self._db.rows(
            "SELECT DISTINCT branch_name FROM snapshots WHERE tenant = ? AND conversation_id = ?"
            " ORDER BY branch_name",
            (tenant, conversation_id),
        )
        branches = [row[0] for row in known]
        if not branches:
            return _not_found(f"no conversation {conversation_id!r}", conversation_id)
        if branch_name not in branches:
            return _not_found(
                f"conversation {conversation_id!r} has no branch {branch_name!r}", conversation_id
            )
        return _not_found(
            f"branch {branch_name!r} of conversation {conversation_id!r} has no turn {turn_number}",
            conversation_id,
        )


def _columns_of(manifest: Manifest, entry: ManifestEntry) -> dict[str, Any]:
    return {
        "tenant": manifest.tenant,
        "snapshot_id": manifest.snapshot_id,
        "conversation_id": manifest.conversation_id,
        "branch_name": manifest.branch_name,
        "turn_number": manifest.turn_number,
        "parent_snapshot": manifest.parent_snapshot,
        "created_at": manifest.created_at,
        "namespace": manifest.namespace,
        "model_name": manifest.model_name,
        "num_layers": manifest.layer_config.num_layers,
        "model_type": manifest.layer_config.model_type,
        "token_count": manifest.token_count,
        "pending_count": len(manifest.pending_tokens),
        "durability": manifest.durability,
        "world_size": manifest.world_size,
        "boundary_key": manifest.boundary_key,
        "bytes": manifest.bytes,
        "unique_bytes": manifest.unique_bytes,
        "health": manifest.health,
        "user_metadata": canonical_json(manifest.user_metadata).decode(),
        "pinned": manifest.pinned,
        "expires_at": manifest.expires_at,
        "rid": manifest.rid,
        "manifest_name": entry.name,
        "manifest_stamp": entry.stamp,
    }


def _segment_columns(manifest: Manifest, rank: int, ref: SegmentRef) -> dict[str, Any]:
    return {
        "namespace": manifest.namespace,
        "rank": rank,
        "world_size": manifest.world_size,
        "segment_id": ref.segment_id,
        "key": ref.key,
        "start": ref.start,
        "end": ref.end,
        "has_state": ref.has_state,
        "bytes": ref.bytes,
    }


def _snapshot(row: sqlite3.Row) -> SnapshotRow:
    values = dict(row)
    for name in ("id", "manifest_name", "manifest_stamp", "checksum"):
        del values[name]
    values["pinned"] = bool(values["pinned"])
    values["user_metadata"] = json.loads(values["user_metadata"])
    return SnapshotRow(**values)


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(f"limit must be from 1 to {MAX_PAGE}, not {limit}")


def _cursor(row: SnapshotRow) -> str:
    return f"{row.created_at!r}{_CURSOR_SEPARATOR}{row.snapshot_id}"


def _parse_cursor(cursor: str) -> tuple[float, str]:
    text, _, snapshot_id = cursor.partition(_CURSOR_SEPARATOR)
    try:
        created_at = float(text)
    except ValueError:
        created_at = math.nan
    if not math.isfinite(created_at):
        raise InvalidRequestError(
            "after is not a cursor", hint="pass the 'after' of the page before", details={}
        )
    return created_at, check_id("after", snapshot_id)


def _not_found(message: str, conversation_id: str) -> NotFoundError:
    return NotFoundError(message, details={"conversation_id": conversation_id})
