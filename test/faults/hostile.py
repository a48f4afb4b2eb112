"""Hostile files: a store is given files that were changed, and must refuse them or be right.

    PYTHONPATH=python:test python -m faults.hostile --cases 100000 --seed 1

Every case changes one manifest, segment, namespace, marker, keyring or encrypted segment, about
half of them with every digest made right again, puts it where the store looks, and has the store
read it. What is wrong then (`faults.judging`), or raises what no promise allows, is reported
with its number. A case that hangs ends the process; memory is bounded by the system (RLIMIT_AS).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

from faults.hostile_files import KINDS, WEIGHTS, Arena, clean, current

CASE_LIMIT_S: Final = 60
"""A case that takes longer hangs; the kernel ends the process then."""
MEMORY_LIMIT: Final = 256 << 20
"""Address space beyond what the process has before the first case, in bytes."""


@dataclass
class Report:
    """``outcomes`` by kind of file; ``wrong`` are the cases where a promise was broken."""

    seed: int
    cases: int = 0
    seconds: float = 0.0
    peak_growth_mib: float = 0.0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON value."""
        return {**vars(self), "outcomes": {k: dict(c) for k, c in self.outcomes.items()}}


def run(
    folder: Path,
    cases: Sequence[int],
    seed: int,
    on_case: Callable[[int], None] = lambda _: None,
    *,
    only: str | None = None,
) -> Report:
    """Run the cases of these numbers, of one kind of files only if that is named.

    A number, the seed and ``only`` repeat a case.
    """
    report = Report(seed, outcomes={kind: Counter() for kind in KINDS})
    with _silent(), _repeatable(f"{seed}"):
        arena = Arena(folder, random.Random(seed))
    began, before = time.monotonic(), _peak_mib()
    for number in cases:
        on_case(number)
        rng = random.Random(f"{seed} {number}")
        kind = only or rng.choices(list(KINDS), WEIGHTS)[0]
        current.clear()
        try:
            with _silent(), _repeatable(f"{seed} {number}"):
                report.outcomes[kind][KINDS[kind](arena, rng)] += 1
        except Exception as error:
            how = current[-1].how if current else "not placed"
            report.outcomes[kind]["wrong"] += 1
            report.wrong.append(
                {"case": number, "kind": kind, "how": how, "error": f"{error!r:.500}"}
            )
        report.cases += 1
        clean(arena)
    report.seconds = time.monotonic() - began
    report.peak_growth_mib = _peak_mib() - before
    return report


@contextmanager
def _silent() -> Iterator[None]:
    """Without a line in the log for each file that is quarantined."""
    logger = logging.getLogger("engram")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _repeatable(seed: str) -> Iterator[None]:
    """Keys, salts and times that are the same each time."""
    rng = random.Random(f"{seed} secrets")
    with (
        mock.patch("secrets.token_bytes", rng.randbytes),
        mock.patch("secrets.token_hex", lambda count: rng.randbytes(count).hex()),
        mock.patch("time.time", return_value=1_700_000_000.5),
    ):
        yield


def _peak_mib() -> float:
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def bounded(progress: Path | None) -> Iterator[Callable[[int], None]]:
    """Memory and the time of a case bounded by the kernel. Gives what to call before each case."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    fd = None if progress is None else os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600)

    def on_case(number: int) -> None:
        signal.alarm(CASE_LIMIT_S)
        if fd is not None:
            os.pwrite(fd, f"{number:12}\n".encode(), 0)

    yield on_case
    signal.alarm(0)


def main() -> None:
    """Run cases and print the report as one JSON object; the status is 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--progress", type=Path, help="file that has the number of the last case")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    numbers = range(args.cases) if args.case is None else [args.case]
    folder = Path(tempfile.mkdtemp(prefix="engram-hostile-"))
    try:
        with bounded(args.progress) as on_case:
            report = run(folder, numbers, seed, on_case)
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    raise SystemExit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
