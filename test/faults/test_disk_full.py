"""A disk that fills up in the middle of traffic: serving goes on, and saves work again after."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engram.testing.samples import seeded_random
from engram.testing.server import ServerProcess
from engram.testing.storm_turns import NEW_TOKENS, TOKENS
from engram.testing.tiny_model import write_tiny_model
from faults.serving import ARGS, ENVIRONMENT
from refusals import refusal

DISK_BYTES = 8 << 20
STREAMS = 3
MOST = 400
TIMEOUT_S = 120.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB. Mounting one needs root; what a fault makes of it is in
    `test/e2e/test_slow_store.py`, which needs nothing."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Traffic:
    """Clients that ask without end; every reply must be complete."""

    def __init__(self, url: str, numbers: random.Random) -> None:
        self.replies = 0
        self.failures: list[str] = []
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(url, random.Random(numbers.getrandbits(32))))
            for _ in range(STREAMS)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def go_on(self) -> None:
        """Return when more replies have come. Raises AssertionError if one was not whole."""
        before = self.replies
        while self.replies < before + STREAMS and not self.failures:
            self._end.wait(0.05)
        assert self.failures == []

    def _ask(self, url: str, numbers: random.Random) -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
            while not self._end.is_set():
                response = http.post("/generate", json=_body(numbers))
                if response.status_code != 200 or len(response.json()["output_ids"]) != NEW_TOKENS:
                    self.failures.append(response.text)
                    return
                self.replies += 1


def _body(numbers: random.Random, **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return {"input_ids": numbers.choices(TOKENS, k=40), "sampling_params": params, **fields}


def _save_until_full(
    http: httpx.Client, numbers: random.Random
) -> tuple[list[str], httpx.Response]:
    """The conversations that were saved, and the answer to the first that was not."""
    saved = []
    for number in range(MOST):
        name = f"talk-{numbers.getrandbits(32)}-{number}"
        http.post("/generate", json=_body(numbers, conversation_id=name)).raise_for_status()
        response = http.post("/save_snapshot", json={"conversation_id": name})
        if response.status_code != 200:
            return saved, response
        saved.append(name)
    raise AssertionError("the disk does not fill up")


def _restore(http: httpx.Client, names: list[str]) -> None:
    for name in names:
        restored = http.post("/restore_snapshot", json={"conversation_id": name})
        assert restored.status_code == 200, restored.text
        assert restored.json()["verified"] is True


@pytest.mark.timeout(1800)
def test_a_full_disk_stops_saves_and_nothing_else(tmp_path: Path, small_disk: Path) -> None:
    numbers = seeded_random()
    model = write_tiny_model(tmp_path / "model", seed=1)
    store = small_disk / "snapshots"
    server = ServerProcess(
        model,
        [*ARGS, "--snapshot-dir", str(store)],
        ENVIRONMENT,
        tmp_path / "server.log",
        timeout=600,
    )
    with server, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http:
        with Traffic(server.url, numbers) as traffic:
            saved, refused = _save_until_full(http, numbers)
            traffic.go_on()
            assert refused.status_code == 507, refused.text
            answer = refusal(refused)
            assert answer["error"] == "store_full"
            assert answer["details"]["needed"] > 0
            assert answer["details"]["free"] is not None
            assert answer["hint"]

            # To the last byte, by somebody else.
            filler = small_disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            again = http.post("/save_snapshot", json={"conversation_id": _new(http, numbers)})
            assert again.status_code == 507, again.text
            traffic.go_on()
            _restore(http, saved)
            assert not list(store.rglob("*.tmp")), "a save that failed leaves no part of a file"

            # Room is made by deleting snapshots alone.
            gone, kept = saved[: len(saved) // 2], saved[len(saved) // 2 :]
            for name in gone:
                deleted = http.post(
                    "/delete_snapshot", json={"conversation_id": name, "turn_number": 1}
                )
                assert deleted.status_code == 200, deleted.text
            name = _new(http, numbers)
            works = http.post("/save_snapshot", json={"conversation_id": name})
            assert works.status_code == 200, works.text
            traffic.go_on()
        kept.append(name)
        server.kill()
        server.start()
        _restore(http, kept)
        for name in gone:
            assert http.post("/list_snapshots", json={"conversation_id": name}).status_code == 404
    print(f"{len(saved)} saved before the disk was full, {len(kept)} restored")  # noqa: T201


def _new(http: httpx.Client, numbers: random.Random) -> str:
    """A conversation of one turn that is not saved."""
    name = f"new-{numbers.getrandbits(32)}"
    http.post("/generate", json=_body(numbers, conversation_id=name)).raise_for_status()
    return name
