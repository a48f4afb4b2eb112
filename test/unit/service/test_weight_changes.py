"""The service across a change of the engine's weights: asked again, never mistaken."""

from __future__ import annotations

import asyncio

import pytest

from engram.conversation.turns import RunningRequest
from engram.core.tokens import to_tokens
from engram.errors import CaptureLostError, NamespaceChangedError, NamespaceMismatchError
from engram.service.boundaries import BoundaryIndex, StoredBoundary
from unit.service.engine import Server, on_a_loop


async def saved(server: Server, conversation: str) -> list[int]:
    tokens = await server.chat(conversation)
    await server.service.save(tenant="", conversation_id=conversation)
    return tokens


async def restore(server: Server, conversation: str) -> None:
    row = await server.service.find(tenant="", conversation_id=conversation)
    await server.service.restore(row)


async def hit(server: Server, tokens: list[int], rid: str) -> bool:
    """Whether a request with these tokens waited for its stored prefix."""
    before = len(server.engine.promoted)
    await server.service.gate.admit(RunningRequest(rid, to_tokens([*tokens, 1])))
    return len(server.engine.promoted) > before


@on_a_loop
async def test_a_snapshot_of_other_weights_is_refused_until_they_are_back(server: Server) -> None:
    tokens = await saved(server, "c")
    server.engine.change_weights("second")  # nobody has told the service
    with pytest.raises(NamespaceMismatchError) as caught:
        await restore(server, "c")
    assert caught.value.details["field"] == "model"
    assert (caught.value.details["wanted"], caught.value.details["found"]) == ("second", "toy")
    assert not await hit(server, tokens, "r1")
    server.engine.change_weights("toy")
    server.service.context.forget_engine()
    await restore(server, "c")
    assert await hit(server, tokens, "r2")
    assert server.service.context.stats.hold_failures == 0


@on_a_loop
async def test_a_request_across_a_change_is_computed_and_nothing_is_blamed(server: Server) -> None:
    tokens = await saved(server, "c")
    server.engine.change_weights("second")
    assert not await hit(server, tokens, "r")
    stats = server.service.context.stats
    assert (stats.hold_failures, stats.hold_timeouts, stats.last_failures) == (0, 0, [])


@on_a_loop
async def test_a_turn_of_other_weights_is_computed_again_when_it_is_saved(server: Server) -> None:
    await server.chat("c")
    server.engine.change_weights("second")
    result = await server.service.save(tenant="", conversation_id="c")
    assert result.recomputed
    row = server.catalog.get(result.snapshot_id)
    assert row.namespace == server.engine.namespace.id
    await restore(server, "c")


@on_a_loop
async def test_weights_that_change_while_a_turn_is_saved_leave_one_of_the_two(
    server: Server,
) -> None:
    """Manifest and segments always speak of the same namespace."""
    await server.chat("c")
    before = server.engine.namespace.id
    server.engine.persist_gate.shut()
    saving = asyncio.ensure_future(server.service.save(tenant="", conversation_id="c"))
    await server.engine.persist_gate.reached.wait()
    # Its segments are durable, the answer is on its way.
    durable = dict(server.engine.durable)
    server.engine.change_weights("second")
    server.engine.durable = durable
    server.service.context.forget_engine()
    server.engine.persist_gate.open.set()
    row = server.catalog.get((await saving).snapshot_id)
    assert row.namespace == before
    with pytest.raises(NamespaceMismatchError):
        await restore(server, "c")
    server.engine.change_weights("toy")
    server.service.context.forget_engine()
    await restore(server, "c")


@on_a_loop
async def test_weights_that_never_come_to_rest_end_a_save_with_an_error(server: Server) -> None:
    await server.chat("c")

    def restless(namespace: str) -> None:
        server.engine.change_weights(f"{server.engine.namespace.fields['model']}+")
        raise NamespaceChangedError("the weights have changed")

    server.engine.check = restless  # type: ignore[method-assign]
    with pytest.raises(NamespaceChangedError):
        await server.service.save(tenant="", conversation_id="c")
    assert server.service.context.stats.save_failures == 1


