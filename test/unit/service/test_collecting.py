"""Orphans are removed while the server runs; what a save relies on never is."""

import asyncio
import os
from pathlib import Path
from random import Random

import pytest

from engram.conversation.turns import Tag
from engram.errors import EngramError, StoreError
from engram.service import SnapshotService
from engram.service.collecting import CollectReport, collect_once
from engram.snapshot.archive import segments_of
from engram.snapshot.manifest import Manifest
from engram.snapshot.segment import Shard
from engram.store.layout import Layout
from engram.testing.contracts import put
from engram.testing.samples import sample_segment
from unit.service.engine import Server, on_a_loop

LATER = 10_000.0


async def collect(server: Server, grace: float = 0.0) -> CollectReport:
    """As if everything there is had been written long ago."""
    newest = max((s.written_at for s in server.store.iter_segments()), default=0.0)
    return await collect_once(server.service.context, grace=grace, now=newest + LATER)


def orphan(server: Server, *, ours: bool = True) -> tuple[Shard, str]:
    shard = server.engine.shard(1) if ours else Shard("ee" * 32, 0, 1)
    segment = sample_segment(server.rng, shard=shard)
    put(server.store, segment)
    return shard, segment.segment_id


def missing(server: Server) -> list[str]:
    """What manifests name and the store has not."""
    return [
        segment_id
        for manifest in server.store.iter_manifests()
        if isinstance(manifest, Manifest)
        for shard, segment_id in segments_of(manifest)
        if not server.store.has_segment(shard, segment_id)
    ]


@on_a_loop
async def test_orphans_go_and_what_is_named_stays(server: Server) -> None:
    await server.chat("talk", 2)
    await server.service.save(tenant="", conversation_id="talk")
    files = server.files()
    for ours in (True, False):
        orphan(server, ours=ours)
    report = await collect(server)
    assert (report.removed, report.last, report.young) == (2, True, 0)
    assert report.bytes > 0
    assert server.files() == files
    stats = (await server.service.stats())["service"]
    assert (stats["collected_segments"], stats["collected_bytes"]) == (2, report.bytes)
    assert (await collect(server)).removed == 0


@on_a_loop
async def test_files_of_the_engine_go_through_its_ranks(server: Server) -> None:
    asked: list[list[list[str]]] = []
    real = server.engine.drop

    async def drop(namespace: str, segment_ids: list[list[str]]) -> None:
        asked.append([list(ids) for ids in segment_ids])
        await real(namespace, segment_ids)

    server.engine.drop = drop  # type: ignore[assignment, method-assign]
    _, segment_id = orphan(server)
    _, other = orphan(server, ours=False)
    await collect(server)
    assert asked == [[[], [segment_id]]]
    assert server.files() == set()
    assert other not in str(asked)


@on_a_loop
async def test_what_is_young_stays(server: Server) -> None:
    _, segment_id = orphan(server)
    report = await collect(server, grace=LATER + 1)
    assert (report.removed, report.young) == (0, 1)
    assert server.files() == {(1, segment_id)}


@on_a_loop
async def test_a_save_between_its_segments_and_its_manifest_loses_nothing(server: Server) -> None:
    await server.chat("talk")
    server.engine.persist_gate.shut()
    saving = asyncio.create_task(server.service.save(tenant="", conversation_id="talk"))
    await server.engine.persist_gate.reached.wait()
    files = server.files()
    assert files  # durable, and named by nothing
    collecting = asyncio.create_task(collect(server))
    done, _ = await asyncio.wait([collecting], timeout=0.5)
    assert not done
    server.engine.persist_gate.open.set()
    await saving
    assert (await collecting).removed == 0
    assert server.files() == files
    assert missing(server) == []


@on_a_loop
async def test_a_cancelled_round_lets_no_save_in_before_it_has_ended(server: Server) -> None:
    orphan(server)
    entered, leave = asyncio.Event(), asyncio.Event()
    real = server.engine.drop

    async def slow(namespace: str, segment_ids: list[list[str]]) -> None:
        entered.set()
        await leave.wait()
        await real(namespace, segment_ids)

    server.engine.drop = slow  # type: ignore[assignment, method-assign]
    collecting = asyncio.create_task(collect(server))
    await entered.wait()
    collecting.cancel()
    await server.chat("talk")
    saving = asyncio.create_task(server.service.save(tenant="", conversation_id="talk"))
    done, _ = await asyncio.wait([saving], timeout=0.5)
    assert not done
    leave.set()
    await saving
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert missing(server) == []


