"""Save and load segments, in the clear and encrypted in turns, and say the ratio of processor time,
which other work on the machine disturbs less than the clock.

python -m benchmark.encryption

Loads come from the page cache: what is compared is the work, beside a disk it is less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from engram.snapshot.digest import seal
from engram.snapshot.segment import TOKENS, SegmentHeader
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.store.keys import new_key
from engram.testing.samples import SHARD

TOKEN_BYTES = 4
ROW_BYTES = 4096


class Unsynced(FileSystem):
    """Without waiting for the disk, whose times say nothing about encryption."""

    def fsync(self, fd: int) -> None:
        pass


def segment(megabytes: int, rng: random.Random) -> tuple[SegmentHeader, memoryview, str]:
    rows = megabytes * 1_000_000 // ROW_BYTES
    header = SegmentHeader.plan(
        shard=SHARD,
        key=rng.randbytes(32).hex(),
        start=0,
        end=rows,
        parent=None,
        has_state=False,
        buffers=[("kv.0", "U8", (rows, ROW_BYTES))],
    )
    payload = memoryview(bytearray(header.payload_length))
    header.clear_padding(payload)
    header.view(payload, TOKENS)[:] = rng.randbytes(TOKEN_BYTES * rows)
    header.view(payload, "kv.0")[:] = rng.randbytes(ROW_BYTES * rows)
    return header, payload, seal(header, payload).hex()


def now() -> tuple[float, float]:
    """Seconds by the clock, and of processor time in all threads."""
    return time.perf_counter(), time.process_time()


def measure(root: Path, megabytes: int, rounds: int, seed: int, fs: FileSystem) -> dict[str, float]:
    rng = random.Random(seed)
    stores = {
        "clear": DiskStore.open(root / "clear", fs=fs),
        "encrypted": DiskStore.open(root / "encrypted", fs=fs, key=new_key()),
    }
    taken: dict[str, list[tuple[float, float]]] = {
        f"{name} {work}": [] for name in stores for work in ("save", "load")
    }
    for number in range(rounds + 1):
        header, payload, name = segment(megabytes, rng)
        out = memoryview(bytearray(len(payload)))
        for which in sorted(stores, reverse=bool(number % 2)):
            store = stores[which]
            began = now()
            store.put_segment(header, payload, name)
            saved = now()
            store.read_segment(SHARD, name, lambda _, out=out: out)  # type: ignore[misc]
            loaded = now()
            assert out == payload
            store.delete_segment(SHARD, name)
            if number:  # the first is for warming up
                taken[f"{which} save"].append((saved[0] - began[0], saved[1] - began[1]))
                taken[f"{which} load"].append((loaded[0] - saved[0], loaded[1] - saved[1]))
    for store in stores.values():
        store.close()
    figures = {
        f"{name} MB/s": megabytes / statistics.median(wall for wall, _ in times)
        for name, times in taken.items()
    }
    for work in ("save", "load"):
        pairs = zip(taken[f"encrypted {work}"], taken[f"clear {work}"], strict=True)
        ratios = sorted(encrypted / clear for (_, encrypted), (_, clear) in pairs)
        figures[f"{work} processor time ratio"] = statistics.median(ratios)
        figures[f"{work} processor time ratio, lowest"] = ratios[0]
        figures[f"{work} processor time ratio, highest"] = ratios[-1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="size of a segment")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where; default: the system's temporary directory")
    parser.add_argument("--fsync", action="store_true", help="wait for the disk, as a server does")
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        fs = FileSystem() if args.fsync else Unsynced()
        figures = measure(Path(folder), args.megabytes, args.rounds, args.seed, fs)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {value:10.2f}")


if __name__ == "__main__":
    main()
