"""Restoring and continuing, listing, deleting, and the requests that bring their own prefix."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import RunningRequest, Tag
from engram.core.namespace import Namespace
from engram.core.tokens import to_tokens
from engram.errors import (
    DeadlineError,
    EngramError,
    ManifestCorruptError,
    NamespaceMismatchError,
    NotFoundError,
    RamTierFullError,
    SnapshotCorruptError,
    UnsupportedError,
)
from engram.service.boundaries import BoundaryIndex
from engram.service.restores import Continuation
from engram.snapshot.envelope import open_record, seal_record
from engram.snapshot.listing import manifest_name
from engram.snapshot.manifest import SegmentRef
from unit.service.engine import Server, on_a_loop


async def save_all(server: Server, conversation_id: str, turns: int) -> list[int]:
    tokens = await server.chat(conversation_id, turns=turns)
    for turn in range(1, turns + 1):
        await server.service.save(tenant="", conversation_id=conversation_id, turn_number=turn)
    return tokens


async def newest(server: Server, conversation_id: str = "c") -> SnapshotRow:
    return await server.service.find(tenant="", conversation_id=conversation_id)


def flip_a_bit(server: Server, segment_id: str, rng: Random) -> None:
    path = next(p for p in server.root.rglob("*") if segment_id in p.name)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) - 100, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


# ---- restore ----


@on_a_loop
async def test_a_restore_acknowledges_what_it_did(server: Server) -> None:
    tokens = await save_all(server, "c", 2)
    after = server.restart(conversation_active_timeout=77.0)
    row = await newest(after)
    result = await after.service.restore(row)
    assert (result.token_count, result.recompute_tokens) == (len(tokens) - 1, 1)
    assert (result.source_tier, result.tier, result.verified) == ("disk", "ram", True)
    assert result.bytes == row.bytes
    assert result.generation is None
    [asked] = after.engine.promoted
    manifest = after.store.get_manifest(row.snapshot_id)
    assert [list(c) for c in asked["chains"]] == [list(c) for c in manifest.segments]
    assert (asked["exact"], asked["seconds"]) == (True, 77.0)
    assert row.snapshot_id in asked["owner"]
    assert after.service.context.stats.restores == 1
    after.stop()


@on_a_loop
async def test_a_continuation_is_the_next_turn_of_the_branch(server: Server) -> None:
    await save_all(server, "c", 2)
    after = server.restart()
    first = await after.service.find(tenant="", conversation_id="c", turn_number=1)
    recorded = (await after.service.tokens(first)).tolist()
    more = after.random_tokens(3)
    result = await after.service.restore(
        first, Continuation(more, {"max_new_tokens": 4, "temperature": 0.0}, "my-rid")
    )
    assert result.generation is not None
    assert result.generation.rid == "my-rid"
    assert after.engine.generated[-1]["input_ids"] == [*recorded, *more]
    assert after.engine.generated[-1]["params"] == {"max_new_tokens": 4, "temperature": 0.0}
    saved = await after.service.save(tenant="", conversation_id="c")
    row = after.catalog.get(saved.snapshot_id)
    assert (row.turn_number, row.branch_name) == (3, "main")
    assert row.parent_snapshot == first.snapshot_id, "it stands on turn 1, not on turn 2"
    expected = [*recorded, *more, *result.generation.output_ids]
    assert (await after.service.tokens(row)).tolist() == expected
    after.stop()


@on_a_loop
async def test_turns_count_on_after_a_restart(server: Server) -> None:
    tokens = await save_all(server, "c", 3)
    after = server.restart()
    await after.chat("c", before=tokens)
    saved = await after.service.save(tenant="", conversation_id="c")
    assert saved.turn_number == 4
    third = await after.service.find(tenant="", conversation_id="c", turn_number=3)
    assert after.catalog.get(saved.snapshot_id).parent_snapshot == third.snapshot_id
    assert [row.turn_number for row in await after.service.list("", "c")] == [1, 2, 3, 4]
    after.stop()


@on_a_loop
async def test_a_lost_manifest_is_damage_and_not_an_unknown_snapshot(server: Server) -> None:
    await save_all(server, "c", 2)
    row = await newest(server)
    server.store.delete_manifest(row.snapshot_id)
    with pytest.raises(SnapshotCorruptError, match=row.snapshot_id):
        await server.service.restore(row)
    first = await server.service.find(tenant="", conversation_id="c", turn_number=1)
    assert (await server.service.restore(first)).verified


@on_a_loop
async def test_a_damaged_snapshot_is_refused_and_the_others_serve(
    server: Server, rng: Random
) -> None:
    await save_all(server, "c", 2)
    row = await newest(server)
    damaged = server.store.get_manifest(row.snapshot_id).segments[1][-1].segment_id
    flip_a_bit(server, damaged, rng)
    with pytest.raises(SnapshotCorruptError, match=damaged):
        await server.service.restore(row)
    assert server.service.context.stats.restore_failures == 1
    first = await server.service.find(tenant="", conversation_id="c", turn_number=1)
    assert (await server.service.restore(first)).verified


@on_a_loop
async def test_another_model_never_matches(server: Server) -> None:
    await save_all(server, "c", 1)
    row = await newest(server)
    await server.service.stats()
    other = server.restart()
    other.engine = other.engine.__class__(other.store, other.rng, page_size=4)
    other.service.context.ranks = other.engine
    with pytest.raises(NamespaceMismatchError) as caught:
        await other.service.restore(row)
    named = {name: caught.value.details[name] for name in ("field", "wanted", "found")}
    assert named == {"field": "page_size", "wanted": 4, "found": 1}
    assert other.engine.promoted == []
    assert await other.service.tier(row) == "disk"
    await other.service.delete(row)
    assert other.files() == set(), "it can still be deleted"
    other.stop()


@on_a_loop
async def test_another_model_never_matches_though_nobody_knows_what_it_was(server: Server) -> None:
    await save_all(server, "c", 1)
    row = await newest(server)
    other = server.restart()
    other.engine.namespace = Namespace({"model": "another"})
    other.engine.info = replace(other.engine.info, namespace=other.engine.namespace)
    (other.root / "namespaces" / f"{row.namespace}.json").write_bytes(b"damaged")
    with pytest.raises(NamespaceMismatchError, match="cannot be told") as caught:
        await other.service.restore(row)
    assert caught.value.details["field"] == "namespace"
    assert caught.value.details["found"] == row.namespace
    other.stop()


@on_a_loop
async def test_what_is_not_saved_yet_says_so(server: Server) -> None:
    await server.chat("c")
    with pytest.raises(NotFoundError) as caught:
        await newest(server)
    assert "/save_snapshot" in caught.value.hint
    with pytest.raises(NotFoundError):
        await server.service.find(tenant="", rid="rid-1")
    with pytest.raises(NotFoundError):
        await server.service.list("", "c")


@on_a_loop
async def test_a_tenant_sees_its_own_alone(server: Server) -> None:
    await server.chat("c", tenant="t")
    saved = await server.service.save(tenant="t", conversation_id="c", snapshot_id="mine")
    for asking in (
        server.service.find(tenant="", conversation_id="c"),
        server.service.list("", "c"),
        server.service.find(tenant="u", conversation_id="c"),
    ):
        with pytest.raises(NotFoundError):
            await asking
    await server.chat("c")
    other = await server.service.save(tenant="", conversation_id="c", snapshot_id="mine")
    assert other.snapshot_id == saved.snapshot_id, "the same id, in another tenant"
    await server.service.delete(server.catalog.get("mine", ""))
    assert server.catalog.get("mine", "t").turn_number == 1


# ---- delete ----


@on_a_loop
async def test_deleting_takes_what_no_other_snapshot_shares(server: Server) -> None:
    await save_all(server, "c", 3)
    rows = await server.service.list("", "c")
    before = server.files()

    def last(row: SnapshotRow, count: int) -> set[tuple[int, str]]:
        chains = server.store.get_manifest(row.snapshot_id).segments
        return {(n, ref.segment_id) for n, chain in enumerate(chains) for ref in chain[-count:]}

    state, own = last(rows[0], 1), last(rows[2], 2)
    await server.service.delete(rows[0])
    assert server.files() == before - state, "later turns stand on its rows, not on its state"
    await server.service.delete(rows[2])
    assert server.files() == before - state - own
    assert (await server.service.restore(rows[1])).verified
    assert len(server.service.context.boundaries) == 1
    await server.service.delete(rows[1])
    assert server.files() == set()
    assert server.store.list_manifests() == []
    assert len(server.service.context.boundaries) == 0
    with pytest.raises(NotFoundError):
        await server.service.list("", "c")
    after = server.restart()
    assert after.catalog.counts().snapshots == 0, "what was deleted does not come back"
    after.stop()


@pytest.mark.parametrize("newer", [True, False], ids=["newer", "damaged"])
@on_a_loop
async def test_deleting_leaves_what_a_manifest_names_that_cannot_be_read(
    server: Server, newer: bool
) -> None:
    """It may be repaired, or be of an Engram that will use this store again."""
    await save_all(server, "c", 2)
    first, second = await server.service.list("", "c")
    path = next(server.root.rglob(manifest_name(second.snapshot_id, "")))
    chains = server.store.get_manifest(second.snapshot_id).segments
    named = {(rank, ref.segment_id) for rank, chain in enumerate(chains) for ref in chain}
    whole = path.read_bytes()
    changed = {**open_record(whole), "version": 2} if newer else None
    path.write_bytes(seal_record(changed) if changed else whole.replace(b"main", b"mail"))
    server.stop()
    (server.root / "catalog.sqlite").unlink()
    after = Server.start(server.root, server.rng)
    assert [row.snapshot_id for row in await after.service.list("", "c")] == [first.snapshot_id]
    await after.service.delete(first)
    assert after.files() == named
    after.stop()


@on_a_loop
async def test_a_damaged_snapshot_is_deleted_with_its_files(server: Server) -> None:
    await save_all(server, "c", 1)
    (row,) = await server.service.list("", "c")
    path = next(server.root.rglob(manifest_name(row.snapshot_id, "")))
    path.write_bytes(path.read_bytes().replace(b"main", b"mail"))
    with pytest.raises(ManifestCorruptError):
        server.store.get_manifest(row.snapshot_id)
    await server.service.delete(row)
    assert server.files() == set()


@on_a_loop
async def test_a_deletion_waits_for_a_save_that_stands_on_its_segments(server: Server) -> None:
    await server.chat("c", turns=2)
    await server.service.save(tenant="", conversation_id="c", turn_number=1)
    first = await server.service.find(tenant="", conversation_id="c", turn_number=1)
    server.engine.persist_gate.shut()
    saving = asyncio.ensure_future(server.service.save(tenant="", conversation_id="c"))
    await server.engine.persist_gate.reached.wait()
    deleting = asyncio.ensure_future(server.service.delete(first))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not deleting.done()
    assert server.store.get_manifest(first.snapshot_id).turn_number == 1
    server.engine.persist_gate.open.set()
    await asyncio.gather(saving, deleting)
    second = await newest(server)
    assert second.turn_number == 2
    assert (await server.service.restore(second)).verified


@on_a_loop
async def test_saves_and_deletions_at_once_leave_only_whole_snapshots(
    server: Server, rng: Random
) -> None:
    await server.chat("c", turns=6)
    for _ in range(4):
        turns = [turn for turn in range(1, 7) if rng.random() < 0.5]
        rows = [row for row in server.catalog.all_snapshots() if rng.random() < 0.5]
        saves = (server.service.save(tenant="", conversation_id="c", turn_number=t) for t in turns)
        work: list[Any] = [*saves, *(server.service.delete(row) for row in rows)]
        rng.shuffle(work)
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            assert not isinstance(outcome, BaseException) or isinstance(outcome, EngramError)
        for row in server.catalog.all_snapshots():
            assert (await server.service.restore(row)).verified
    for row in server.catalog.all_snapshots():
        await server.service.delete(row)
    assert server.files() == set()
    assert len(server.service.context.boundaries) == 0


# ---- requests that bring their own prefix ----


@on_a_loop
async def test_a_request_waits_for_its_longest_stored_prefix(server: Server) -> None:
    tokens = await save_all(server, "c", 2)
    after = server.restart()
    await after.service.gate.admit(RunningRequest("r", to_tokens([*tokens, 1, 2])))
    [asked] = after.engine.promoted
    assert (asked["owner"], asked["exact"]) == ("r", False)
    assert [chain[-1].end for chain in asked["chains"]] == [len(tokens) - 1] * 2
    assert after.service.context.stats.held_requests == 1
    await after.service.gate.admit(RunningRequest("s", to_tokens(tokens[:5])))
    assert len(after.engine.promoted) == 1, "no boundary lies in these"
    after.stop()


@on_a_loop
async def test_a_boundary_at_the_very_end_of_a_prompt_is_of_no_use(server: Server) -> None:
    tokens = await save_all(server, "c", 1)
    after = server.restart()
    await after.service.gate.admit(RunningRequest("r", to_tokens(tokens[:-1])))
    assert after.engine.promoted == []
    await after.service.gate.admit(RunningRequest("s", to_tokens(tokens)))
    assert len(after.engine.promoted) == 1
    after.stop()


@on_a_loop
async def test_other_salts_and_adapters_never_match(server: Server) -> None:
    tokens = to_tokens(await save_all(server, "c", 1))
    after = server.restart()
    gate = after.service.gate
    await gate.admit(RunningRequest("a", tokens, extra_key="lora"))
    await gate.admit(RunningRequest("b", tokens, cache_salt="salt"))
    assert after.engine.promoted == []
    after.stop()


@on_a_loop
async def test_a_prefix_that_is_slow_costs_the_hit_and_never_the_request(server: Server) -> None:
    tokens = await save_all(server, "c", 1)
    after = server.restart(snapshot_promote_timeout=0.5)
    after.engine.promote_gate.shut()
    _, grown = await after.serve([*tokens, 5], Tag("c"), rid="r")
    stats = after.service.context.stats
    assert (stats.held_requests, stats.hold_timeouts, stats.hold_failures) == (1, 1, 0)
    assert after.engine.abandoned == ["r"], "what has not begun to be read is not read for nobody"
    assert after.service.gate.holding == 0
    after.engine.promote_gate.open.set()
    saved = await after.service.save(tenant="", conversation_id="c")
    assert (saved.turn_number, saved.token_count) == (2, len(grown) - 1)
    after.stop()


@on_a_loop
async def test_a_snapshot_deleted_while_it_is_restored_is_not_called_damaged(
    server: Server,
) -> None:
    await save_all(server, "c", 1)
    after = server.restart()
    row = await after.service.find(tenant="", conversation_id="c")
    after.engine.promote_gate.shut()
    restoring = asyncio.ensure_future(after.service.restore(row))
    while not after.engine.promoted:
        await asyncio.sleep(0)
    await after.service.delete(row)
    after.engine.promote_gate.open.set()
    with pytest.raises(NotFoundError):
        await restoring
    after.stop()


@on_a_loop
async def test_a_snapshot_that_is_being_removed_is_not_called_damaged(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is gone before its row is: with a batch on a slow disk, seconds before."""
    await save_all(server, "c", 1)
    row = await newest(server)
    unlinked, read, go_on = (threading.Event() for _ in range(3))
    remove, get = server.catalog.remove_snapshots, server.store.get_manifest

    def late(names: Any) -> Any:
        unlinked.set()
        go_on.wait(60)
        return remove(names)

    def told(*args: Any) -> Any:
        read.set()
        return get(*args)

    monkeypatch.setattr(server.catalog, "remove_snapshots", late)
    monkeypatch.setattr(server.store, "get_manifest", told)
    deleting = asyncio.ensure_future(server.service.delete(row))
    await asyncio.to_thread(unlinked.wait, 60)
    asked = [server.service.restore(row), server.service.tokens(row)]
    asking = [asyncio.ensure_future(work) for work in asked]
    await asyncio.to_thread(read.wait, 60)
    await asyncio.wait(asking, timeout=0.1)
    go_on.set()
    await deleting
    for work in asking:
        with pytest.raises(NotFoundError):
            await work
    assert server.service.context.stats.corrupt == 0


