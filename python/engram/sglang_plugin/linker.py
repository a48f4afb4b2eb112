"""`EngramLinker`: what SGLang's radix tree asks for state that is not in VRAM.

The tree asks with page keys (`lookup`), gets private device slots filled layer by layer (`load`),
and waits in the forward pass for one layer at a time.  A load that fails aborts its request, it is
not recomputed, so a lookup promises only bytes that are verified, in RAM and leased.

`offload` is upstream's offer to store a node.  It is acknowledged at once and ignored: what to
capture is decided by `EngramRadixCache`, which knows the request (`cache.py`).

Contract: `UnifiedCacheLinker` in `sglang.srt.mem_cache.unified_cache.unified_cache_linker`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)

from engram.sglang_plugin.contain import Containment
from engram.sglang_plugin.pools import DevicePools, Kind, resolve_pools
from engram.sglang_plugin.rank import RankContext, open_rank
from engram.sglang_plugin.streams import SideStream
from engram.tiers.base import Segment
from engram.tiers.manager import TierManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Load:
    """One request's load: what a held chain has past token `after`, into these device slots."""

    tiers: TierManager
    held: tuple[Segment, ...]
    after: int
    kv_slots: torch.Tensor
    state_slot: torch.Tensor | None


class EngramLinker(UnifiedCacheLinker):
    """One rank's way from the RAM tier into the device pools."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        self.forward_stream = forward_stream
        self.device_pools: DevicePools = resolve_pools(params)
        self.page_size: int = params.page_size
        self.rank: RankContext = open_rank(server_args, params, self.device_pools, extra_config)
        self.stats = self.rank.tiers.ram.stats
        self.containment = Containment(self.stats)
        self.pools = {PoolName.KV: self.device_pools}
        if self.device_pools.has_state:
            self.pools[PoolName.MAMBA] = self.device_pools
        self.layer_done_counter = LayerWiseLoadCounter(self.device_pools.num_layers)
        # Upstream registers the counter on the KV pool alone.  Without this a forward pass would
        # read recurrent states that are still being loaded.
        if self.device_pools.has_state:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._stream = SideStream(self.device_pools.device, forward_stream)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="engram-load")
        self.least_of_ranks: Callable[[int], int] = int
        self._queued: dict[str, _Load] = {}
        self._acknowledged = 0

    @property
    def tiers(self) -> TierManager:
        """The tiers of the weights that the model computes with now."""
        return self.rank.tiers

    # ---- lookup and load ----

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Prefix lengths in pages that can be loaded; see the module's docstring."""
        keys = _transfer(transfers, PoolName.KV).keys
        return self.containment.run(
            "lookup", lambda: self.tiers.lookup(rid, keys, self.page_size), []
        )

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Queue the load of a promised prefix into private device slots; on all ranks or on none.

        Upstream takes the answer as the same on every rank, but a lease may have run out on one.
        """
        queued = self.containment.run("load", lambda: self._queue(rid, transfers), False)
        if self.least_of_ranks(queued):
            return True
        self.cancel_queued_load(rid)
        return False

    def _queue(self, rid: str, transfers: list[Any]) -> bool:
        kv = _transfer(transfers, PoolName.KV)
        ram = self.tiers.ram
        with ram.lock:
            boundary = self.tiers.boundary(kv.keys[-1])
            after = 0 if boundary is None else boundary.end - len(kv.device_indices)
            if boundary is None or not ram.loadable(boundary, after):
                # The lease ran out while the request waited: it recomputes.
                return False
            held = ram.hold(boundary.chain(after))
        self.tiers.release(rid)
        state = None
        if self.device_pools.has_state:
            state = _transfer(transfers, PoolName.MAMBA).device_indices.long()
        self._queued[rid] = _Load(self.tiers, held, after, kv.device_indices.long(), state)
        return True

    def start_layer_wise_loading(self) -> int:
        """Start what is queued; the forward pass waits for its layers."""
        if not self._queued:
            return -1
        loads = list(self._queued.values())
        self._queued.clear()
        index = self.layer_done_counter.update_producer()
        self._threads.submit(self._run, index, loads, self._stream.fence())
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until the batch has landed; False aborts its requests."""
        landed: bool = self.layer_done_counter.finish(counter_index)
        return landed

    def cancel_queued_load(self, rid: str) -> bool:
        """Forget a load that has not started."""
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        load.tiers.ram.release(load.held)
        return True

    def _run(self, index: int, loads: Sequence[_Load], fence: Any) -> None:
        try:
            sources = [[(node, load.tiers.views(node)) for node in load.held] for load in loads]
            with self._stream.after(fence):
                for layer in range(self.device_pools.num_layers):
                    for load, chain in zip(loads, sources, strict=True):
                        self._scatter(layer, load, chain)
                    self._stream.synchronize()
                    self.layer_done_counter.complete(index, layer)
        except Exception as error:
            self.stats.contained_errors += 1
            logger.exception("Engram: a layer-wise load failed; its requests are aborted")
            self.layer_done_counter.fail(index, error)
        else:
            self.stats.loads += len(loads)
            self.stats.loaded_tokens += sum(len(load.kv_slots) for load in loads)
        finally:
            for load in loads:
                load.tiers.ram.release(load.held)

    def _scatter(
        self, layer: int, load: _Load, chain: Sequence[tuple[Segment, dict[str, torch.Tensor]]]
    ) -> None:
        for buffer in self.device_pools.by_layer[layer]:
            if buffer.kind is Kind.STATE:
                assert load.state_slot is not None
                _write(buffer.tensor, load.state_slot, chain[-1][1][buffer.name])
                continue
            for node, source in chain:
                if node.has_state:
                    continue
                first = max(node.start, load.after)
                slots = load.kv_slots[first - load.after : node.end - load.after]
                _write(buffer.tensor, slots, source[buffer.name][first - node.start :])

    # ---- offload: acknowledged, never used ----

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Say yes at once, on every rank alike, so that no tree lock stays behind."""
        self._acknowledged += 1
        return True

    def num_completed_offloads(self) -> int:
        """Offers acknowledged since last asked."""
        return self._acknowledged

    def pop_completed_offload(self) -> bool:
        """Acknowledge the oldest offer."""
        self._acknowledged -= 1
        return True

    # ---- life ----

    def reset(self) -> None:
        """The tree was emptied: stop touching device memory, keep RAM and disk."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.quiesce()
        self._acknowledged = 0
        self.layer_done_counter.reset()

    def quiesce(self) -> None:
        """Return when nothing of ours touches device memory any more."""
        self._threads.submit(lambda: None).result()
        self.tiers.quiesce()

    def close(self) -> None:
        """Finish what was asked for and stop the threads."""
        self.reset()
        self._threads.shutdown(wait=True)
        self.rank.close()


def _transfer(transfers: list[Any], name: PoolName) -> Any:
    return next(transfer for transfer in transfers if transfer.name == name)


def _write(device: torch.Tensor, slots: torch.Tensor, source: torch.Tensor) -> None:
    device.index_copy_(0, slots, source.to(device.device, non_blocking=True))
