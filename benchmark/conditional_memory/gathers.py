"""Rows/s out of memory: 264-byte rows of a 2 GiB table, against torch and the bandwidth limit."""

from __future__ import annotations

import numpy as np
import torch
from benchmark.conditional_memory.measure import interleaved

from engram.conditional_memory import HostTable, kernel

ROWS, BATCH = 8 << 20, 1 << 16


def measure(seconds: float) -> dict[str, object]:
    """Rows/s of each way with outputs reused; the limit is a copy of as many bytes in one piece."""
    huge = HostTable(ROWS, 256, "fp8", pinned=False)
    huge.data[:] = 7
    small = HostTable(ROWS, 256, "fp8", huge_pages=False, pinned=False)
    small.data[:] = 7
    random = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, ROWS, (BATCH,), generator=random) for _ in range(16)]
    turn = iter(range(1 << 60))

    def ids() -> torch.Tensor:
        return batches[next(turn) % len(batches)]

    out = torch.ones(BATCH, 264, dtype=torch.uint8)
    views = {"": torch.from_numpy(small.data), ", huge pages": torch.from_numpy(huge.data)}
    # Another part of the table each time, so that the copy too comes from memory.
    parts = ROWS // BATCH
    works = {
        "copy in one piece": lambda: np.copyto(
            out.numpy(), huge.data[(start := next(turn) * 37 % parts * BATCH) : start + BATCH]
        ),
        "numpy take": lambda: np.take(small.data, ids().numpy(), 0, out.numpy(), mode="clip"),
    }
    for name, table in views.items():
        works["torch.index_select" + name] = lambda table=table: torch.index_select(
            table, 0, ids(), out=out
        )
    if native := kernel.load():
        for name, table in (("", small), (", huge pages", huge)):
            for threads in (1, 2):
                works[f"kernel{name}, {threads} threads"] = lambda table=table, threads=threads: (
                    native.gather(table.data, ids().numpy(), threads=threads, out=out.numpy())
                )
    rates = interleaved(works, BATCH, seconds)
    return {
        "table_gib": ROWS * 264 / (1 << 30),
        "rows_per_s": rates,
        "over_index_select": {k: v / rates["torch.index_select"] for k, v in rates.items()},
        "of_limit": {k: v / rates["copy in one piece"] for k, v in rates.items()},
    }
