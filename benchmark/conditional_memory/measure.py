"""What the measurements share: timing, real text, a name for the machine."""

from __future__ import annotations

import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def rate(work: Callable[[], object], amount: int, seconds: float = 1.0) -> float:
    """``amount`` over the median time of ``work``, repeated for about ``seconds``; at least 3x."""
    work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times)


def interleaved(
    works: dict[str, Callable[[], object]], amount: int, seconds: float = 3.0
) -> dict[str, float]:
    """`rate` of several, taken in turns, so that a busy moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    began = time.perf_counter()
    while min(map(len, times.values())) < 5 or time.perf_counter() - began < seconds:
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: amount / statistics.median(taken) for name, taken in times.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def machine() -> dict[str, object]:
    """The machine in words."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30), 1),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def real_text(most_bytes: int = 12 << 20) -> str:
    """Text that people wrote, found on every machine: the sources of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    parts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(errors="replace")
        parts.append(text)
        size += len(text)
        if size > most_bytes:
            break
    return "".join(parts)


def tokenizer_of(text: str, vocab_size: int = 16000) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the first part of ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    size = 1 << 16
    pieces = [text[i : i + size] for i in range(0, min(len(text), 4 << 20), size)]
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of ``text``, int64 [n]."""
    size = 1 << 18
    batch = [text[i : i + size] for i in range(0, len(text), size)]
    return np.concatenate([np.array(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(batch)])
