"""`EngramClient` and `AsyncEngramClient` against the server's own routes, over real HTTP."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import engram
from engram.client import (
    AsyncConversation,
    AsyncEngramClient,
    Conversation,
    EngramClient,
    calls,
    talking,
)
from engram.client.binding import Awaiting, Blocking, Place
from engram.client.exchange import Call
from engram.client.results import SnapshotSummary
from engram.errors import (
    AlreadyExistsError,
    InvalidIdError,
    InvalidRequestError,
    NotFoundError,
    PinBudgetError,
    RamTierFullError,
    ServerUnreachableError,
    UpstreamError,
)
from repository import ROOT
from unit.client.live import Live


def test_a_conversation_from_save_to_delete(live: Live, client: EngramClient) -> None:
    tokens = live.chat("c", turns=2)
    chat = client.conversation("c")
    saved = chat.save()
    assert (saved.turn_number, saved.token_count, saved.recompute_tokens) == (2, len(tokens) - 1, 1)
    assert (saved.durability, saved.branch_name) == ("sync", "main")
    assert chat.save(turn=1).turn_number == 1
    info = chat.info(turn=2)
    assert (info.snapshot_id, info.fill_ids) == (saved.snapshot_id, tokens)
    assert info.layer_config.num_layers == 4
    restored = chat.restore(turn=1)
    assert (restored.turn_number, restored.verified, restored.rid) == (1, True, None)
    assert [one.turn_number for one in chat.snapshots().snapshots] == [2, 1]
    assert chat.details().snapshots == 2
    assert client.delete_snapshot(saved.snapshot_id).snapshot_id == saved.snapshot_id
    assert chat.delete().snapshots == 1
    with pytest.raises(NotFoundError) as caught:
        chat.info()
    assert caught.value.details["conversation_id"] == "c"
    assert caught.value.details["status"] == 404


def test_a_restore_that_generates(live: Live, client: EngramClient) -> None:
    tokens = live.chat("c")
    chat = client.conversation("c")
    chat.save()
    found = chat.restore(
        continuation_ids=[5, 6], max_new_tokens=4, sampling_params={"temperature": 0}
    )
    assert live.server.engine.generated[-1]["input_ids"] == [*tokens, 5, 6]
    assert found.output_ids is not None
    assert len(found.output_ids) == 4
    assert found.rid is not None


def test_a_branch_and_its_tree(live: Live, client: EngramClient) -> None:
    live.chat("c", turns=3)
    chat = client.conversation("c")
    names = [chat.save(turn=turn).snapshot_id for turn in (1, 2, 3)]
    branch = chat.branch("other", turn=2)
    assert isinstance(branch, Conversation)
    assert (branch.id, branch.branch_name) == ("c", "other")
    assert branch.info().turn_number == 2
    tree = chat.tree()
    assert [one.snapshot_id for one in tree.children(None)] == [names[0]]
    assert [one.snapshot_id for one in tree.children(names[1])] == [
        names[2],
        branch.info().snapshot_id,
    ]
    assert {one.branch_name: one.newest_turn for one in tree.branches} == {"main": 3, "other": 2}
    found = client.compare(names[2], branch.info().snapshot_id)
    assert found.common_tokens == len(branch.info().fill_ids or ())
    assert 0 < found.shared_bytes < found.snapshots[0].bytes
    third = branch.branch("third")
    assert third.info().parent_snapshot == branch.info().snapshot_id
    fork = third.fork("elsewhere")
    assert (fork.id, fork.branch_name, fork.info().turn_number) == ("elsewhere", "main", 2)
    assert fork.info().fill_ids == third.info().fill_ids


def test_a_long_tree_comes_in_pages(live: Live, client: EngramClient) -> None:
    live.chat("c", turns=5)
    names = [client.save("c", turn_number=turn).snapshot_id for turn in range(1, 6)]
    found, after = [], None
    while True:
        page = client.tree_page("c", limit=2, after=after)
        found.append([one.snapshot_id for one in page.turns])
        after = page.after
        if after is None:
            break
    assert found == [names[:2], names[2:4], names[4:]]
    assert [one.snapshot_id for one in client.tree("c").snapshots] == names


def test_a_tree_is_whole_however_many_pages_it_has(
    live: Live, client: EngramClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.chat("c", turns=5)
    names = [client.save("c", turn_number=turn).snapshot_id for turn in range(1, 6)]
    monkeypatch.setattr(calls.tree_page, "__defaults__", (2, None))
    assert [one.snapshot_id for one in client.tree("c").snapshots] == names

    async def tree() -> list[str]:
        async with AsyncEngramClient(live.url) as client:
            return [one.snapshot_id for one in (await client.conversation("c").tree()).snapshots]

    assert asyncio.run(tree()) == names


def test_lists_come_in_pages(live: Live, client: EngramClient) -> None:
    for name in ("a", "b", "c"):
        live.chat(name)
        client.save(name)
    page = client.list_conversations(limit=2)
    assert [one.conversation_id for one in page.conversations] == ["a", "b"]
    rest = client.list_conversations(limit=2, after=page.after)
    assert [one.conversation_id for one in rest.conversations] == ["c"]
    assert rest.after is None
    found: list[SnapshotSummary] = []
    after = None
    while True:
        snapshots = client.list_snapshots(limit=2, after=after)
        found += snapshots.snapshots
        after = snapshots.after
        if after is None:
            break
    assert [one.conversation_id for one in found] == ["a", "b", "c"]


def test_a_file_of_a_snapshot_is_taken_as_another_conversation(
    live: Live, client: EngramClient, tmp_path: Path
) -> None:
    tokens = live.chat("c")
    name, file = client.save("c").snapshot_id, tmp_path / "c.engram"
    done = client.export_snapshot(name, file)
    assert (done.path, done.bytes) == (file, file.stat().st_size)
    taken = client.import_snapshots(file, conversation_id="copy")
    assert [one.conversation_id for one in taken.snapshots] == ["copy"]
    assert (taken.new_bytes, taken.bytes > 0) == (0, True)
    assert client.find_snapshot("copy").fill_ids == tokens
    assert client.restore_snapshot(taken.snapshots[0].snapshot_id).verified

    async def again() -> None:
        async with AsyncEngramClient(live.url) as client:
            copy = tmp_path / "again.engram"
            assert (await client.export_snapshot(name, copy)).bytes == done.bytes
            assert copy.read_bytes() == file.read_bytes()
            found = await client.import_snapshots(copy, conversation_id="third")
            assert found.snapshots[0].conversation_id == "third"
            generated = await client.restore_snapshot(name, continuation_ids=[5], max_new_tokens=2)
            assert generated.output_ids is not None

    asyncio.run(again())
    assert live.server.engine.generated[-1]["input_ids"] == [*tokens, 5]
    assert sorted(tmp_path.glob(".*")) == []


def test_files_that_cannot_be_used(live: Live, client: EngramClient, tmp_path: Path) -> None:
    live.chat("c")
    name, file = client.save("c").snapshot_id, tmp_path / "c.engram"
    file.write_bytes(b"mine")
    with pytest.raises(AlreadyExistsError) as taken:
        client.export_snapshot(name, file)
    assert taken.value.hint
    with pytest.raises(NotFoundError):
        client.export_snapshot("nobody", file, replace=True)
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        client.export_snapshot(name, tmp_path / "none" / "x")
    assert file.read_bytes() == b"mine"
    with pytest.raises(InvalidRequestError) as refused:
        client.import_snapshots(file)
    assert refused.value.details["status"] == 422
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        client.import_snapshots(tmp_path / "none")
    client.export_snapshot(name, file, replace=True)
    with pytest.raises(AlreadyExistsError):
        client.import_snapshots(file)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["c.engram"]


def test_a_file_whose_end_never_comes_is_not_there(tmp_path: Path) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            yield b"half of it"
            raise httpx.ReadError("the line is dead", request=request)

        return httpx.Response(200, content=body())

    with (
        EngramClient("http://x", transport=httpx.MockTransport(broken)) as client,
        pytest.raises(ServerUnreachableError),
    ):
        client.export_snapshot("s", tmp_path / "s.engram")
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_every_route_has_a_method() -> None:
    """All but those that another route of the fork's or of the resources says as well."""
    place = Place("c0")
    made: list[Call[Any]] = [
        calls.save("c0"),
        calls.restore("c0"),
        calls.find_snapshot("c0"),
        calls.list_snapshots(),
        calls.get_snapshot("s0"),
        calls.delete_snapshot("s0"),
        calls.update_snapshot("s0", pinned=True),
        calls.restore_snapshot("s0"),
        calls.branch("s0", branch_name="b"),
        calls.compare("s0", "s1"),
        calls.exported("s0"),
        calls.import_snapshots("file"),
        calls.list_conversations(),
        calls.get_conversation("c0"),
        calls.delete_conversation("c0"),
        calls.set_priority("c0", 1),
        calls.tree_page("c0"),
        talking.send(place, "a"),
        talking.regenerate(place),
        talking.extend(place),
        calls.create_prefix("n0", text="a"),
        calls.list_prefixes(),
        calls.get_prefix("n0"),
        calls.delete_prefix("n0"),
        calls.explain("r0"),
        calls.tiers(),
        calls.health(),
        calls.promote("c0"),
        calls.demote("c0"),
        calls.pin("c0"),
        calls.unpin("c0"),
    ]
    names = {"c0": "conversation_id", "s0": "snapshot_id", "n0": "name", "r0": "rid"}
    found = set()
    for call in made:
        path = "/".join(f"{{{names[p]}}}" if p in names else p for p in call.path.split("/"))
        found.add(f"{call.method} {path}")
    same = {"POST /v1/snapshots", "POST /list_snapshots", "POST /delete_snapshot"}
    # Those that the document has are those that there are: unit/docs/test_reference.py.
    page = (ROOT / "docs" / "http-api.md").read_text()
    routes = set(re.findall(r"^## ((?:POST|GET|PATCH|DELETE) \S+)$", page, re.MULTILINE))
    assert found == routes - same


