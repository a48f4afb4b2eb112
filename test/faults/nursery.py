"""A process that starts servers by forking: each is there in milliseconds, and can be killed.

Speaks lines of JSON: it is told ``{"root", "seed", "name", "known"}`` and answers with the process
id; that process tells what happens, until it is killed and its parent says ``{"ended": status}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from faults.crowd import Crowd, run_crowd
from faults.engine import Keeper
from faults.ledger import Ledger, Promise

CLIENTS = 4
RAM_BYTES = 1 << 16
"""Little enough that states leave RAM all the time."""


def say(message: Mapping[str, Any]) -> None:
    """One line, in one write."""
    line = json.dumps(message).encode() + b"\n"
    assert len(line) <= 4096, "not atomic on a pipe"
    os.write(1, line)


async def serve(root: Path, seed: int, name: str, known: Ledger) -> None:
    """A server under load, until somebody kills the process."""
    keeper = Keeper.start(root, ram_bytes=RAM_BYTES)
    crowd = Crowd(keeper, Random(seed), say, name=name, known=known)
    say({"serving": True})
    await run_crowd(crowd, CLIENTS, lambda: False)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                known = {id_: Promise(tokens, saved=True) for id_, tokens in order["known"].items()}
                asyncio.run(serve(Path(order["root"]), order["seed"], order["name"], Ledger(known)))
            except BaseException:
                say({"failed": traceback.format_exc()[-3000:]})
            os._exit(1)
        say({"pid": pid})
        _, status = os.waitpid(pid, 0)
        say({"ended": status})


if __name__ == "__main__":
    main()
