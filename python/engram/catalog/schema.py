"""The catalog's tables, as migrations. A migration and its record commit together."""

from __future__ import annotations

import sqlite3
from typing import Final

MIGRATIONS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "snapshots and their segments",
        (
            """
            CREATE TABLE snapshots (
                id INTEGER PRIMARY KEY,
                tenant TEXT NOT NULL,
                snapshot_id TEXT NOT NULL,
                conversation_id TEXT NOT NULL,
                branch_name TEXT NOT NULL,
                turn_number INTEGER NOT NULL,
                parent_snapshot TEXT,
                created_at REAL NOT NULL,
                namespace TEXT NOT NULL,
                model_name TEXT NOT NULL,
                num_layers INTEGER NOT NULL,
                model_type TEXT NOT NULL,
                token_count INTEGER NOT NULL,
                pending_count INTEGER NOT NULL,
                durability TEXT NOT NULL,
                world_size INTEGER NOT NULL,
                boundary_key TEXT NOT NULL,
                bytes INTEGER NOT NULL,
                unique_bytes INTEGER NOT NULL,
                health TEXT,
                user_metadata TEXT NOT NULL,
                pinned INTEGER NOT NULL,
                expires_at REAL,
                rid TEXT,
                manifest_name TEXT NOT NULL UNIQUE,
                manifest_stamp TEXT NOT NULL,
                checksum INTEGER NOT NULL,
                UNIQUE (tenant, snapshot_id),
                UNIQUE (tenant, conversation_id, branch_name, turn_number)
            )
            """,
            "CREATE INDEX snapshots_by_age ON snapshots (tenant, created_at, snapshot_id)",
            "CREATE INDEX snapshots_by_boundary ON snapshots (namespace, boundary_key, created_at)",
            "CREATE INDEX snapshots_by_rid ON snapshots (tenant, rid, created_at)",
            """
            CREATE TABLE segments (
                id INTEGER PRIMARY KEY,
                namespace TEXT NOT NULL,
                rank INTEGER NOT NULL,
                world_size INTEGER NOT NULL,
                segment_id TEXT NOT NULL,
                key TEXT NOT NULL,
                start INTEGER NOT NULL,
                "end" INTEGER NOT NULL,
                has_state INTEGER NOT NULL,
                bytes INTEGER NOT NULL,
                checksum INTEGER NOT NULL,
                UNIQUE (namespace, rank, segment_id, "end")
            )
            """,
            "CREATE INDEX segments_by_key ON segments (namespace, rank, key)",
            """
            CREATE TABLE snapshot_segments (
                snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
                rank INTEGER NOT NULL,
                position INTEGER NOT NULL,
                segment INTEGER NOT NULL REFERENCES segments (id),
                PRIMARY KEY (snapshot, rank, position)
            ) WITHOUT ROWID
            """,
            "CREATE INDEX snapshot_segments_by_segment ON snapshot_segments (segment)",
        ),
    ),
)

_RECORD = "CREATE TABLE migrations (version INTEGER PRIMARY KEY, name TEXT NOT NULL)"


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database (in autocommit mode) to the newest schema; each step in a transaction."""
    for version, (name, statements) in enumerate(MIGRATIONS, start=1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            if version > _version(connection):
                if version == 1:
                    connection.execute(_RECORD)
                for statement in statements:
                    connection.execute(statement)
                connection.execute("INSERT INTO migrations VALUES (?, ?)", (version, name))
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def schema_problem(connection: sqlite3.Connection) -> str | None:
    """Why the database's schema is not the newest one; None if it is."""
    expected = sqlite3.connect(":memory:", isolation_level=None)
    try:
        migrate(expected)
        if _version(connection) != len(MIGRATIONS):
            return f"its schema has version {_version(connection)}, not {len(MIGRATIONS)}"
        if _objects(connection) != _objects(expected):
            return "its tables are not the ones of its schema version"
    finally:
        expected.close()
    return None


def _version(connection: sqlite3.Connection) -> int:
    """The newest migration recorded; 0 in an empty database."""
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone()
    if known is None:
        return 0
    return int(connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0])


def _objects(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    query = "SELECT type, name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name"
    return [(str(kind), str(name), str(sql)) for kind, name, sql in connection.execute(query)]
