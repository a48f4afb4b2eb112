"""What a stateful request goes on from: the turn, and the tag of the turn it will be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engram.conversation.turns import Tag
from engram.errors import (
    ConversationBusyError,
    InvalidRequestError,
    NamespaceMismatchError,
    NotFoundError,
    UnsupportedError,
)
from engram.service.recorded import Place
from engram.testing.samples import seeded_random
from unit.service.engine import Server, on_a_loop


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server.start(
        tmp_path / "store", seeded_random(), fields={"model.config": "c", "model.weights": "w"}
    )
    yield server
    server.stop()


def tokens(turn: object) -> list[int]:
    found: list[int] = turn.tokens.tolist()  # type: ignore[attr-defined]
    return found


@on_a_loop
async def test_an_unknown_conversation_begins(server: Server) -> None:
    start = await server.service.recorded.start("", "c", None, None)
    assert (start.tag, start.source) == (Tag("c"), None)
    with pytest.raises(NotFoundError):
        await server.service.recorded.start("", "c", None, Place("c"))
    for ask in (server.service.recorded.again, server.service.recorded.further):
        with pytest.raises(NotFoundError):
            await ask(Tag("c"))


@on_a_loop
async def test_the_newest_turn_counts_saved_or_not(server: Server) -> None:
    first = await server.chat("c")
    await server.service.save(tenant="", conversation_id="c")
    second = await server.chat("c", before=first)
    start = await server.service.recorded.start("", "c", None, None)
    assert start.tag == Tag("c")
    assert start.source is not None
    assert (start.source.number, tokens(start.source)) == (2, second)
    earlier = await server.service.recorded.start("", "c", None, Place("c", turn_number=1))
    assert earlier.source is not None
    assert tokens(earlier.source) == first
    row = server.catalog.find("", "c", "main", 1)
    assert earlier.tag == Tag("c", parent_snapshot=row.snapshot_id, after_turn=1)


@on_a_loop
async def test_after_a_restart_the_newest_saved_turn_counts(server: Server) -> None:
    first = await server.chat("c")
    await server.service.save(tenant="", conversation_id="c")
    await server.chat("c", before=first)
    again = server.restart(fields={"model.config": "c", "model.weights": "w"})
    try:
        start = await again.service.recorded.start("", "c", None, None)
        assert start.source is not None
        assert tokens(start.source) == first
        start, prompt = await again.service.recorded.again(Tag("c"))
        assert prompt.tolist() == first[:4]
        assert start.source is not None
        assert start.source.number == 1
    finally:
        again.stop()


@on_a_loop
async def test_a_branch_counts_on_from_where_it_begins(server: Server) -> None:
    first = await server.chat("c")
    second = await server.chat("c", before=first)
    start = await server.service.recorded.start("", "c", "b", None)
    assert start.source is not None
    assert tokens(start.source) == second
    assert (start.tag.branch_name, start.tag.after_turn) == ("b", 2)
    await server.serve([*second, 1], start.tag)
    turn = server.service.context.tracker.find(Tag("c", "b"))
    assert turn is not None
    assert turn.number == 3
    # From then on it is a branch of its own, and main is what it was.
    start = await server.service.recorded.start("", "c", "b", None)
    assert start.source is not None
    assert start.source.number == 3
    assert start.tag == Tag("c", "b")
    main = await server.service.recorded.start("", "c", None, None)
    assert main.source is not None
    assert tokens(main.source) == second


@on_a_loop
async def test_a_branch_of_a_saved_turn_has_it_for_parent(server: Server) -> None:
    first = await server.chat("c")
    saved = await server.service.save(tenant="", conversation_id="c")
    start = await server.service.recorded.start("", "c", "b", Place("c", turn_number=1))
    await server.serve([*first, 1], start.tag)
    made = await server.service.save(tenant="", conversation_id="c", branch_name="b")
    assert made.turn_number == 2
    assert server.catalog.get(made.snapshot_id).parent_snapshot == saved.snapshot_id


@on_a_loop
async def test_a_conversation_begins_at_another_ones_turn_where_that_is_allowed(
    server: Server, tmp_path: Path
) -> None:
    first = await server.chat("c")
    start = await server.service.recorded.start("", "d", None, Place("c", turn_number=1))
    assert start.source is not None
    assert tokens(start.source) == first
    assert (start.tag.conversation_id, start.tag.after_turn) == ("d", 1)
    await server.serve([*first, 1], start.tag)
    with pytest.raises(InvalidRequestError):
        await server.service.recorded.start("", "d", None, Place("c"))
    with pytest.raises(NotFoundError):
        await server.service.recorded.start("", "e", None, Place("nobody"))
    closed = Server.start(tmp_path / "other", server.rng, enable_cross_session_refs=False)
    try:
        await closed.chat("c")
        with pytest.raises(UnsupportedError):
            await closed.service.recorded.start("", "d", None, Place("c"))
    finally:
        closed.stop()


@on_a_loop
async def test_tokens_of_another_model_are_refused(server: Server) -> None:
    await server.chat("c")
    await server.service.save(tenant="", conversation_id="c")
    for fields, wrong in (
        ({"model.config": "c", "model.weights": "other"}, "model.weights"),
        ({"model.config": "other", "model.weights": "w"}, "model.config"),
        ({"model.config": "c", "model.weights": "w", "kv.dtype": "another"}, None),
    ):
        server = server.restart(fields=fields)
        if wrong is None:
            assert (await server.service.recorded.start("", "c", None, None)).source is not None
            continue
        with pytest.raises(NamespaceMismatchError) as refused:
            await server.service.recorded.start("", "c", None, None)
        assert refused.value.details["field"] == wrong
    server.stop()


@on_a_loop
async def test_one_stateful_request_of_a_branch_at_a_time(server: Server) -> None:
    recorded = server.service.recorded
    recorded.hold(Tag("c"))
    recorded.hold(Tag("c", "b"))
    with pytest.raises(ConversationBusyError) as busy:
        recorded.hold(Tag("c"))
    assert busy.value.http_status == 409
    recorded.release(Tag("c"))
    recorded.hold(Tag("c"))
