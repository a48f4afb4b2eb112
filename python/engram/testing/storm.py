"""Many clients at once: turns, saves, restores, continuations, aborts and deletions.

Every client knows which tokens its replies must stand on, so each reply is checked to be its
caller's; what was acknowledged as durable is checked by `verify` on a server started afterwards.

    storm = Storm(server.url, seeded_random(), clients=16, conversations=40, saves=200)
    storm.run()
    server.kill()
    server.start()
    print(verify(storm, server.url))

Run the server with `--dtype float32` and SGLANG_MAMBA_CONV_DTYPE=float32: conversations branch
here, and what branches share is compared as close as float32 computes it.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from engram.testing.storm_client import StormClient
from engram.testing.storm_turns import Turn


class Storm:
    """`run` returns when `saves` were acknowledged as durable, or after `end` was called."""

    def __init__(
        self,
        url: str,
        numbers: random.Random,
        *,
        clients: int,
        conversations: int,
        saves: int,
        name: str = "storm",
    ) -> None:
        """Conversations are called `name` and a number."""
        self.url = url
        self.turns: dict[str, list[Turn]] = {f"{name}-{n}": [] for n in range(conversations)}
        self.counts: Counter[str] = Counter()
        self._seeds = [numbers.randrange(2**32) for _ in range(clients)]
        self._wanted = saves
        self._lock = threading.Lock()
        self._end = threading.Event()
        self.enough = threading.Event()

    @property
    def acknowledged(self) -> list[Turn]:
        """Every turn that is durable by word of the server and was not deleted since."""
        found = [turn for turns in self.turns.values() for turn in turns]
        return [turn for turn in found if turn.saved is not None and not turn.deleted]

    @property
    def replies(self) -> list[Turn]:
        """Every turn whose reply is known with its logprobs."""
        return [t for turns in self.turns.values() for t in turns if t.reply is not None]

    def run(self, *, until_killed: bool = False) -> None:
        """Let all clients loose. With `until_killed` they go on past `enough` saves, until the
        server is gone: what they are then told must be an error, and is counted as `cut_off`."""
        with ThreadPoolExecutor(len(self._seeds)) as pool:
            clients = [pool.submit(self._client, seed, until_killed) for seed in self._seeds]
            try:
                for client in clients:
                    client.result()
            finally:
                self._end.set()

    def _client(self, seed: int, until_killed: bool) -> None:
        client = StormClient(self, random.Random(seed))
        try:
            while not self._end.is_set():
                client.act()
                if self.counts["saves"] >= self._wanted:
                    self.enough.set()
                    if not until_killed:
                        return
        except httpx.TransportError:
            if not (until_killed and self.enough.is_set()):
                raise
            self.count("cut_off")
        except BaseException:
            self._end.set()
            self.enough.set()
            raise
        finally:
            client.http.close()

    def count(self, what: str) -> None:
        """One more of something."""
        with self._lock:
            self.counts[what] += 1

    def add(self, turn: Turn) -> None:
        """A client has a complete reply."""
        with self._lock:
            self.turns[turn.conversation].append(turn)