@on_a_loop
async def test_a_client_that_goes_while_its_prefix_is_read_leaves_no_lease(server: Server) -> None:
    tokens = await save_all(server, "c", 1)
    after = server.restart()
    after.engine.promote_gate.shut()
    serving = asyncio.ensure_future(after.serve([*tokens, 5], Tag("c"), rid="r"))
    while not after.service.context.stats.held_requests:
        await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert after.engine.abandoned == ["r"]
    assert after.service.gate.holding == 0
    after.engine.promote_gate.open.set()
    after.stop()


@on_a_loop
async def test_a_request_is_held_once_for_all_it_waits_for(server: Server) -> None:
    """One that has waited for its recorded tokens does not wait as long again for its state."""
    tokens = await save_all(server, "c", 1)
    after = server.restart(snapshot_promote_timeout=0.2)
    gate, stats = after.service.gate, after.service.context.stats
    never = asyncio.get_running_loop().create_future()
    with pytest.raises(DeadlineError):
        await gate.in_time(never)
    assert gate.holding == 0
    prompt = to_tokens([*tokens, 5])
    await gate.admit(RunningRequest("r", prompt, waited=0.2))
    assert after.engine.promoted == []
    assert (stats.hold_timeouts, stats.hold_failures) == (1, 0)
    await gate.admit(RunningRequest("s", prompt, waited=0.0))
    assert len(after.engine.promoted) == 1
    after.stop()


