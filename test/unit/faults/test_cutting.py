"""Power cuts that forget what was not fsynced. `scripts/test --faults`: thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.errors import EngramError
from engram.store.filesystem import FileSystem
from engram.testing.power import ForgetfulFileSystem
from engram.testing.samples import seeded_random
from faults.cutting import cut_again_and_again

CUTS = 25
ENOUGH = 200


def test_cuts_lose_nothing_acknowledged_and_show_nothing_torn(in_memory: Path) -> None:
    cuts = cut_again_and_again(in_memory, seeded_random(), CUTS)
    print(cuts)  # noqa: T201
    assert cuts.cuts == CUTS
    assert cuts.events["saved"] > 0
    assert cuts.events["deleted"] > 0
    assert cuts.restored > cuts.rebuilt > 0


class _FilesNotSynced(ForgetfulFileSystem):
    def fsync(self, fd: int) -> None:
        FileSystem.fsync(self, fd)


class _NamesNotSynced(ForgetfulFileSystem):
    def fsync_dir(self, path: Path) -> None:
        FileSystem.fsync_dir(self, path)


class _NewDirectoriesNotSynced(ForgetfulFileSystem):
    """The sync that follows a mkdir is left out."""

    def fsync_dir(self, path: Path) -> None:
        if any(isinstance(node, type(self._root)) for node in self._pending(path)):
            FileSystem.fsync_dir(self, path)
        else:
            super().fsync_dir(path)

    def _pending(self, path: Path) -> list[object]:
        if not path.is_relative_to(self._base):
            return []
        return [states[-1][1] for states in self._directory(path).pending.values()]


@pytest.mark.parametrize("disk", [_FilesNotSynced, _NamesNotSynced, _NewDirectoriesNotSynced])
def test_a_sync_left_out_is_noticed(in_memory: Path, disk: type[ForgetfulFileSystem]) -> None:
    """The test above is worth something."""
    with pytest.raises((AssertionError, EngramError)):
        cut_again_and_again(in_memory, seeded_random(), ENOUGH, disk_of=disk)
