"""The one durable writer: order of operations, and a fault at every one of them."""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engram.errors import StoreError, StoreFullError
from engram.store.durable import (
    DirectoryMaker,
    remove_abandoned_temps,
    unlink_durable,
    write_durable,
)
from engram.store.filesystem import FileSystem
from engram.testing.faults import FaultyFileSystem, SimulatedCrash

OLD, NEW = b"old contents", b"the new contents"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def write(path: Path, fs: FileSystem, data: bytes = NEW) -> None:
    write_durable(path, [data[:5], memoryview(data)[5:]], needed=len(data), fs=fs)


def test_the_order_of_operations(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    write(tmp_path / "file", fs)
    assert (tmp_path / "file").read_bytes() == NEW
    assert names(tmp_path) == ["file"]
    assert [name for name, _ in fs.calls] == [
        "create_temp",
        "write",
        "write",
        "fsync",
        "rename",
        "close",
        "fsync_dir",
    ]
    assert fs.calls[-1] == ("fsync_dir", tmp_path.name)


def test_both_syncs_reach_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []

    def fsync(fd: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file", FileSystem())
    assert synced == [False, True]


def test_the_temporary_file_is_beside_the_target_and_private(tmp_path: Path) -> None:
    seen: list[tuple[Path, int]] = []

    class Watching(FileSystem):
        def create_temp(self, path: Path) -> int:
            fd = super().create_temp(path)
            seen.append((path, path.stat().st_mode & 0o777))
            return fd

    write(tmp_path / "file", Watching())
    ((temp, mode),) = seen
    assert temp.parent == tmp_path
    assert mode == 0o600
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("old", [None, OLD], ids=["new file", "replacement"])
@pytest.mark.parametrize("fail_op", ["create_temp", "write", "fsync", "rename"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_fault_before_the_rename_leaves_everything_as_it_was(
    tmp_path: Path, fail_op: str, error: int, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    before = names(tmp_path)
    fs = FaultyFileSystem().fail(fail_op, error=error)
    with pytest.raises(StoreError, match=str(path.parent)) as caught:
        write(path, fs)
    assert fs.fired
    assert names(tmp_path) == before
    assert (path.read_bytes() if old is not None else None) == old
    is_full = error in (errno.ENOSPC, errno.EDQUOT)
    assert isinstance(caught.value, StoreFullError) == is_full
    if is_full:
        assert caught.value.details["needed"] == len(NEW)
        assert isinstance(caught.value.details["free"], int)
    else:
        assert caught.value.details["errno"] == error


def test_a_fault_in_a_later_write_leaves_nothing(tmp_path: Path) -> None:
    fs = FaultyFileSystem(short=4).fail("write", after=3, error=errno.ENOSPC)
    with pytest.raises(StoreFullError):
        write(tmp_path / "file", fs)
    assert names(tmp_path) == []


def test_a_fault_after_the_rename_is_reported_and_leaves_a_whole_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="fsync directory"):
        write(tmp_path / "file", FaultyFileSystem().fail("fsync_dir"))
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == NEW


@pytest.mark.parametrize("short", [1, 3, 1000])
def test_short_writes_are_continued(tmp_path: Path, short: int) -> None:
    write(tmp_path / "file", FaultyFileSystem(short=short))
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_device_that_accepts_nothing_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="accepted no bytes"):
        write(tmp_path / "file", FaultyFileSystem(short=0))
    assert names(tmp_path) == []


def test_parts_that_raise_leave_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"first"
        raise KeyError("second")

    with pytest.raises(KeyError):
        write_durable(tmp_path / "file", parts(), needed=10, fs=FileSystem())
    assert names(tmp_path) == []


def test_a_temporary_file_that_cannot_be_removed_is_removed_at_the_next_start(
    tmp_path: Path,
) -> None:
    class Stubborn(FaultyFileSystem):
        def unlink(self, path: Path) -> None:
            raise OSError(errno.EIO, "no")

    with pytest.raises(StoreError):
        write(tmp_path / "file", Stubborn().fail("fsync"))
    assert len(names(tmp_path)) == 1
    assert remove_abandoned_temps(tmp_path, FileSystem()) == 1
    assert names(tmp_path) == []


def test_a_file_being_written_is_not_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"first "
        started.set()
        assert go_on.wait(30)
        yield b"second"

    writer = threading.Thread(
        target=write_durable,
        args=(tmp_path / "file", parts()),
        kwargs={"needed": 12, "fs": FileSystem()},
    )
    writer.start()
    assert started.wait(30)
    try:
        assert remove_abandoned_temps(tmp_path, FileSystem()) == 0
    finally:
        go_on.set()
        writer.join(30)
    assert (tmp_path / "file").read_bytes() == b"first second"


def test_a_temporary_file_a_cleaner_took_is_made_again(tmp_path: Path) -> None:
    class Racing(FileSystem):
        """A cleaner removes the first file between its creation and its lock."""

        attempts = 0

        def create_temp(self, path: Path) -> int:
            self.attempts += 1
            if self.attempts == 1:
                raise FileExistsError(path)
            return super().create_temp(path)

    fs = Racing()
    write(tmp_path / "file", fs)
    assert fs.attempts == 2
    assert (tmp_path / "file").read_bytes() == NEW


def test_other_files_are_no_abandoned_ones(tmp_path: Path) -> None:
    for name in ("data.seg", ".hidden", "note.tmp", "catalog.sqlite"):
        (tmp_path / name).write_bytes(b"x")
    assert remove_abandoned_temps(tmp_path, FileSystem()) == 0
    assert len(names(tmp_path)) == 4


CRASH_POINTS = [
    (op, after)
    for op, count in [
        ("create_temp", 1),
        ("write", 2),
        ("fsync", 1),
        ("rename", 1),
        ("fsync_dir", 1),
    ]
    for after in range(count)
]


@pytest.mark.parametrize(("fail_op", "after"), CRASH_POINTS)
@pytest.mark.parametrize("old", [None, OLD], ids=["new file", "replacement"])
def test_a_crash_anywhere_shows_the_old_or_the_new_file_never_a_part(
    tmp_path: Path, fail_op: str, after: int, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(SimulatedCrash):
        write(path, FaultyFileSystem().fail(fail_op, after=after, crash=True))
    remove_abandoned_temps(tmp_path, FileSystem())
    found = path.read_bytes() if path.exists() else None
    assert found == (NEW if fail_op == "fsync_dir" else old)
    assert names(tmp_path) == ([] if found is None else ["file"])


def test_removal_is_durable_and_repeatable(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    fs = FaultyFileSystem()
    unlink_durable(path, fs)
    unlink_durable(path, fs)
    unlink_durable(tmp_path / "no" / "such", fs)
    assert [name for name, _ in fs.calls] == [
        "unlink", "fsync_dir", "unlink", "fsync_dir", "unlink",
    ]  # fmt: skip


@pytest.mark.parametrize("fail_op", ["unlink", "fsync_dir"])
def test_a_removal_that_fails_is_reported(tmp_path: Path, fail_op: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(StoreError):
        unlink_durable(path, FaultyFileSystem().fail(fail_op))
    assert path.exists() == (fail_op == "unlink")


def test_a_directory_is_durable_before_it_is_used(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    maker = DirectoryMaker(tmp_path, fs)
    maker.ensure(tmp_path / "a" / "b")
    assert fs.calls == [
        ("mkdir", "a"),
        ("fsync_dir", tmp_path.name),
        ("mkdir", "b"),
        ("fsync_dir", "a"),
    ]
    maker.ensure(tmp_path / "a" / "b")
    assert len(fs.calls) == 4
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fail_op", ["mkdir", "fsync_dir"])
def test_a_directory_whose_making_failed_is_made_durable_the_next_time(
    tmp_path: Path, fail_op: str
) -> None:
    fs = FaultyFileSystem().fail(fail_op)
    maker = DirectoryMaker(tmp_path, fs)
    with pytest.raises(StoreError):
        maker.ensure(tmp_path / "a")
    fs.calls.clear()
    maker.ensure(tmp_path / "a")
    assert fs.calls == [("mkdir", "a"), ("fsync_dir", tmp_path.name)]


def test_a_file_where_a_directory_belongs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StoreError, match="make directory"):
        DirectoryMaker(tmp_path, FileSystem()).ensure(tmp_path / "a")