@on_a_loop
async def test_a_snapshot_of_other_weights_is_deleted_with_its_files(server: Server) -> None:
    await saved(server, "old")
    server.engine.change_weights("second")
    await saved(server, "new")
    [row] = await server.service.list("", "old")
    assert await server.service.tier(row) == "disk"
    await server.service.delete(row)
    kept = {segment.shard.namespace for segment in server.store.iter_segments()}
    assert kept == {server.engine.namespace.id}
    await restore(server, "new")


@on_a_loop
async def test_a_branch_from_other_weights_is_not_offered_to_requests(server: Server) -> None:
    tokens = await saved(server, "c")
    server.engine.change_weights("second")
    server.service.context.forget_engine()
    await server.service.save(tenant="", conversation_id="c", branch_name="b")
    assert not await hit(server, tokens, "r")
    assert server.service.context.stats.hold_failures == 0


@on_a_loop
async def test_an_engine_that_changes_while_it_is_asked_is_asked_again(server: Server) -> None:
    describe = server.engine.describe

    async def late() -> object:
        info = await describe()
        if server.engine.namespace.fields["model"] == "toy":
            server.engine.change_weights("second")
            server.service.context.forget_engine()
        return info

    server.engine.describe = late  # type: ignore[method-assign,assignment]
    engine = await server.service.context.engine()
    assert engine.namespace == server.engine.namespace


@on_a_loop
async def test_a_capture_that_is_lost_under_the_same_weights_is_still_an_error(
    server: Server,
) -> None:
    tokens = await server.chat("c")
    server.engine.forget()
    server.engine.computed = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(CaptureLostError):
        await server.service.save(tenant="", conversation_id="c")
    assert server.engine.generated[-1]["input_ids"] == tokens[:-1]


def test_a_snapshot_is_counted_once_however_it_comes_into_the_index() -> None:
    index = BoundaryIndex("n")
    index.add(("", "s"), ["a", "b"])
    index.fill(("", "s"), ["a", "b"])
    index.fill(("", "t"), ["a", "c"])
    index.filled()
    index.remove(("", "s"), ["a", "b"])
    assert index.longest(["a", "b"], 1) is not None
    index.remove(("", "t"), ["a", "c"])
    assert len(index) == 0


def test_a_snapshot_that_goes_while_the_index_is_filled_is_not_in_it() -> None:
    index = BoundaryIndex("n")
    index.remove(("", "s"), ["a"])
    index.fill(("", "s"), ["a"])
    assert len(index) == 0
    index.add(("", "s"), ["a"])
    assert len(index) == 1, "the name was used again"


@on_a_loop
async def test_a_namespace_is_described_when_a_snapshot_names_it(server: Server) -> None:
    """Weights that change every few seconds, without a save, leave no files."""
    described = server.store.root / "namespaces"
    for number in range(3):
        server.engine.change_weights(f"runtime-{number}")
        server.service.context.forget_engine()
        await server.service.context.engine()
    assert not list(described.glob("*"))
    await saved(server, "c")
    [path] = described.glob("*")
    assert path.stem == server.engine.namespace.id
    path.unlink()
    again = server.restart(fields={"model": "runtime-2"})
    await again.service.context.engine()
    assert path.exists(), "the snapshot is there, so it is described"
    again.stop()


def test_a_damaged_boundary_is_found_again_as_long_as_a_newer_snapshot_names_it() -> None:
    index = BoundaryIndex("n")
    index.add(("", "first"), ["a", "b"])
    index.forget("b")
    assert index.longest(["a", "b"], 1) == StoredBoundary("a", 1)
    assert len(index) == 1
    index.add(("", "second"), ["a", "b"])
    index.remove(("", "first"), ["a", "b"])
    assert index.longest(["a", "b"], 1) == StoredBoundary("b", 2)
    index.remove(("", "second"), ["a", "b"])
    assert len(index) == 0