@pytest.mark.parametrize(
    "error", [RamTierFullError("full"), SnapshotCorruptError("damaged"), RuntimeError("a bug")]
)
@on_a_loop
async def test_a_prefix_that_fails_costs_the_hit_and_never_the_request(
    server: Server, error: Exception
) -> None:
    tokens = await save_all(server, "c", 1)
    after = server.restart()
    after.engine.promote_error = error
    await after.serve([*tokens, 5], Tag("c"))
    stats = after.service.context.stats
    assert (stats.hold_timeouts, stats.hold_failures) == (0, 1)
    assert str(error) in stats.last_failures[0]
    assert (await after.service.save(tenant="", conversation_id="c")).turn_number == 2
    after.stop()


@on_a_loop
async def test_no_request_waits_twice_for_a_damaged_boundary(server: Server) -> None:
    tokens = await save_all(server, "c", 2)
    after = server.restart()
    after.engine.promote_error = SnapshotCorruptError("damaged")
    prompt = to_tokens([*tokens, 5])
    await after.service.gate.admit(RunningRequest("first", prompt))
    await after.service.gate.admit(RunningRequest("second", prompt))
    await after.service.gate.admit(RunningRequest("third", prompt))
    assert len(after.engine.promoted) == 2, "one for each of the two boundaries"
    assert after.service.context.stats.hold_failures == 1
    assert after.service.context.stats.held_requests == 1
    after.stop()


