"""A server without a model: the real service, store, catalog and tiers around computed states.

The bytes of a state are a function of the tokens before it, so whoever knows the tokens of a
snapshot knows every byte that restoring it must bring back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from blake3 import blake3

from engram.catalog.catalog import Catalog
from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import FinishedRequest, RunningRequest, Tag
from engram.core.namespace import Namespace
from engram.core.settings import Settings
from engram.core.tokens import TokenArray, to_tokens, tokens_to_bytes
from engram.errors import CaptureLostError
from engram.service import SnapshotService
from engram.service.collecting import collect_once
from engram.service.ports import (
    Brought,
    Chains,
    EngineInfo,
    Generation,
    Located,
    ResidentSegment,
    Stored,
)
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.store.filesystem import FileSystem
from engram.tiers.base import BufferPlan, Segment
from engram.tiers.health import StateCheck
from engram.tiers.manager import TierManager
from engram.tiers.payload import tokens_of
from engram.tiers.ram import RamTier

RAM_BYTES: Final = 1 << 20
WAIT_S: Final = 60.0
NAMESPACE: Final = Namespace({"model": "computed", "page_size": 1, "tp_size": 1})
INFO: Final = EngineInfo(NAMESPACE, 1, 1, 3, "computed", "a computed state")
SETTINGS: Final = Settings(snapshot_trigger_policy="manual_only", snapshot_min_interval_seconds=0.0)
REPLY_TOKENS: Final = 3


class InexactError(AssertionError):
    """A restored state is not the one of its tokens."""


# ---- states as a function of tokens ----


def page_keys(tokens: Sequence[int]) -> list[str]:
    """One chained key a token."""
    keys: list[str] = []
    before = b""
    for token in tokens:
        before = blake3(before + tokens_to_bytes([int(token)])).digest()
        keys.append(before.hex())
    return keys


def layout(num_tokens: int, has_state: bool) -> list[BufferPlan]:
    """A recurrent state, or KV rows of two buffers."""
    if has_state:
        return [("ssm.1", "F32", (1, 4, 5))]
    return [("k.0", "BF16", (num_tokens, 2, 3)), ("v.0", "BF16", (num_tokens, 2, 3))]


def content(name: str, keys: Sequence[str], nbytes: int) -> bytes:
    """What the buffer `name` holds where these keys end: equal parts of it for each."""
    each = nbytes // len(keys)
    return b"".join(blake3(name.encode() + bytes.fromhex(k)).digest(length=each) for k in keys)


def _expected(name: str, keys: Sequence[str], start: int, end: int, nbytes: int) -> bytes:
    return content(name, keys[start:end] if name[0] in "kv" else keys[end - 1 : end], nbytes)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def check_exact(manager: TierManager, boundary: Segment, tokens: Sequence[int]) -> None:
    """Every byte in RAM of a chain is the one its tokens stand for. Raises `InexactError`."""
    keys = page_keys(tokens)
    position = 0
    for node in boundary.chain():
        if node.start != position or node.key != keys[node.end - 1]:
            raise InexactError(f"a segment of [{node.start}, {node.end}) at {position}")
        position = node.end
        for name, tensor in manager.views(node).items():
            found = _raw(tensor)
            if found.numpy().tobytes() != _expected(
                name, keys, node.start, node.end, found.numel()
            ):
                raise InexactError(f"{name} of [{node.start}, {node.end}) is not what was saved")
        assert node.payload is not None
        if node.has_state:
            continue
        if tokens_of(node.payload, node.buffers).tolist() != list(tokens[node.start : node.end]):
            raise InexactError(f"the tokens of [{node.start}, {node.end}) are others")
    if position != boundary.end:
        raise InexactError(f"the chain ends at {position}, not at {boundary.end}")


# ---- ranks and generator ----


class ComputedEngine:
    """One rank and the generator: the real `TierManager` over computed states."""

    def __init__(self, root: Path, fs: FileSystem | None, ram_bytes: int) -> None:
        # As a scheduler's: it writes segments without the lock.
        self.store = DiskStore.open(root, lock=False, fs=fs)
        self.manager = TierManager(
            RamTier(ram_bytes), self.store, Shard(NAMESPACE.id, 0, 1), layout, stateful=True
        )
        self.service: SnapshotService | None = None
        self._requests = 0

    def compute(self, tokens: Sequence[int]) -> None:
        """A request with these tokens has ended: what is new is captured; the last one pends."""
        keys = page_keys(tokens[:-1])
        if not keys:
            return
        end, ram = len(keys), self.manager.ram
        held = self.manager.boundary(keys[-1])
        if held is not None and ram.whole(held):
            return
        parent = self.manager.stand(keys[:-1])
        start = parent.end if parent is not None else 0
        done = threading.Event()

        def read(
            targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck
        ) -> None:
            for name, target in targets.items():
                raw = _raw(target)
                rows = start + first, start + last
                bits = bytearray(_expected(name, keys, *rows, raw.numel()))
                raw.copy_(torch.frombuffer(bits, dtype=torch.uint8))

        if self.manager.capture(
            keys[start:], start, tokens[start:end], parent, read, on_done=done.set
        ):
            assert done.wait(WAIT_S)

    async def describe(self) -> EngineInfo:
        return INFO

    def _boundary(self, request: FinishedRequest, boundary: int) -> Segment:
        key = page_keys(request.tokens[:boundary].tolist())[-1]
        found = self.manager.boundary(key)
        if found is None or not self.manager.ram.whole(found):
            raise CaptureLostError("the state is gone", details={"boundary": boundary})
        return found

    async def locate(
        self, namespace: str, request: FinishedRequest, boundary: int, *, measure: bool = False
    ) -> Located:
        found = self._boundary(request, boundary)
        self.manager.ram.want(found)
        needed = None
        if measure:
            needed = await asyncio.to_thread(self.manager.unsaved_bytes, found)
        return Located(boundary, found.key, needed)

    async def persist(self, namespace: str, request: FinishedRequest, boundary: int) -> Stored:
        persisted = await _await(self.manager.persist(self._boundary(request, boundary)))
        return Stored(boundary, (persisted.refs,), persisted.nbytes, persisted.written)

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
        promoted = await _await(
            self.manager.promote(chains[0], owner, seconds=seconds, exact=exact)
        )
        return Brought(
            promoted.source.value, promoted.nbytes, promoted.read, in_vram=False, state_slot=None
        )

    def abandon(self, owner: str) -> None:
        self.manager.abandon(owner)

    async def tier(self, namespace: str, key: str, tokens: TokenArray) -> str:
        found = self.manager.boundary(key)
        loadable = found is not None and self.manager.ram.loadable(found, 0)
        return "ram" if loadable else "disk"

    async def drop(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> None:
        await _await(self.manager.drop(segment_ids[0]))

    async def residents(self, namespace: str) -> list[list[ResidentSegment]]:
        return [[ResidentSegment(*one) for one in self.manager.ram.durable_residents()]]

    async def demote(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> int:
        return self.manager.ram.demote(frozenset(segment_ids[0]))

    async def stats(self) -> list[dict[str, Any]]:
        return [self.manager.depths()]

    def page_keys(
        self, tokens: TokenArray, page_size: int, extra_key: str | None, cache_salt: str | None
    ) -> list[str]:
        return page_keys(tokens.tolist())

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
        # What comes out is a function of what went in, as it is with a model.
        rng = Random(page_keys(input_ids)[-1])
        output = [rng.randrange(2**32) for _ in range(sampling_params["max_new_tokens"])]
        assert self.service is not None
        gate = self.service.gate
        await gate.admit(RunningRequest(rid, to_tokens(input_ids), tag, extra_key, cache_salt))
        await asyncio.to_thread(self.compute, [*input_ids, *output])
        gate.finished(rid, output)
        return Generation(rid, output, None, 0, {"id": rid})

    def close(self) -> None:
        self.manager.close()
        self.store.close()


async def _await(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)


# ---- a whole server ----


@dataclass
class Keeper:
    """Store, catalog, engine and service over one directory, as a server's processes have them."""

    root: Path
    store: DiskStore
    catalog: Catalog
    engine: ComputedEngine
    service: SnapshotService
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def start(
        cls, root: Path, fs: FileSystem | None = None, *, ram_bytes: int = RAM_BYTES
    ) -> Keeper:
        with ExitStack() as opened:
            store = opened.enter_context(DiskStore.open(root, fs=fs))
            with store.reserve_at_hand():
                catalog = opened.enter_context(closing(Catalog.open(store.catalog_path, store)))
            engine = ComputedEngine(root, fs, ram_bytes)
            opened.pop_all()
        service = SnapshotService(SETTINGS, store, catalog, engine, engine)
        engine.service = service
        return cls(root, store, catalog, engine, service)

    def stop(self) -> None:
        """End as a process does: nothing that was asked for is undone."""
        self.engine.close()
        self.service.context._store_threads.shutdown()
        self.service.context._catalog_threads.shutdown()
        self.catalog.close()
        self.store.close()

    async def talk(self, before: Sequence[int], message: Sequence[int], tag: Tag, rid: str) -> None:
        """One turn; `tokens` knows its tokens by `rid` afterwards."""
        prompt = [*before, *message]
        made = await self.engine.generate(
            prompt, {"max_new_tokens": REPLY_TOKENS}, rid=rid, tag=tag
        )
        self.tokens[rid] = [*prompt, *made.output_ids]

    async def restore(self, row: SnapshotRow, tokens: Sequence[int] | None = None) -> list[int]:
        """Restore a snapshot, compare every byte, return its tokens.

        With `tokens`, those recorded must be these. Raises `InexactError`.
        """
        while True:
            await self.service.restore(row)
            manager = self.engine.manager
            with manager.ram.lock:
                boundary = manager.boundary(row.boundary_key)
                # Another restore may have needed the room by now.
                if boundary is None or not manager.ram.loadable(boundary, 0):
                    continue
                held = manager.ram.hold(boundary.chain())
            break
        try:
            recorded: list[int] = (await self.service.tokens(row)).tolist()
            if tokens is not None and recorded != list(tokens):
                raise InexactError(f"snapshot {row.snapshot_id} has other tokens")
            check_exact(manager, boundary, recorded[: row.token_count])
        finally:
            manager.ram.release(held)
        return recorded

    async def gone(self, snapshot_id: str) -> None:
        """Delete a snapshot by its id."""
        await self.service.delete(self.catalog.get(snapshot_id))

    async def collect(self) -> int:
        """Go through the whole store once, without grace; how many segments were removed."""
        removed = 0
        while True:
            report = await collect_once(self.service.context, grace=0.0)
            removed += report.removed
            if report.last:
                return removed

    def orphans(self) -> set[str]:
        """Segment files that no snapshot names."""
        return {
            found.segment_id
            for found in self.store.iter_segments()
            if not self.catalog.is_referenced(found.shard, found.segment_id)
        }
