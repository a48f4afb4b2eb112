"""How much of a lookup on disk hides behind the layers before it.

A step computes for a while on one thread (the layers before), then needs its rows. Three ways:
*resident* rows in memory, *sync* from disk when they are needed, *overlapped* from disk by a
prefetch started when the step's tokens are known. hiding = (sync - overlapped) / (sync - resident).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark.conditional_memory.disk import config, make_table

from engram.conditional_memory import EngramModule, HostTable, NgramHashLayout
from engram.conditional_memory.tables.base import MemoryTable

ROWS = 2 << 20
STEPS = 24


def measure(seconds: float) -> dict[str, object]:
    """Decode (8 texts, one token each) and prefill (a chunk of 128 tokens)."""
    torch.set_num_threads(1)
    layout = NgramHashLayout(config(ROWS))
    with tempfile.TemporaryDirectory(dir=os.environ.get("ENGRAM_BENCHMARK_DIR")) as name:
        disk = make_table(Path(name) / "table", layout.rows())
        # Without the cache every step really reads the disk.
        disk._cache = None
        host = HostTable(layout.rows(), 256, "fp8", pinned=False)
        host.fill(disk.blocks())
        result = {
            "decode": _steps(layout, disk, host, (8, 1)),
            "prefill": _steps(layout, disk, host, (1, 128)),
            "cores": os.cpu_count(),
            "compute_threads": 1,
            "read_threads": 8,
        }
        disk.close()
    return result


def _steps(
    layout: NgramHashLayout, disk: MemoryTable, host: MemoryTable, shape: tuple[int, int]
) -> dict[str, object]:
    small = layout.config
    disk_module = EngramModule(small, table=disk, layout=layout)
    host_module = EngramModule(small, table=host, layout=layout)
    random = torch.Generator().manual_seed(2)
    lookup = _time_of(lambda: disk_module.prefetch_embeddings(_ids(shape, random)).result(), STEPS)
    # The layers before take twice as long as the lookup, as they do when it is worth prefetching.
    layers = _layers(2 * statistics.median(lookup))

    def resident() -> None:
        ids = _ids(shape, random)
        layers()
        host_module.prefetch_embeddings(ids).result()

    def sync() -> None:
        ids = _ids(shape, random)
        layers()
        disk_module.prefetch_embeddings(ids).result()

    def overlapped() -> None:
        handle = disk_module.prefetch_embeddings(_ids(shape, random))
        layers()
        handle.result()

    ways = {"resident": resident, "sync": sync, "overlapped": overlapped}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(STEPS):
        for way, work in ways.items():
            times[way] += _time_of(work, 1)
    ms = {way: statistics.median(taken) * 1e3 for way, taken in times.items()}
    return {
        "rows_a_step": shape[0] * shape[1] * small.num_columns,
        "lookup_ms": statistics.median(lookup) * 1e3,
        "step_ms": ms,
        "hiding": (ms["sync"] - ms["overlapped"]) / (ms["sync"] - ms["resident"]),
    }


def _ids(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 99092, shape, generator=random)


def _layers(seconds: float) -> Callable[[], None]:
    """Matrix products that take about ``seconds`` on one thread."""
    a = torch.randn(256, 1024)
    b = torch.randn(1024, 1024)
    # The least, so that a busy moment does not make the layers too short.
    once = min(_time_of(lambda: torch.mm(a, b), 40))
    count = max(1, round(seconds / once))

    def layers() -> None:
        for _ in range(count):
            torch.mm(a, b)

    return layers


def _time_of(work: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken
