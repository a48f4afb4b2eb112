"""Measure the conditional memory and write the figures as JSON.

Usage, at the root of a checkout:

    python -m benchmark.conditional_memory.run [--out FILE] [--seconds S] [NAME ...]

NAME: hashes gathers disk hiding collisions; all unless some are named. One thread computes unless a
row says otherwise. ENGRAM_BENCHMARK_DIR: where tables are written (default: the folder for
temporary files; it must be on a real disk with direct reads). `plots` draws the pictures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

NAMES = ("hashes", "gathers", "disk", "hiding", "collisions")

# Before torch is loaded, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {' '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("conditional-memory.json"))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are: {' '.join(NAMES)}")

    from benchmark.conditional_memory.measure import machine

    from engram.conditional_memory import backend

    figures: dict[str, object] = {}
    if options.out.exists():
        figures = json.loads(options.out.read_text())
    figures |= {"machine": machine(), "backend": backend()}
    for name in options.names or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        module = importlib.import_module(f"benchmark.conditional_memory.{name}")
        figures[name] = module.measure(options.seconds)
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