def test_what_may_change_of_a_snapshot(live: Live, client: EngramClient) -> None:
    live.chat("c")
    name = client.save("c").snapshot_id
    assert client.update_snapshot(name, pinned=True, user_metadata={"a": [1]}).pinned
    assert client.update_snapshot(name, expires_at=5.0).expires_at == 5.0
    changed = client.update_snapshot(name, expires_at="never")
    assert (changed.expires_at, changed.pinned, changed.user_metadata) == (None, True, {"a": [1]})
    assert client.conversation("c").set_priority(70).priority == 70
    assert client.get_conversation("c").priority == 70


def test_prefixes(client: EngramClient) -> None:
    made = client.create_prefix("tale", text="Once upon a time")
    assert (made.name, made.token_count, made.usable) == ("tale", 16, True)
    assert client.get_prefix("tale") == made
    client.create_prefix("ids", input_ids=[1, 2, 3])
    assert [one.name for one in client.list_prefixes().prefixes] == ["ids", "tale"]
    assert client.delete_prefix("tale").name == "tale"
    with pytest.raises(NotFoundError):
        client.get_prefix("tale")


def test_memory(live: Live, client: EngramClient) -> None:
    live.chat("c")
    client.save("c")
    chat = client.conversation("c")
    assert chat.pin().resident
    tiers = client.tiers()
    assert [one.conversation_id for one in tiers.vram.pins] == ["c"]
    assert (tiers.disk.snapshots, tiers.disk.conversations) == (1, 1)
    assert chat.unpin().unpinned
    assert client.promote("c").source_tier == "disk"
    assert client.demote("c").snapshots == 1
    assert client.health()["service"]["saves"] == 1


