"""Does one catalog say the same as another?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from blake3 import blake3

from engram.catalog.catalog import Catalog
from engram.catalog.database import Database

_AT_ONCE: Final = 500
_LINKS: Final = (
    "SELECT link.*, segments.* FROM snapshot_segments AS link"
    " JOIN segments ON segments.id = link.segment"
    " WHERE link.snapshot BETWEEN ? AND ? ORDER BY link.snapshot, link.rank, link.position"
)
# Numbers that a database gives its rows; they say nothing.
_OWN: Final = {"id", "checksum", "snapshot", "segment"}


@dataclass(frozen=True)
class CatalogDifference:
    """One snapshot about which two catalogs do not agree, and how."""

    tenant: str
    snapshot_id: str
    what: str


def differences(
    found: Catalog, wanted: Catalog, waiting: frozenset[str] = frozenset()
) -> list[CatalogDifference]:
    """Where ``found`` is not what ``wanted`` says, by snapshot.

    Rows whose manifest's name is in ``waiting`` are right to be there without it. Memory is a few
    hundred bytes a snapshot.
    """
    has, should = _contents(found), _contents(wanted)
    told = []
    for key in sorted(has.keys() | should.keys()):
        if key not in should:
            if has[key][0] in waiting:
                continue
            what = "is listed, and has no manifest"
        elif key not in has:
            what = "is not listed"
        elif has[key] != should[key]:
            what = "is listed with other values than its manifest has"
        else:
            continue
        told.append(CatalogDifference(*key, what))
    return told


def _contents(catalog: Catalog) -> dict[tuple[str, str], tuple[str, bytes]]:
    """(tenant, snapshot id) -> manifest name, and a digest of the row and its chains."""
    database: Database = catalog._db
    contents: dict[tuple[str, str], tuple[str, bytes]] = {}
    last = 0
    while True:
        rows = database.rows(
            "SELECT * FROM snapshots WHERE id > ? ORDER BY id LIMIT ?", (last, _AT_ONCE)
        )
        if not rows:
            return contents
        first, last = rows[0]["id"], rows[-1]["id"]
        digests = {row["id"]: blake3(_text(row)) for row in rows}
        for link in database.rows(_LINKS, (first, last)):
            digests[link["snapshot"]].update(_text(link))
        for row in rows:
            key = row["tenant"], row["snapshot_id"]
            contents[key] = row["manifest_name"], digests[row["id"]].digest()


def _text(row: Any) -> bytes:
    # Names come twice where tables are joined; the pairs are what counts.
    pairs = zip(row.keys(), tuple(row), strict=True)
    return repr([(name, value) for name, value in pairs if name not in _OWN]).encode()
