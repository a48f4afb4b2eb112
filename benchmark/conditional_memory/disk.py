"""A table four times larger than the memory it may use: direct reads and a bounded cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmark.conditional_memory.measure import real_text, token_ids, tokenizer_of

from engram.conditional_memory import (
    DiskTable,
    EngramConfig,
    NgramHashLayout,
    TokenCompression,
)
from engram.conditional_memory.tables.format import shard_path

ALLOWANCE = 128 << 20
CHUNK = 2048


def config(rows: int) -> EngramConfig:
    """V4.1's orders, heads and width, with about ``rows`` rows in one layer."""
    return EngramConfig.preset(
        "deepseek-v4.1-flash",
        compressed_vocab_size=None,
        layer_ids=(1,),
        embedding_table_size=rows // 24,
    )


def make_table(folder: Path, rows: int) -> DiskTable:
    """Random bytes that are fp8 rows; out of the page cache afterwards."""
    random = np.random.default_rng(1)
    noise = random.integers(0, 120, (1 << 15, 264), dtype=np.uint8)

    def fill(start: int, end: int) -> np.ndarray:
        return noise[np.arange(start, end) % len(noise)]

    DiskTable.create(folder, rows, 256, "fp8", fill).close()
    with shard_path(folder, 0).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return DiskTable(folder, reads="direct", cache_bytes=ALLOWANCE)


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache, by mincore(2)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(memory, np.uint8)
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(
        ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
    )
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def own_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure(seconds: float) -> dict[str, object]:
    """Cold and warm passes over real text; the part of the table that was in memory at the end."""
    text = real_text()
    tokenizer = tokenizer_of(text)
    compression = TokenCompression.from_tokenizer(tokenizer)
    ids = token_ids(tokenizer, text)[: CHUNK * 96]
    rows = 4 * ALLOWANCE // 264
    layout = NgramHashLayout(config(rows), compression)
    chunks = torch.from_numpy(ids).view(-1, 1, CHUNK)
    with tempfile.TemporaryDirectory(dir=os.environ.get("ENGRAM_BENCHMARK_DIR")) as name:
        folder = Path(name) / "table"
        table = make_table(folder, layout.rows())
        before = own_bytes()
        passes = [_pass(table, layout, chunks) for _ in range(2)]
        result = {
            "table_mib": table.rows * 264 / (1 << 20),
            "allowance_mib": ALLOWANCE / (1 << 20),
            "tokens_a_pass": ids.size,
            "cold": passes[0],
            "warm": passes[1],
            "memory_grown_mib": (own_bytes() - before) / (1 << 20),
            "file_resident_mib": resident_bytes(shard_path(folder, 0)) / (1 << 20),
            "tokenizer_ids": compression.vocab_size,
            "tokenizer_reduction": compression.reduction,
        }
        table.close()
    return result


def _pass(table: DiskTable, layout: NgramHashLayout, chunks: torch.Tensor) -> dict[str, float]:
    statistics, cache = table.statistics, table.cache_statistics
    assert cache is not None
    start = (statistics.requested, statistics.read, cache.hits, cache.misses)
    began = time.perf_counter()
    for chunk in chunks:
        table.gather(layout.hash(chunk))
    took = time.perf_counter() - began
    requested, read, hits, misses = (
        now - then
        for now, then in zip(
            (statistics.requested, statistics.read, cache.hits, cache.misses), start, strict=True
        )
    )
    return {
        "tokens_per_s": chunks.numel() / took,
        "rows_per_s": requested / took,
        "dedup_ratio": requested / read,
        "cache_hit_ratio": hits / (hits + misses),
        "disk_reads_per_s": misses / took,
    }
