"""The measurements, each for a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmark.catalog.generate import NAMESPACE

from engram.catalog.catalog import Catalog
from engram.store.disk import DiskStore

ROUNDS = 5
ASKED = 200


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_ms(work: Callable[[int], Any], count: int = ASKED) -> float:
    return statistics.median(seconds(lambda n=n: work(n)) for n in range(count)) * 1000


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(root: Path) -> dict[str, float]:
    """As a server starts: the store, then the catalog; then, while it serves, the rest."""
    before = peak_mb()
    began = time.perf_counter()
    store = DiskStore.open(root)
    opened = time.perf_counter()
    catalog = Catalog.open(store.catalog_path, store)
    ready = time.perf_counter()
    known = catalog.boundary_keys(NAMESPACE)
    indexed = time.perf_counter()
    found = {
        "open_store_s": opened - began,
        "open_catalog_s": ready - opened,
        "boundary_index_s": indexed - ready,
        "start_s": indexed - began,
        "snapshots": float(len(known)),
        "peak_mb": peak_mb() - before,
    }
    del known
    found["check_s"] = seconds(catalog.check)
    assert catalog.checked
    catalog.close()
    store.close()
    return found


def ask(root: Path) -> dict[str, float]:
    """Questions that requests ask, at random places; medians."""
    rng = Random(1)
    with DiskStore.open(root) as store:
        catalog = Catalog.open(store.catalog_path, store)
        catalog.check()
        rows = catalog.all_snapshots()
        chosen = [rng.choice(rows) for _ in range(ASKED)]
        middle = catalog.list_snapshots("", limit=1000)
        found = {
            "list_page_of_100_ms": median_ms(
                lambda n: catalog.list_snapshots("", limit=100, after=middle.after)
            ),
            "list_conversation_ms": median_ms(
                lambda n: catalog.list_snapshots("", chosen[n].conversation_id)
            ),
            "find_turn_ms": median_ms(
                lambda n: catalog.find("", chosen[n].conversation_id, "main", 7)
            ),
            "find_newest_ms": median_ms(
                lambda n: catalog.find("", chosen[n].conversation_id, "main")
            ),
            "find_rid_ms": median_ms(lambda n: catalog.find_rid(chosen[n].rid or "")),
            "chain_ms": median_ms(lambda n: catalog.chain(NAMESPACE, 0, chosen[n].boundary_key)),
            "conversations_page_ms": median_ms(
                lambda n: catalog.conversations("", after=chosen[n].conversation_id), 20
            ),
            "unreferenced_ms": median_ms(lambda n: catalog.unreferenced_segments(), ROUNDS),
            "counts_ms": median_ms(lambda n: catalog.counts(), ROUNDS),
            "all_snapshots_s": seconds(catalog.all_snapshots),
        }
        catalog.close()
    return found


def alone(work: Callable[[Path], dict[str, float]], root: Path) -> dict[str, float]:
    """In a process of its own, so that memory is that of this alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (root,))
