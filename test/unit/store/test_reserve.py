"""A full disk can be emptied by deleting snapshots, and a server starts on one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from engram.store import reserve
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.reserve import RESERVE_BYTES, Reserve
from engram.testing.faults import FaultyFileSystem


@pytest.fixture
def kept(tmp_path: Path) -> Reserve:
    made = Reserve(tmp_path / "reserve", FileSystem())
    made.keep()
    return made


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def test_a_store_keeps_the_room(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "store") as store:
        assert blocks(Layout(store.root).reserve) >= RESERVE_BYTES
    with DiskStore.open(tmp_path / "other", lock=False) as store:
        assert not Layout(store.root).reserve.exists(), "ranks keep none of their own"


@pytest.mark.parametrize(("free", "given"), [(0, True), (RESERVE_BYTES * 2, False), (None, False)])
def test_the_room_is_given_back_only_when_it_is_needed(
    tmp_path: Path, kept: Reserve, monkeypatch: pytest.MonkeyPatch, free: int | None, given: bool
) -> None:
    monkeypatch.setattr(reserve, "free_bytes", lambda path: free)
    with kept.at_hand():
        assert (blocks(tmp_path / "reserve") == 0) is given
    assert blocks(tmp_path / "reserve") >= RESERVE_BYTES, "taken again"


@pytest.mark.parametrize("length", [0, RESERVE_BYTES], ids=["a crash", "a sparse copy"])
def test_a_file_without_its_blocks_keeps_no_room(tmp_path: Path, length: int) -> None:
    path = tmp_path / "reserve"
    path.touch()
    os.truncate(path, length)
    assert blocks(path) < RESERVE_BYTES
    Reserve(path, FileSystem()).keep()
    assert blocks(path) >= RESERVE_BYTES


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_disk_without_the_room_is_no_error(tmp_path: Path, error: int) -> None:
    fs = FaultyFileSystem().fail("allocate", error=error)
    made = Reserve(tmp_path / "reserve", fs)
    made.keep()
    assert fs.fired
    assert not (tmp_path / "reserve").exists()
    with made.at_hand():
        pass
    assert blocks(tmp_path / "reserve") >= RESERVE_BYTES, "it has room by now"


def test_an_error_within_is_passed_on(tmp_path: Path, kept: Reserve) -> None:
    with pytest.raises(KeyError), kept.at_hand():
        raise KeyError
    assert (tmp_path / "reserve").exists()
