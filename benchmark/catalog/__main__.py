"""What a catalog of many snapshots costs: its start, its questions, its memory.

python -m benchmark.catalog --dir FOLDER    # makes a store there first, some minutes, if none is
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmark.catalog.generate import generate
from benchmark.catalog.measure import ROUNDS, alone, ask, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where the store is, or is made")
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=25, help="of each conversation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not options.dir.exists():
        generate(options.dir, options.conversations, options.turns)
    starts = [alone(start, options.dir) for _ in range(ROUNDS)]
    found = {name: statistics.median(each[name] for each in starts) for name in starts[0]}
    found.update(alone(ask, options.dir))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:24} {value:10.2f}")


if __name__ == "__main__":
    main()