@on_a_loop
async def test_an_earlier_state_serves_where_a_later_one_is_damaged(server: Server) -> None:
    tokens = await save_all(server, "c", 3)
    rows = await server.service.list("", "c")
    chains = [server.store.get_manifest(row.snapshot_id).segments[0] for row in rows]
    after = server.restart()
    for chain in chains[1:]:
        path = next(after.root.rglob(f"{chain[-1].segment_id}.seg"))
        path.write_bytes(path.read_bytes()[:-1])
    await after.service.gate.admit(RunningRequest("next", to_tokens([*tokens, 5])))
    asked = [promoted["chains"][0][-1].end for promoted in after.engine.promoted]
    assert asked == [chain[-1].end for chain in reversed(chains)]
    assert chains[1][-1].segment_id in after.service.context.stats.last_failures[0]
    assert after.engine.abandoned == []
    after.stop()


@on_a_loop
async def test_a_prefix_removed_while_it_is_read_is_not_called_damaged(server: Server) -> None:
    """Another conversation has stored the same tokens by itself: its bytes are as good."""
    tokens = await save_all(server, "first", 1)
    server.engine.durable.clear()
    await server.service.gate.admit(RunningRequest("again", to_tokens(tokens[:4]), Tag("second")))
    server.engine.computed(tokens)
    server.service.gate.finished("again", tokens[4:])
    await server.service.save(tenant="", conversation_id="second")
    after = server.restart()
    after.engine.promote_gate.shut()
    request = RunningRequest("next", to_tokens([*tokens, 5]))
    admitting = asyncio.ensure_future(after.service.gate.admit(request))
    while not after.engine.promoted:
        await asyncio.sleep(0)
    await after.service.delete(await newest(after, "second"))
    after.engine.promote_gate.open.set()
    await admitting
    assert after.service.context.stats.hold_failures == 0
    kept = after.store.get_manifest((await newest(after, "first")).snapshot_id)
    assert [p["chains"][0][-1] == kept.segments[0][-1] for p in after.engine.promoted] == [
        False,
        True,
    ]
    after.stop()


