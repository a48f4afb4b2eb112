"""kill -9 during a save: a real process, killed at a real operation, and what a restart finds."""

import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from engram.catalog.catalog import Catalog
from engram.snapshot.manifest import encode_manifest
from engram.store.disk import DiskStore
from engram.testing.contracts import put, read
from engram.testing.samples import sample_chain, sample_manifest

# Saves one snapshot as a server does, in the order of the law, and kills itself at the N-th call
# of an operation, or at the stage of that name.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from engram.catalog.catalog import Catalog
from engram.snapshot.manifest import decode_manifest
from engram.snapshot.segment import PREAMBLE, SegmentHeader, payload_offset
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem

root, saved, fatal, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
saving = False

def reach(stage):
    global left
    if saving and stage == fatal:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def deadly(name):
    real = getattr(FileSystem, name)
    def operation(self, *arguments):
        reach(name)
        return real(self, *arguments)
    return operation

for name in ("mkdir", "create_temp", "write", "fsync", "close", "rename", "fsync_dir"):
    setattr(FileSystem, name, deadly(name))

store = DiskStore.open(root)
catalog = Catalog.open(store.catalog_path, store)
saving = True
for path in sorted(saved.glob("*.seg")):
    data = path.read_bytes()
    start = payload_offset(data[: PREAMBLE.size])
    header = SegmentHeader.decode(data[:start])
    store.put_segment(header, memoryview(data)[start:-32], data[-32:].hex())
manifest = decode_manifest((saved / "manifest").read_bytes())
entry = store.put_manifest(manifest)
reach("before the catalog")
with catalog.atomic():
    catalog.insert(manifest, entry)
    reach("before the commit")
print("acknowledged", flush=True)
reach("acknowledged")
"""

# Three segments of three writes each, then the manifest: eight directories, twelve syncs of them.
STAGES = [
    ("mkdir", 1),
    ("fsync_dir", 4),
    ("write", 2),
    ("rename", 1),
    ("fsync_dir", 5),
    ("rename", 3),
    ("write", 10),
    ("fsync", 4),
    ("rename", 4),
    ("close", 4),
    ("fsync_dir", 12),
    ("before the catalog", 1),
    ("before the commit", 1),
    ("acknowledged", 1),
]


@pytest.mark.parametrize(("fatal", "call"), STAGES)
def test_a_kill_loses_nothing_acknowledged_and_shows_nothing_torn(
    tmp_path: Path, fatal: str, call: int
) -> None:
    # Fixed, because how many directories a save makes depends on the digests.
    rng = Random(20)
    root, saved = tmp_path / "store", tmp_path / "saved"
    earlier, new = sample_chain(rng, (4,)), sample_chain(rng, (4, 2))
    first = sample_manifest([earlier], snapshot_id="earlier", conversation_id="earlier")
    second = sample_manifest([new], snapshot_id="new", conversation_id="new")
    with DiskStore.open(root) as store:
        for segment in earlier:
            put(store, segment)
        entry = store.put_manifest(first)
        Catalog.open(store.catalog_path, store).close()
    saved.mkdir()
    for index, segment in enumerate(new):
        (saved / f"{index}.seg").write_bytes(segment.file)
    (saved / "manifest").write_bytes(encode_manifest(second))

    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), str(saved), fatal, str(call)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (result.stdout == "acknowledged\n") == (fatal == "acknowledged")
    # From here on the manifest is in place: a restart completes the save instead of undoing it.
    is_saved = (fatal, call) in [("close", 4), ("fsync_dir", 12), *STAGES[-3:]]
    with DiskStore.open(root) as store:
        catalog = Catalog.open(store.catalog_path, store)
        assert catalog.report.rebuilt_because is None
        assert catalog.report.damaged == []
        expected = {"earlier", "new"} if is_saved else {"earlier"}
        assert {row.snapshot_id for row in catalog.all_snapshots()} == expected
        catalog.close()
        assert entry in store.list_manifests()
        assert store.get_manifest("earlier") == first
        for segment in [*earlier, *(new if is_saved else [])]:
            assert read(store, segment)[1] == segment.payload
        if is_saved:
            assert store.get_manifest("new") == second
        # Whatever else there is, is whole.
        for found in store.iter_segments():
            store.verify_segment(found.shard, found.segment_id)
        assert list(root.rglob("*.tmp")) == []
        assert store.stats().quarantined == 0