def test_errors_are_those_of_the_server(live: Live, client: EngramClient) -> None:
    live.chat("c", turns=2)
    client.save("c", turn_number=1, snapshot_id="one")
    with pytest.raises(AlreadyExistsError) as taken:
        client.save("c", turn_number=2, snapshot_id="one")
    assert taken.value.hint
    live.server.engine.pin_error = PinBudgetError("too much", details={"needed": 3, "budget": 2})
    with pytest.raises(PinBudgetError) as budget:
        client.pin("c")
    assert budget.value.message == "too much"
    assert budget.value.details == {"needed": 3, "budget": 2, "status": 409}
    with pytest.raises(InvalidRequestError) as wrong:
        client.list_conversations(limit=0)
    assert wrong.value.details["field"] == "limit"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a?b=c", "ä", "a\nb"])
def test_what_is_no_id_is_never_sent(client: EngramClient, name: str) -> None:
    with pytest.raises(InvalidIdError):
        client.conversation(name)
    with pytest.raises(InvalidIdError):
        client.get_snapshot(name)
    with pytest.raises(InvalidIdError):
        client.delete_conversation(name)
    with pytest.raises(InvalidIdError):
        client.compare("a", name)


def test_a_route_that_is_not_there(client: EngramClient) -> None:
    with pytest.raises(UpstreamError) as caught:
        client.conversation("c").send("hello")
    assert caught.value.details["status"] == 404
    assert "--enable-snapshot-persistence" in caught.value.hint


