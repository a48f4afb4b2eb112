"""Which stored boundary a new request can start from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SnapshotName = tuple[str, str]
"""Tenant and snapshot id."""


@dataclass(frozen=True, slots=True)
class StoredBoundary:
    """A durable boundary: its page key and the token count it stands at."""

    key: str
    end: int


class BoundaryIndex:
    """Page keys of the boundaries on disk, for one namespace.

    Counts references, since snapshots share segments.  Walking back from a request's end, the
    first key held is the longest stored prefix.  It is filled from the catalog while snapshots come
    and go, so each is counted once, and none that went meanwhile is.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.complete = False
        self._references: dict[str, int] = {}
        self._snapshots: set[SnapshotName] = set()
        self._removed: set[SnapshotName] = set()
        self._damaged: set[str] = set()

    def __len__(self) -> int:
        return len(self._references) - len(self._damaged)

    def add(self, name: SnapshotName, keys: Iterable[str]) -> None:
        """A snapshot that is durable names segments that end at these keys."""
        self._removed.discard(name)
        self.fill(name, keys)

    def fill(self, name: SnapshotName, keys: Iterable[str]) -> None:
        """The catalog had this snapshot; no effect if it is counted or has gone."""
        if name in self._snapshots or name in self._removed:
            return
        self._snapshots.add(name)
        for key in keys:
            self._damaged.discard(key)
            self._references[key] = self._references.get(key, 0) + 1

    def filled(self) -> None:
        """The catalog has been read to its end."""
        self.complete = True
        self._removed.clear()

    def remove(self, name: SnapshotName, keys: Iterable[str]) -> None:
        """That snapshot is gone."""
        if name not in self._snapshots:
            self._removed.add(name)
            return
        self._snapshots.remove(name)
        for key in keys:
            left = self._references.get(key, 0) - 1
            if left > 0:
                self._references[key] = left
            else:
                self._references.pop(key, None)
                self._damaged.discard(key)

    def forget(self, key: str) -> None:
        """The bytes behind this boundary are damaged: no request waits for them until a snapshot
        that is yet to come names it. Those that name it now still count."""
        if key in self._references:
            self._damaged.add(key)

    def serves(self, key: str) -> bool:
        """Whether a request can start from this boundary, as far as is known."""
        return key in self._references and key not in self._damaged

    def longest(self, keys: Sequence[str], page_size: int) -> StoredBoundary | None:
        """The last of a request's page keys at which a boundary is stored."""
        if not self._references:
            return None
        for index in range(len(keys) - 1, -1, -1):
            if self.serves(keys[index]):
                return StoredBoundary(keys[index], (index + 1) * page_size)
        return None
