"""An encrypted store of two ranks, one of which is killed in the middle of a save: exact after it,
closed to other keys, and no key shown.

Two servers, one after the other, and two launches that are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.ranks import (
    CONSENSUS,
    INSTANTS,
    RANKS,
    Torn,
    is_whole_or_not_there,
    kill_a_rank_in_a_save,
)
from e2e.slow_world import faulty_environment
from e2e.talks import GenerateTalk
from e2e.worlds import CONTRACT, QUICK, Case, Stage, World, fresh, save_and_peek, start
from engram.snapshot.segment import MAGIC as CLEAR
from engram.store.encryption import MAGIC
from engram.store.keys import KEY_VARIABLE, Key, new_key, write_key_file
from engram.testing.faults import FaultControl
from engram.testing.samples import seeded_random
from engram.testing.server import ServerError

OPTION = "--snapshot-encryption-key-file"
ARGS = (*CONTRACT, *QUICK, "--tp-size", str(RANKS))


@pytest.fixture(scope="module")
def folder(stage: Stage) -> Path:
    stage.clear()
    return fresh(stage.folder / "encrypted")


@pytest.fixture(scope="module")
def key(folder: Path) -> Key:
    key = new_key()
    write_key_file(folder / "key", key)
    return key


@dataclass(frozen=True)
class Saved:
    """What was acknowledged before the rank was killed, and what was being saved then."""

    case: Case
    torn: Torn


@pytest.fixture(scope="module")
def saved(stage: Stage, folder: Path, key: Key) -> Saved:
    """Saved by a server that read the key from a file, and of which a rank was killed."""
    numbers = seeded_random()
    options, faults = [*ARGS, OPTION, str(folder / "key")], folder / "faults"
    env = {**CONSENSUS, **faulty_environment(faults)}
    world = start(stage.server(folder, options, store=folder / "store", env=env), folder / "store")
    try:
        talk = GenerateTalk()
        for length in (60, 30):
            talk.say(world.client, talk.message(numbers, length), "secret")
        case = save_and_peek(world.client, numbers, "secret", talk)
        assert key_is_nowhere(world, key, own_environment=True)
        torn = kill_a_rank_in_a_save(
            world.server,
            world.client,
            FaultControl(faults),
            numbers,
            "torn",
            numbers.choice(INSTANTS),
        )
    finally:
        world.server.kill()
        world.client.http.close()
    return Saved(case, torn)


@pytest.fixture(scope="module")
def again(stage: Stage, folder: Path, key: Key, saved: Saved) -> Iterator[World]:
    """The next server, which has the key from its environment."""
    env = {**CONSENSUS, KEY_VARIABLE: key.text().strip()}
    server = stage.server(folder, ARGS, store=folder / "store", env=env)
    world = start(server, folder / "store")
    yield world
    world.server.kill()
    world.client.http.close()


def key_is_nowhere(world: World, key: Key, *, own_environment: bool) -> bool:
    """No command line, environment, log or route has it, and no file but the key's own."""
    secret = key.text().split(":")[1].strip()
    assert world.server.process is not None
    leader = world.server.process.pid
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    mine = [pid for pid in pids if group_of(pid) == leader]
    assert len(mine) > RANKS, "each scheduler is another process"
    for pid in mine:
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        if pid != leader or own_environment:
            assert secret.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert secret not in world.server.log_path.read_text()
    assert secret not in world.client.http.get("/server_info").text
    stored = (path for path in world.store.rglob("*") if path.is_file())
    assert not any(secret.encode() in path.read_bytes() for path in stored)
    return True


def group_of(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[2])


def test_every_segment_of_either_rank_is_encrypted(folder: Path, saved: Saved) -> None:
    segments = list((folder / "store").rglob("*.seg"))
    ranks = {part for path in segments for part in path.parts if part.startswith("rank-")}
    assert ranks == {f"rank-{rank}-of-{RANKS}" for rank in range(RANKS)}
    for path in segments:
        data = path.read_bytes()
        assert data.startswith(MAGIC)
        assert CLEAR not in data


@pytest.mark.parametrize("which", ["another key", "no key"])
def test_a_launch_without_the_key_is_refused(
    stage: Stage, folder: Path, saved: Saved, which: str
) -> None:
    before = {path: path.read_bytes() for path in (folder / "store").rglob("*.*")}
    options = [*ARGS]
    if which == "another key":
        write_key_file(folder / "wrong", new_key())
        options += [OPTION, str(folder / "wrong")]
    place = fresh(folder / which)
    server = stage.server(place, options, store=folder / "store")
    message = "does not open this store" if which == "another key" else "no key is given"
    with pytest.raises(ServerError, match=message):
        server.start()
    assert "Traceback" not in server.log_path.read_text()
    assert {path: path.read_bytes() for path in (folder / "store").rglob("*.*")} == before


def test_the_next_turn_is_exact(again: World, saved: Saved, key: Key) -> None:
    case = saved.case
    restored = again.client.restore(conversation_id="secret")
    assert restored["verified"] is True
    assert restored["source_tier"] == "disk"
    assert restored["bytes"] == case.saved["bytes"]
    reply = case.talk.peek(again.client, case.message, None)
    assert reply.cached == case.saved["token_count"]
    assert reply.output == case.reference.output
    once_more = again.client.save(conversation_id="secret")
    assert once_more["token_count"] == case.saved["token_count"]
    assert key_is_nowhere(again, key, own_environment=False)


def test_what_was_being_saved_is_whole_or_not_there(again: World, saved: Saved) -> None:
    assert is_whole_or_not_there(again.client, saved.torn)