@on_a_loop
async def test_a_rid_and_a_conversation_that_do_not_belong_together(server: Server) -> None:
    await server.chat("c")
    saved = await server.service.save(tenant="", conversation_id="c")
    rid = server.catalog.get(saved.snapshot_id).rid
    found = await server.service.find(tenant="", rid=rid, conversation_id="c")
    assert found.snapshot_id == saved.snapshot_id
    with pytest.raises(NotFoundError, match="'c', not of 'd'"):
        await server.service.find(tenant="", rid=rid, conversation_id="d")


@on_a_loop
async def test_without_auto_restore_nothing_is_brought(server: Server) -> None:
    tokens = await save_all(server, "c", 1)
    after = server.restart(snapshot_auto_restore=False)
    await after.serve([*tokens, 5], Tag("c"))
    assert after.engine.promoted == []
    assert (await after.service.save(tenant="", conversation_id="c")).turn_number == 2
    after.stop()


@on_a_loop
async def test_what_is_saved_is_found_without_a_restart_and_gone_when_deleted(
    server: Server,
) -> None:
    tokens = await save_all(server, "c", 1)
    request = RunningRequest("r", to_tokens([*tokens, 5]))
    await server.service.gate.admit(request)
    assert len(server.engine.promoted) == 1
    await server.service.delete(await newest(server))
    await server.service.gate.admit(request)
    assert len(server.engine.promoted) == 1


