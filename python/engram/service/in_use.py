"""Snapshots that work under way stands on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from engram.service.boundaries import SnapshotName


class SnapshotsInUse:
    """What a save or a restore needs until it is done: no policy removes it meanwhile.

    Else a save would have to write again what it counted on as stored, over the quota or into a
    full disk, and a restore that was begun would be of a snapshot that is no more. Who asks by name
    that a snapshot be removed is obeyed.
    Changed on one event loop; asked from any thread.
    """

    def __init__(self) -> None:
        self._held: Counter[SnapshotName] = Counter()

    def __contains__(self, name: object) -> bool:
        return name in self._held

    @contextmanager
    def held(self, names: Iterable[SnapshotName]) -> Iterator[None]:
        """Keep these within."""
        held = set(names)
        self._held.update(held)
        try:
            yield
        finally:
            for name in held:
                self._held[name] -= 1
                if not self._held[name]:
                    del self._held[name]
