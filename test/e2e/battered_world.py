"""A server that many clients were at when it was killed, and again when its scheduler died,
and whose files were damaged after that."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from e2e.helpers import Client
from e2e.small_world import two_turns
from e2e.worlds import CONTRACT, FLOAT32, Stage, World, fresh, save_and_peek, start
from engram.snapshot.listing import manifest_name
from engram.store.layout import Layout
from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.storm import Storm
from engram.testing.tamper import DAMAGES, read_manifest, rename_namespace, shard_of
from faults.serving import kill_again_and_again

ROOMY = (
    *CONTRACT,
    "--skip-server-warmup",
    *("--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--max-warm-memory-gb", "0.5"),
    # What one test restores is not held for long in another one.
    *("--conversation-active-timeout", "5"),
)
KILLS = 1
"""Of the whole server, as `scripts/test --faults` does 50 times."""
CLIENTS, CONVERSATIONS, SAVES = 8, 10, 40
END_S = 60.0
"""Until a server whose scheduler was killed has ended by itself."""

OTHER_SETTINGS: dict[str, Any] = {
    "model.weights": "0" * 64,
    "model.config": "1" * 64,
    "model.dtype": "torch.bfloat16",
    "page_size": 64,
    "tp_size": 2,
    "format": 2,
    "pool.k.1": "BF16[2, 16]",
    "pool.ssm.0": "BF16[4, 8, 16]",
}
"""Fields of the namespace, each with a value that another server would have."""


@dataclass(frozen=True)
class Wound:
    """A file of one conversation's newest snapshot, what happens to it, and when."""

    file: str
    damage: str
    when: str

    @property
    def conversation(self) -> str:
        return f"{self.file}-{self.damage}-{self.when}"


FILES = ("rows", "state", "manifest")
WOUNDS = [
    Wound(file, damage, when)
    for file in FILES
    for damage in DAMAGES
    for when in ("before", "running")
    # Only a file that is listed with its time can tell the two apart, and only at the start.
    if damage != "rotted" or (file, when) == ("manifest", "before")
]


def battered_world(stage: Stage, folder: Path) -> World:
    """Record; storm and kill; storm and kill the scheduler alone; damage; start."""
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    world = start(stage.server(folder, ROOMY, store=store, env=FLOAT32), store)
    for wound in WOUNDS:
        _record(world.client, numbers, world, wound.conversation)
        if wound.file != "manifest":
            world.client.save(conversation_id=wound.conversation, turn_number=1)
    for field in OTHER_SETTINGS:
        _record(world.client, numbers, world, of_setting(field))
    world.facts["deaths"] = kill_again_and_again(world.server, numbers, KILLS)
    world.facts["storm"] = storm_until_the_scheduler_dies(world.server, numbers)
    world.facts["ended"] = _ended_by_itself(world.server)
    world.server.kill()

    for field, value in OTHER_SETTINGS.items():
        saved = world.cases[of_setting(field)].saved
        rename_namespace(store, saved["snapshot_id"], **{field: value})
    for wound in WOUNDS:
        if wound.when == "before":
            wound_file(world, wound)
    Layout(store).marker.write_bytes(b"{")
    Layout(store).lock.write_bytes(b"\xff" * 300)
    world.server.start()
    world.facts["health"] = health(world)
    return world


def wound_file(world: World, wound: Wound) -> Path:
    """Damage the file; where it was."""
    layout = Layout(world.store)
    snapshot_id = world.cases[wound.conversation].saved["snapshot_id"]
    manifest = read_manifest(world.store, snapshot_id)
    if wound.file == "manifest":
        path = layout.manifest(manifest_name(snapshot_id, ""))
    else:
        first, *_, state = manifest.segments[0]
        ref = first if wound.file == "rows" else state
        path = layout.segment(shard_of(manifest), ref.segment_id)
        # Both turns stand on the first rows; without the newer state there is the older one.
        world.facts[wound.conversation] = (path, 0 if wound.file == "rows" else first.end)
    world.facts.setdefault(wound.conversation, (path, 0))
    DAMAGES[wound.damage](path)
    return path


def health(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.client.http.get("/v1/memory/health").json()
    return found


def storm_until_the_scheduler_dies(server: ServerProcess, numbers: random.Random) -> Storm:
    storm = Storm(server.url, numbers, clients=CLIENTS, conversations=CONVERSATIONS, saves=SAVES)
    clients = threading.Thread(target=storm.run, kwargs={"until_killed": True})
    clients.start()
    storm.enough.wait()
    scheduler_of(server).kill()
    clients.join(END_S)
    assert not clients.is_alive(), "a client waits for a server whose scheduler is dead"
    return storm


def scheduler_of(server: ServerProcess) -> psutil.Process:
    """The scheduler's process: SGLang names it so."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    [scheduler] = [c for c in children if "scheduler" in " ".join(c.cmdline())]
    return scheduler


def _ended_by_itself(server: ServerProcess) -> bool:
    assert server.process is not None
    deadline = time.monotonic() + END_S
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return server.process.poll() is not None


def _record(client: Client, numbers: random.Random, world: World, name: str) -> None:
    world.cases[name] = save_and_peek(client, numbers, name, two_turns(client, numbers, name))


def of_setting(field: str) -> str:
    """The conversation whose snapshot was made under another value of a setting."""
    return f"other-{field}"
