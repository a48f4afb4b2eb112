"""What retention asks of the catalog: everything at once, and when conversations were used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from engram.catalog import inventory as inventory_module
from engram.catalog.catalog import Catalog
from engram.catalog.inventory import KeptSnapshot
from engram.retention import Snapshot
from engram.retention.inventory import snapshots_in, snapshots_of
from engram.snapshot.listing import ManifestEntry, manifest_name
from engram.snapshot.manifest import Manifest, change_manifest
from engram.store.disk import DiskStore
from engram.testing.samples import sample_chain, sample_manifest, seeded_random


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with DiskStore.open(tmp_path / "store") as store:
        catalog = Catalog.open(store.catalog_path, store)
        yield catalog
        catalog.close()


def fill(catalog: Catalog, rng: Random, conversations: int) -> list[Manifest]:
    """Conversations of up to four turns over two ranks, some of them on the first one's chain."""
    manifests = []
    shared = sample_chain(rng, (5, 3))
    for number in range(conversations):
        chain = shared
        if rng.random() < 0.7:
            chain = sample_chain(rng, [rng.randrange(1, 9) for _ in range(rng.randrange(1, 5))])
        for turn in range(1, len(chain) + 1):
            manifest = sample_manifest(
                [chain[:turn], chain[:turn]],
                snapshot_id=f"{number}-{turn}",
                conversation_id=f"conversation-{number}",
                turn_number=turn,
                created_at=rng.random() * 1000,
                pinned=rng.random() < 0.3,
                expires_at=rng.choice([None, 5.0]),
            )
            catalog.insert(manifest, ManifestEntry(manifest_name(f"{number}-{turn}", ""), "s"))
            manifests.append(manifest)
    rng.shuffle(manifests)
    return manifests


def shown(snapshots: list[Snapshot]) -> dict[str, object]:
    """Snapshots by id, each with the lengths and sizes of what it stands on."""
    found: dict[str, object] = {}
    for one in snapshots:
        chains = []
        for tip in one.tips:
            chain, node = [], tip
            while node is not None:
                chain.append((node.start, node.bytes, node.is_state))
                node = node.parent  # type: ignore[assignment]
            chains.append(tuple(chain))
        facts = (one.conversation, one.branch_name, one.turn_number, one.token_count, one.used_at)
        found[one.snapshot_id] = (*facts, one.priority, one.pinned, one.expires_at, *chains)
    return found


@pytest.mark.parametrize("page", [1, 3, 5_000])
def test_the_catalog_says_what_the_manifests_do(
    catalog: Catalog, rng: Random, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(inventory_module, "_PAGE_ROWS", page)
    manifests = fill(catalog, rng, 6)
    priorities = {("", "conversation-1"): 70}
    known = snapshots_in(catalog.inventory(), used_at={}, priorities=priorities)
    assert shown(known) == shown(snapshots_of(manifests, priorities=priorities))
    # Shared segments are one object each.
    segments = {id(s) for one in known for tip in one.tips for s in _chain(tip)}
    assert len(segments) == 2 * len({ref.segment_id for m in manifests for ref in m.segments[0]})


def _chain(tip: object) -> Iterator[object]:
    while tip is not None:
        yield tip
        tip = tip.parent  # type: ignore[attr-defined]


def test_rows_that_do_not_fit_together_end(catalog: Catalog, rng: Random) -> None:
    fill(catalog, rng, 2)
    found = catalog.inventory()
    number, segment = next(iter(found.segments.items()))
    found.segments[number] = type(segment)(number, 0, 1, False)
    found.segments[0] = type(segment)(number, 0, 1, False)
    assert len(snapshots_in(found, used_at={}, priorities={})) == len(found.snapshots)


def test_a_snapshot_that_is_pinned_while_it_is_read_is_there_once(
    catalog: Catalog, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = fill(catalog, rng, 4)
    monkeypatch.setattr(inventory_module, "_PAGE_ROWS", 1)
    first = next(catalog._kept_snapshots())
    (manifest,) = [m for m in manifests if m.snapshot_id == first.snapshot_id]
    read = catalog._kept_snapshots

    def pinned_meanwhile() -> Iterator[KeptSnapshot]:
        reading = read()
        yield next(reading)
        changed = change_manifest(manifest, pinned=not first.pinned)
        catalog.replace(changed, ManifestEntry(manifest_name(first.snapshot_id, ""), "t"))
        yield from reading

    monkeypatch.setattr(catalog, "_kept_snapshots", pinned_meanwhile)
    found = catalog.inventory().snapshots
    assert sorted(one.snapshot_id for one in found) == sorted(m.snapshot_id for m in manifests)
    (again,) = [one for one in found if one.snapshot_id == first.snapshot_id]
    assert again.pinned is not first.pinned


def test_use_is_the_newest_that_is_known(catalog: Catalog, rng: Random) -> None:
    fill(catalog, rng, 3)
    catalog.record_use({("", "conversation-1"): 5_000.0, ("", "conversation-2"): 1.0})
    catalog.record_use({("", "conversation-1"): 4_000.0, ("t", "other"): 7.0})
    uses = catalog.last_uses()
    assert uses == {
        ("", "conversation-1"): 5_000.0,
        ("", "conversation-2"): 1.0,
        ("t", "other"): 7.0,
    }
    known = snapshots_in(catalog.inventory(), used_at=uses, priorities={})
    for one in known:
        if one.conversation_id == "conversation-1":
            assert one.used_at == 5_000.0
        else:
            # Never before its newest snapshot: what is damaged or lost does no harm.
            assert one.used_at > 1.0
    assert catalog.forget_uses(100.0) == 1
    assert set(catalog.last_uses()) == {("", "conversation-1"), ("", "conversation-2")}


def test_the_use_survives_reopening_and_goes_with_the_catalog(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path) as store:
        catalog = Catalog.open(store.catalog_path, store)
        catalog.record_use({("", "a"): 5.0})
        catalog.close()
        catalog = Catalog.open(store.catalog_path, store)
        assert catalog.last_uses() == {("", "a"): 5.0}
        catalog.close()
        store.catalog_path.unlink()
        catalog = Catalog.open(store.catalog_path, store)
        assert catalog.last_uses() == {}
        catalog.close()