@on_a_loop
async def test_a_manifest_without_its_row_keeps_its_segments(server: Server) -> None:
    """As a save leaves it whose row, and whose undoing, failed: the next start lists it."""
    await server.chat("talk")
    saved = await server.service.save(tenant="", conversation_id="talk")
    server.catalog.delete(saved.snapshot_id)
    files = server.files()
    assert (await collect(server)).removed == 0
    assert server.files() == files


@on_a_loop
async def test_a_damaged_manifest_keeps_its_segments_until_it_is_deleted(server: Server) -> None:
    await server.chat("talk")
    saved = await server.service.save(tenant="", conversation_id="talk")
    (path,) = (server.root / "manifests").rglob("*.json")
    os.truncate(path, 10)
    with pytest.raises(EngramError):
        server.store.get_manifest(saved.snapshot_id)
    assert (await collect(server)).removed == 0
    row = await server.service.find(tenant="", conversation_id="talk")
    await server.service.delete(row)
    await collect(server)
    assert server.files() == set()


@on_a_loop
async def test_temporary_files_go_at_the_end_of_a_sweep(server: Server) -> None:
    left = Layout(server.root).root / ".segment.0123.tmp"
    left.write_bytes(b"half")
    report = await collect(server)
    assert (report.temporary_files, report.last) == (1, True)
    assert not left.exists()
    assert server.service.context.stats.collected_temps == 1


@on_a_loop
async def test_rows_without_a_file_are_forgotten(server: Server) -> None:
    await server.chat("talk")
    saved = await server.service.save(tenant="", conversation_id="talk")
    server.store.delete_manifest(saved.snapshot_id)
    server.catalog.delete(saved.snapshot_id)
    first = await collect(server)
    assert first.removed == 4  # rows and a state on each rank
    assert server.catalog.unreferenced_segments() == []


@on_a_loop
async def test_a_rank_that_fails_is_told_and_the_next_round_goes_on(server: Server) -> None:
    orphan(server)
    real = server.engine.drop

    async def fail(namespace: str, segment_ids: list[list[str]]) -> None:
        raise StoreError("the disk has gone")

    server.engine.drop = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(StoreError, match="disk has gone"):
        await collect(server)
    server.engine.drop = real  # type: ignore[method-assign]
    assert (await collect(server)).removed == 1


@on_a_loop
async def test_the_weights_may_change_meanwhile(server: Server) -> None:
    await server.service.context.engine()
    orphan(server)
    server.engine.change_weights("others")
    assert (await collect(server)).removed == 1
    assert server.files() == set()


async def _talk(server: Server, service: SnapshotService, name: str, rng: Random) -> None:
    tokens: list[int] = []
    for turn in range(6):
        _, tokens = await server.serve([*tokens, *server.random_tokens(4)], Tag(name))
        await service.save(tenant="", conversation_id=name)
        if rng.random() < 0.4:
            branch = f"branch-{turn}"
            await service.save(tenant="", conversation_id=name, branch_name=branch)
        if rng.random() < 0.4:
            await service.delete(await service.find(tenant="", conversation_id=name))
        assert missing(server) == []


@on_a_loop
async def test_saves_branches_deletions_and_collections_at_once(server: Server) -> None:
    """No segment that a manifest names is ever removed; at the end no orphan is left."""
    talks = [
        asyncio.create_task(
            _talk(server, server.service, f"talk-{n}", Random(server.rng.randrange(2**32)))
        )
        for n in range(6)
    ]
    removed = 0
    while not all(talk.done() for talk in talks):
        orphan(server, ours=server.rng.random() < 0.5)
        removed += (await collect(server)).removed
        assert missing(server) == []
    await asyncio.gather(*talks)
    removed += (await collect(server)).removed
    assert removed > 0
    named = {
        key
        for manifest in server.store.iter_manifests()
        if isinstance(manifest, Manifest)
        for key in segments_of(manifest)
    }
    assert {(s.shard, s.segment_id) for s in server.store.iter_segments()} == named
    for shard, segment_id in named:
        server.store.verify_segment(shard, segment_id)


def test_the_store_is_found_whole_by_the_next_process(tmp_path: Path, server: Server) -> None:
    async def work() -> None:
        await server.chat("talk", 3)
        await server.service.save(tenant="", conversation_id="talk")
        orphan(server)
        await collect(server)

    asyncio.run(work())
    again = server.restart()
    assert missing(again) == []
    again.stop()