def test_nobody_answers() -> None:
    with EngramClient("http://127.0.0.1:1") as client, pytest.raises(ServerUnreachableError) as no:
        client.tiers()
    assert "http://127.0.0.1:1" in no.value.message
    assert no.value.hint


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://x", "http://[", ""])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ServerUnreachableError):
        EngramClient(url).tiers()


def test_texts_of_tokens(client: EngramClient) -> None:
    assert client.texts([[1, 2], [], [3]]) == ["<1><2>", "", "<3>"]
    with pytest.raises(InvalidRequestError):
        client.texts([])


def test_the_same_for_asyncio(live: Live) -> None:
    tokens = live.chat("c", turns=2)

    async def talk() -> None:
        async with AsyncEngramClient(live.url) as client:
            chat = client.conversation("c")
            await asyncio.gather(chat.save(turn=1), chat.save(turn=2))
            branch = await chat.branch("other", turn=1)
            assert isinstance(branch, AsyncConversation)
            assert (await branch.info()).turn_number == 1
            assert (await chat.info()).fill_ids == tokens
            assert len((await client.list_snapshots("c")).snapshots) == 3
            with pytest.raises(NotFoundError):
                await client.get_snapshot("nobody")
            assert (await chat.delete()).snapshots == 3

    asyncio.run(talk())


def methods(kind: type, *wrappers: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") and (isinstance(value, wrappers) or inspect.isfunction(value))
    }


@pytest.mark.parametrize(
    ("one", "other"), [(EngramClient, AsyncEngramClient), (Conversation, AsyncConversation)]
)
def test_both_clients_have_the_same_methods(one: type, other: type) -> None:
    blocking, awaiting = methods(one, Blocking), methods(other, Awaiting)
    assert set(blocking) == set(awaiting)
    assert all(method.__doc__ for method in (*blocking.values(), *awaiting.values()))
    made = {
        name: (blocking[name]._make, awaiting[name]._make)
        for name in blocking
        if isinstance(blocking[name], Blocking)
    }
    assert len(made) > 10
    assert all(mine is theirs for mine, theirs in made.values())


def test_a_method_shows_its_own_parameters(client: EngramClient) -> None:
    send = client.conversation("c").send
    assert list(inspect.signature(send).parameters) == ["message", "from_turn", "options"]
    assert inspect.signature(client.tiers).return_annotation == "Tiers"
    assert (send.__name__, send.__doc__) == ("send", type(client.conversation("c")).send.__doc__)


def test_importing_engram_is_light() -> None:
    code = (
        "import sys, engram; loaded = set(sys.modules);"
        "assert not loaded & {'httpx', 'pydantic', 'torch', 'sglang'}, loaded;"
        "engram.EngramClient, engram.AsyncEngramClient, engram.SnapshotManager;"
        "assert not set(sys.modules) & {'torch', 'sglang', 'fastapi', 'numpy'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"EngramClient", "AsyncEngramClient", "SnapshotManager"} <= set(engram.__all__)


def test_a_full_ram_tier_is_told_with_a_moment_to_come_back(live: Live) -> None:
    live.chat("c")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            live.server.engine.promote_error = None

    with EngramClient(live.url, sleep=sleep) as client:
        client.save("c")
        live.server.engine.promote_error = RamTierFullError("no room")
        assert client.restore("c").verified
    assert waits == [1.0, 1.0]


@pytest.mark.parametrize(
    "said", ["\ud800", {"role": "user", "n": float("nan")}, {"role": object()}]
)
def test_what_no_json_can_say_is_refused_on_this_side(
    live: Live, client: EngramClient, said: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be written as JSON"):
        client.conversation("c").send(said)

    async def asked() -> None:
        async with AsyncEngramClient(live.url) as other:
            await other.conversation("c").send(said)

    with pytest.raises(InvalidRequestError, match="cannot be written as JSON"):
        asyncio.run(asked())
