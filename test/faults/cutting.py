"""Power cuts at random instants of a server without a model, again and again on one disk."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from engram.store.layout import Layout
from engram.testing.power import ForgetfulFileSystem, PowerCut
from faults.crowd import Crowd
from faults.engine import Keeper
from faults.ledger import Ledger, check_after_restart, sweep

LONGEST_LIFE = 120
"""Operations on files until the power goes; a save of a turn takes about fifteen."""
SWEEP_EVERY = 10
MOST_SNAPSHOTS = 12
CUTS_EACH = 4
"""Disks drawn from each moment of a cut: the same history, other losses."""


@dataclass
class Cuts:
    """What so many cuts have shown."""

    cuts: int = 0
    disks: int = 0
    restored: int = 0
    rebuilt: int = 0
    events: Counter[str] = field(default_factory=Counter)


async def _live(
    root: Path, fs: ForgetfulFileSystem, rng: Random, name: str, ledger: Ledger
) -> None:
    def tell(event: Mapping[str, Any]) -> None:
        assert not fs.is_cut, f"{event['event']} of {event['id']} is said after the power went"
        ledger.record(event)

    keeper = Keeper.start(root, fs)
    try:
        crowd = Crowd(keeper, rng, tell, name=name, known=ledger, most=MOST_SNAPSHOTS)
        while not fs.is_cut:
            await crowd.act()
    finally:
        keeper.stop()


def cut_again_and_again(
    folder: Path,
    rng: Random,
    cuts: int,
    *,
    disk_of: Callable[[Path], ForgetfulFileSystem] = ForgetfulFileSystem,
) -> Cuts:
    """So many cuts; life goes on on one of the disks that each may have left, all are checked."""
    found = Cuts()
    ledger = Ledger()
    root = folder / "disk"
    for number in range(cuts):
        fs = disk_of(root)
        fs.cut_at(rng.randrange(1, LONGEST_LIFE))
        before = _events(ledger)
        with contextlib.suppress(PowerCut):
            asyncio.run(_live(root, fs, rng, str(number), ledger))
        assert fs.is_cut
        found.events.update(_events(ledger) - before)
        found.cuts += 1
        for draw in range(CUTS_EACH):
            disk = folder / f"disk-{number}-{draw}"
            fs.cut(disk, rng)
            rebuilt = _keep_catalog(root, disk, rng)
            found.rebuilt += rebuilt
            known = ledger if draw == CUTS_EACH - 1 else copy.deepcopy(ledger)
            found.restored += check_after_restart(disk, known, rebuilt=rebuilt)
            found.disks += 1
            if draw < CUTS_EACH - 1:
                shutil.rmtree(disk)
        shutil.rmtree(root)
        disk.rename(root)
        if number % SWEEP_EVERY == SWEEP_EVERY - 1:
            sweep(root)
    return found


def _keep_catalog(root: Path, disk: Path, rng: Random) -> bool:
    """The catalog as SQLite keeps it: every commit it acknowledged, or, now and then, nothing.

    Whether it has to be built anew. Its file's name is not durable before a directory's fsync
    that nobody waits for, since it can be rebuilt.
    """
    source = Layout(root).catalog
    if not source.exists() or rng.random() < 0.25:
        return True
    with (
        closing(sqlite3.connect(source)) as old,
        closing(sqlite3.connect(disk / source.name)) as new,
    ):
        old.backup(new)
    return False


def _events(ledger: Ledger) -> Counter[str]:
    return Counter(
        name
        for promise in ledger.promises.values()
        for name in ("saved", "deleting", "deleted")
        if getattr(promise, name)
    )
