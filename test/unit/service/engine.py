"""An engine that lives in the test's own process, and a server's service around it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from engram.catalog.catalog import Catalog
from engram.conversation.turns import FinishedRequest, RunningRequest, Tag
from engram.core.canonical import blake3_hex
from engram.core.namespace import Namespace
from engram.core.settings import Settings
from engram.core.tokens import TokenArray, to_tokens, tokens_to_bytes
from engram.errors import (
    CaptureLostError,
    DeadlineError,
    GenerationAbortedError,
    NamespaceChangedError,
)
from engram.service import SnapshotService
from engram.service.ports import (
    Brought,
    Chains,
    EngineInfo,
    Generation,
    Located,
    ResidentSegment,
    Stored,
)
from engram.service.snapshots import RAM_SUMS, VRAM_SUMS
from engram.snapshot.manifest import SegmentRef, rows_of
from engram.snapshot.segment import TOKENS, SegmentHeader, Shard
from engram.store.disk import DiskStore

Test = Callable[..., Coroutine[Any, Any, None]]


def on_a_loop(test: Test) -> Callable[..., None]:
    """Run an async test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


class Gate:
    """A place where a call stops while the gate is shut; counts who has come."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    def shut(self) -> None:
        self.open.clear()
        self.reached.clear()

    async def passed(self) -> None:
        self.reached.set()
        await self.open.wait()


class FakeEngine:
    """Ranks and generator at once: its state is a set of page keys, its segments are real files."""

    def __init__(
        self,
        store: DiskStore,
        rng: Random,
        *,
        page_size: int = 1,
        world_size: int = 2,
        **fields: Any,
    ) -> None:
        self.store = store
        self.rng = rng
        self.namespace = Namespace(
            {"model": "toy", "page_size": page_size, "tp_size": world_size, **fields}
        )
        self.info = EngineInfo(self.namespace, world_size, page_size, 4, "toy", "a toy")
        self.states: set[str] = set()
        self.durable: dict[str, list[list[SegmentRef]]] = {}
        self.promoted: list[dict[str, Any]] = []
        self.abandoned: list[str] = []
        self.warm: list[dict[str, int]] = [{} for _ in range(world_size)]
        self.held: set[str] = set()
        self.pins: dict[str, int] = {}
        self.pin_error: Exception | None = None
        self.located: list[str] = []
        self.generated: list[dict[str, Any]] = []
        self.persist_gate = Gate()
        self.promote_gate = Gate()
        self.abort: str | None = None
        self.promote_error: Exception | None = None
        self.service: SnapshotService | None = None
        self._requests = 0

    def shard(self, rank: int) -> Shard:
        return Shard(self.namespace.id, rank, self.info.world_size)

    def change_weights(self, weights: str) -> None:
        """Other weights: nothing that is in memory is of use any more."""
        self.namespace = Namespace({**self.namespace.fields, "model": weights})
        self.info = replace(self.info, namespace=self.namespace)
        self.states.clear()
        self.durable.clear()

    def computed(self, tokens: Sequence[int]) -> None:
        """A request with these tokens has ended; its last one is pending."""
        keys = self.page_keys(to_tokens(tokens[:-1]), self.info.page_size, None, None)
        if keys:
            self.states.add(keys[-1])

    def forget(self) -> None:
        """Nothing is in memory any more."""
        self.states.clear()

    # ---- Ranks ----

    async def describe(self) -> EngineInfo:
        return self.info

    def check(self, namespace: str) -> None:
        """As a rank does with every message that speaks of stored state."""
        if namespace != self.namespace.id:
            raise NamespaceChangedError("the weights have changed")

    async def locate(
        self, namespace: str, request: FinishedRequest, boundary: int, *, measure: bool = False
    ) -> Located:
        self.check(namespace)
        self.located.append(request.rid)
        key = self._key(request, boundary)
        return Located(boundary, key, self._needed(request.tokens[:boundary]) if measure else None)

    async def persist(self, namespace: str, request: FinishedRequest, boundary: int) -> Stored:
        self.check(namespace)
        key = self._key(request, boundary)
        new = 0
        if key not in self.durable:
            new = await asyncio.to_thread(self._write, request.tokens[:boundary])
        await self.persist_gate.passed()
        chains = tuple(tuple(chain) for chain in self.durable[key])
        return Stored(boundary, chains, sum(r.bytes for c in chains for r in c), new)

    def _needed(self, tokens: TokenArray) -> int:
        """Bytes that `_write` would write."""
        return 0 if self._last_key(tokens) in self.durable else self._write(tokens, dry=True)

    def _last_key(self, tokens: TokenArray) -> str:
        return self.page_keys(tokens, self.info.page_size, None, None)[-1]

    def _key(self, request: FinishedRequest, boundary: int) -> str:
        keys = self.page_keys(request.tokens[:boundary], self.info.page_size, None, None)
        if not keys or (keys[-1] not in self.states and keys[-1] not in self.durable):
            raise CaptureLostError("the state is gone", details={"boundary": boundary})
        return keys[-1]

    def _write(self, tokens: TokenArray, *, dry: bool = False) -> int:
        page = self.info.page_size
        keys = self.page_keys(tokens, page, None, None)
        known = max((n for n, key in enumerate(keys) if key in self.durable), default=-1)
        before = self.durable[keys[known]] if known >= 0 else [[] for _ in self._ranks()]
        start, new = (known + 1) * page, 0
        chains = []
        for rank in self._ranks():
            chain = list(rows_of(before[rank]))
            chain.append(self._put(rank, keys[-1], chain, start, tokens[start:], dry))
            chain.append(self._put(rank, keys[-1], chain, len(tokens), None, dry))
            chains.append(chain)
            new += chain[-1].bytes + chain[-2].bytes
        if not dry:
            self.durable[keys[-1]] = chains
        return new

    def _put(
        self,
        rank: int,
        key: str,
        below: list[SegmentRef],
        start: int,
        tokens: TokenArray | None,
        dry: bool,
    ) -> SegmentRef:
        """Random rows of these tokens, or without them a random state, on top of a chain; if `dry`
        only what would be stored."""
        has_state, count = tokens is None, 0 if tokens is None else len(tokens)
        header = SegmentHeader.plan(
            shard=self.shard(rank),
            key=key,
            start=start,
            end=start + count,
            parent=below[-1].segment_id if below else None,
            has_state=has_state,
            buffers=[("ssm.1", "U8", (1, 16))] if has_state else [("k.0", "U8", (count, 8))],
        )
        segment_id = "0" * 64
        if not dry:
            payload = memoryview(bytearray(self.rng.randbytes(header.payload_length)))
            header.clear_padding(payload)
            if tokens is not None:
                header.view(payload, TOKENS)[:] = tokens_to_bytes(tokens)
            segment_id = self.store.put_segment(header, payload)
        return SegmentRef(
            segment_id=segment_id,
            key=key,
            start=start,
            end=start + count,
            has_state=has_state,
            bytes=header.file_length,
        )

    def _ranks(self) -> range:
        return range(self.info.world_size)

    async def promote(
        self,
        namespace: str,
        chains: Chains,
        *,
        owner: str,
        seconds: float,
        exact: bool,
        timeout: float,
        tokens: TokenArray | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Brought:
        self.check(namespace)
        self.promoted.append({"chains": chains, "owner": owner, "seconds": seconds, "exact": exact})
        if self.promote_error is not None:
            raise self.promote_error
        try:
            await asyncio.wait_for(self.promote_gate.passed(), timeout)
        except asyncio.TimeoutError:
            raise DeadlineError("no answer") from None
        nbytes = await asyncio.to_thread(self._verify, chains)
        self.durable[chains[0][-1].key] = [list(chain) for chain in chains]
        return Brought("disk", nbytes, nbytes, in_vram=False, state_slot=None)

    def _verify(self, chains: Chains) -> int:
        assert len(chains) == self.info.world_size
        return sum(
            self.store.verify_segment(self.shard(rank), ref.segment_id).file_length
            for rank, chain in enumerate(chains)
            for ref in chain
        )

    def abandon(self, owner: str) -> None:
        self.abandoned.append(owner)

    async def tier(self, namespace: str, key: str, tokens: TokenArray) -> str:
        self.check(namespace)
        keys = self.page_keys(tokens, self.info.page_size, None, None)
        assert keys[-1] == key
        return "vram" if key in self.states else "disk"

    async def drop(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> None:
        self.check(namespace)
        for rank, ids in enumerate(segment_ids):
            for segment_id in ids:
                self.store.delete_segment(self.shard(rank), segment_id)
        gone = {segment_id for ids in segment_ids for segment_id in ids}
        for key, chains in list(self.durable.items()):
            if any(ref.segment_id in gone for chain in chains for ref in chain):
                del self.durable[key]

    async def residents(self, namespace: str) -> list[list[ResidentSegment]]:
        self.check(namespace)
        return [
            [ResidentSegment(name, size, name in self.held) for name, size in found.items()]
            for found in self.warm
        ]

    async def demote(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> int:
        self.check(namespace)
        freed = 0
        for found, ids in zip(self.warm, segment_ids, strict=True):
            freed += sum(found.pop(name, 0) for name in ids)
        return freed

    async def pin(
        self, namespace: str, request: FinishedRequest, boundary: int, owner: str
    ) -> bool:
        self.check(namespace)
        keys = self.page_keys(request.tokens[:boundary], self.info.page_size, None, None)
        if self.pin_error is not None:
            raise self.pin_error
        if keys[-1] not in self.states:
            return False
        self.pins[owner] = boundary
        return True

    async def unpin(self, owner: str) -> bool:
        return self.pins.pop(owner, None) is not None

    async def stats(self) -> list[dict[str, Any]]:
        numbers = dict.fromkeys((*VRAM_SUMS, *RAM_SUMS.values()), 1)
        vram = {**numbers, "pinned": list(self.pins)}
        return [{"rank": rank, "replica": 0, **numbers, "vram": vram} for rank in self._ranks()]

    def page_keys(
        self, tokens: TokenArray, page_size: int, extra_key: str | None, cache_salt: str | None
    ) -> list[str]:
        keys = []
        before = f"{extra_key}/{cache_salt}".encode()
        for end in range(page_size, len(tokens) + 1, page_size):
            before = blake3_hex(before + tokens_to_bytes(tokens[end - page_size : end])).encode()
            keys.append(before.decode())
        return keys

    # ---- Generator ----

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        rid: str | None = None,
        tag: Tag | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Generation:
        self._requests += 1
        rid = rid or f"generated-{self._requests}"
        self.generated.append({"input_ids": list(input_ids), "params": dict(sampling_params)})
        assert self.service is not None
        gate = self.service.gate
        await gate.admit(RunningRequest(rid, to_tokens(input_ids), tag, extra_key, cache_salt))
        if self.abort is not None:
            gate.abandoned(rid)
            raise GenerationAbortedError(self.abort)
        output = [self.rng.randrange(2**32) for _ in range(sampling_params["max_new_tokens"])]
        self.computed([*input_ids, *output])
        gate.finished(rid, output)
        return Generation(rid, output, "text", 0, {"id": rid})


@dataclass
class Server:
    """A store, a catalog, an engine and a service over a directory; `restart` is a new process."""

    root: Path
    rng: Random
    settings: Settings
    store: DiskStore
    catalog: Catalog
    engine: FakeEngine
    service: SnapshotService
    requests: int = 0

    @classmethod
    def start(cls, root: Path, rng: Random, **options: Any) -> Server:
        fields = options.pop("fields", {})
        chosen = {"snapshot_trigger_policy": "manual_only", "snapshot_min_interval_seconds": 0.0}
        settings = Settings.model_validate({**chosen, **options})
        store = DiskStore.open(root)
        catalog = Catalog.open(store.catalog_path, store)
        engine = FakeEngine(store, rng, **fields)
        service = SnapshotService(settings, store, catalog, engine, engine)
        engine.service = service
        return cls(root, rng, settings, store, catalog, engine, service)

    def stop(self) -> None:
        self.catalog.close()
        self.store.close()

    def restart(self, **options: Any) -> Server:
        """The process is gone with all its memory; another one starts on the directory."""
        self.stop()
        return Server.start(self.root, self.rng, **{**self.settings.model_dump(), **options})

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2**32) for _ in range(count)]

    async def serve(
        self, prompt: Sequence[int], tag: Tag | None = None, *, rid: str | None = None
    ) -> tuple[str, list[int]]:
        """A request of a client, from admission to its last token: its rid and all its tokens."""
        self.requests += 1
        rid = rid or f"rid-{self.requests}"
        await self.service.gate.admit(RunningRequest(rid, to_tokens(prompt), tag))
        output = self.random_tokens(3)
        self.engine.computed([*prompt, *output])
        self.service.gate.finished(rid, output)
        return rid, [*prompt, *output]

    async def chat(
        self, conversation_id: str, turns: int = 1, before: Sequence[int] = (), **tag: Any
    ) -> list[int]:
        """Turns of a conversation, each on top of the one before; all its tokens."""
        tokens = list(before)
        for _ in range(turns):
            prompt = [*tokens, *self.random_tokens(4)]
            _, tokens = await self.serve(prompt, Tag(conversation_id, **tag))
        return tokens

    def files(self) -> set[tuple[int, str]]:
        """Rank and id of every stored segment."""
        return {(found.shard.rank, found.segment_id) for found in self.store.iter_segments()}