@on_a_loop
async def test_pages_longer_than_a_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server.start(
        tmp_path_factory.mktemp("paged") / "store", Random(7), fields={"page_size": 4}
    )
    tokens = await server.chat("c")  # 7 tokens, the last one pending: a boundary at 4
    saved = await server.service.save(tenant="", conversation_id="c")
    assert (saved.token_count, saved.recompute_tokens) == (4, 3)
    assert (await server.service.tokens(await newest(server))).tolist() == tokens
    await server.service.gate.admit(RunningRequest("r", to_tokens([*tokens, 5])))
    assert len(server.engine.promoted) == 1
    server.stop()


@on_a_loop
async def test_the_counters_are_all_there(server: Server) -> None:
    await save_all(server, "c", 1)
    stats = await server.service.stats()
    assert stats["service"]["saves"] == 1
    assert [rank["rank"] for rank in stats["ranks"]] == [0, 1]
    assert stats["stored_boundaries"] == 1


@on_a_loop
async def test_a_salted_conversation_is_not_continued_without_its_salt(server: Server) -> None:
    """The generation would stand on other page keys: nothing would be cached, silently."""
    tokens = await save_all(server, "c", 1)
    salted = server.engine.page_keys(to_tokens(tokens[:-1]), 1, None, "secret")[-1]
    row = replace(await newest(server), boundary_key=salted)
    assert (await server.service.restore(row)).token_count == len(tokens) - 1
    with pytest.raises(UnsupportedError, match="cache_salt"):
        await server.service.restore(row, Continuation([3], {"max_new_tokens": 1}))
    assert server.engine.generated == []


@on_a_loop
async def test_two_tenants_may_give_one_id(server: Server) -> None:
    """Requests find what is stored of either, until it is removed."""
    service, index = server.service, server.service.context.boundaries
    talks = {}
    for tenant in ("", "t"):
        talks[tenant] = await server.chat("a", 1, tenant=tenant)
        await service.save(tenant=tenant, conversation_id="a", snapshot_id="same")
    index = service.context.boundaries
    keys = {
        tenant: server.engine.page_keys(to_tokens(tokens), 1, None, None)
        for tenant, tokens in talks.items()
    }
    assert [index.longest(keys[tenant], 1) is not None for tenant in talks] == [True, True]
    again = BoundaryIndex(index.namespace)
    for name, found in server.catalog.boundary_keys(index.namespace).items():
        again.fill(name, found)
    for tenant in talks:
        for one in (index, again):
            assert one.longest(keys[tenant], 1) is not None
    await service.delete(await service.get("", "same"))
    assert [index.longest(keys[tenant], 1) is not None for tenant in talks] == [False, True]
    await service.delete(await service.get("t", "same"))
    assert not len(index)


@on_a_loop
async def test_a_boundary_that_not_every_rank_has_leaves_an_earlier_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without states, ranks may have cut rows at different places."""
    tokens = await save_all(server, "c", 2)
    rows = await server.service.list("", "c")
    chains = server.catalog.chains

    def missing(namespace: str, world_size: int, key: str) -> list[list[SegmentRef]]:
        if key == rows[-1].boundary_key:
            raise NotFoundError("no snapshot holds it")
        return chains(namespace, world_size, key)

    monkeypatch.setattr(server.catalog, "chains", missing)
    server.engine.forget()
    await server.serve([*tokens, 1], Tag("other"))
    assert server.service.context.stats.hold_failures == 0
    [promoted] = server.engine.promoted
    assert {chain[-1].key for chain in promoted["chains"]} == {rows[0].boundary_key}
