"""SGLang's real radix tree over tiny CPU pools, Engram's linker on it, and requests to serve.

The toy model writes bytes that follow from the tokens alone: the KV row at a position and the state
behind it are drawn from the page key there.  So whatever a request reads can be checked, whoever
wrote it.  Pools are read and written through SGLang's own accessors, which wait for loads.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import get_context

from engram.core.namespace import Namespace
from engram.sglang_plugin import linker as linker_module
from engram.sglang_plugin.cache import EngramRadixCache
from engram.sglang_plugin.keys import page_keys, page_keys_after
from engram.sglang_plugin.linker import EngramLinker
from engram.sglang_plugin.rank import Launch, RankContext
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.tiers.manager import TierManager
from engram.tiers.ram import RamTier

NewRank = Callable[..., "Rank"]
ATTENTION_LAYERS = (1, 4)
STATE_LAYERS = (0, 2, 3)
LAYERS = 5
SLOTS = 400
STATES = 40
CONTEXT = 256
LAUNCH = Launch("a-launch", "auto", "fast", None)


@contextmanager
def sglang_settings() -> Iterator[None]:
    """The global settings that SGLang's pools and tree read."""
    override = get_context().override_server_args(model_path="dummy")
    with override:
        get_context().server_args._mamba_cache_chunk_size = 64
        yield


@dataclass
class ToyRequest:
    """What the tree reads and writes of a request."""

    rid: str
    tokens: list[int]
    extra_key: str | None = None
    cache_salt: str | None = None
    kv: ReqKvInfo = field(default_factory=ReqKvInfo)
    finished_reason: object | None = None
    lock: Any = None
    last_node: Any = None
    priority: int | None = None
    session: Any = None
    session_id: str | None = None
    kv_rotation_base: int | None = None
    swa_branching_seqlen: int | None = None
    skip_radix_cache_insert: bool = False
    input_embeds: Any = None
    multimodal_inputs: Any = None
    discard_output_reason: Any = None
    return_hidden_states: bool = False
    inflight_middle_chunks: int = 0
    origin: list[int] | None = None
    """Its prompt, where that is not all of its tokens so far."""

    @property
    def full_untruncated_fill_ids(self) -> array[int]:
        return array("q", self.tokens)

    @property
    def origin_input_ids(self) -> array[int]:
        return array("q", self.tokens if self.origin is None else self.origin)

    def refresh_fill_ids(self) -> None:
        """Here they are always up to date."""

    def finished(self) -> bool:
        return self.finished_reason is not None


@dataclass(frozen=True)
class Served:
    """How much of a request was in VRAM, and how much was loaded behind it."""

    resident: int
    loaded: int
    aborted: bool


def drawn(name: str, key: str, like: torch.Tensor) -> torch.Tensor:
    """The toy model's bytes of one buffer at one page key."""
    data = hashlib.shake_256(f"{name}/{key}".encode()).digest(like.numel() * like.element_size())
    flat = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    flat[1::2] &= 0xBF  # the exponents' highest bits: what is left are numbers
    return flat.view(like.dtype).view(like.shape)


class Rank:
    """One scheduler rank: pools, tree, linker, tiers."""

    def __init__(
        self,
        store: DiskStore,
        *,
        core: str,
        capacity: int = 1 << 24,
        extra_buffer: bool = False,
        interval: int = 0,
    ) -> None:
        shape = Mamba2StateShape.create(
            tp_world_size=1,
            intermediate_size=8,
            n_groups=1,
            num_heads=2,
            head_dim=4,
            state_size=3,
            conv_kernel=4,
        )
        self.requests = HybridReqToTokenPool(
            size=8,
            mamba_size=STATES,
            mamba_spec_state_size=8,
            max_context_len=CONTEXT,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=shape, layers=list(STATE_LAYERS)),
            mamba_layer_ids=list(STATE_LAYERS),
            enable_mamba_extra_buffer=extra_buffer,
            enable_overlap_schedule=extra_buffer,
        )
        self.kv = HybridLinearKVPool(
            size=SLOTS,
            dtype=torch.bfloat16,
            page_size=1,
            head_num=2,
            head_dim=4,
            full_attention_layer_ids=list(ATTENTION_LAYERS),
            device="cpu",
            mamba_pool=self.requests.mamba_pool,
        )
        self.slots = TokenToKVPoolAllocator(SLOTS, torch.bfloat16, "cpu", self.kv, False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.slots,
            page_size=1,
            tree_components=(ComponentType.FULL, ComponentType.MAMBA),
            tree_core_backend=core,
            enable_mamba_extra_buffer=extra_buffer,
        )
        self.store = store
        self.capacity = capacity
        self.interval = interval
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(linker_module, "open_rank", self._open_rank)
            self.linker = EngramLinker(
                None, params, components=set(), extra_config={}, forward_stream=None
            )
        self.cache = EngramRadixCache(params)
        self.cache.init_cache_linker(self.linker)
        # As upstream's factory does.
        self.kv.register_layer_transfer_counter(self.linker.layer_done_counter)
        self.stats = self.tiers.ram.stats
        self.running = 0

    @property
    def tiers(self) -> TierManager:
        return self.linker.tiers

    @property
    def namespace(self) -> str:
        """What messages to this rank have to believe."""
        return self.linker.rank.shard.namespace

    def _open_rank(
        self, server_args: Any, params: Any, pools: Any, extra_config: Any
    ) -> RankContext:
        namespace = Namespace({"model": "toy", "model.weights": "first", **pools.describe()})
        shard = Shard(namespace.id, 0, 1)
        tiers = TierManager(
            RamTier(self.capacity),
            self.store,
            shard,
            pools.layout,
            pools.has_state,
            page_keys=partial(page_keys_after, page_size=1),
        )
        return RankContext(
            namespace, shard, tiers, 1, LAYERS, "toy", "a toy", LAUNCH, interval=self.interval
        )

    # ---- the toy model ----

    def _kv_buffers(self, layer: int) -> dict[str, torch.Tensor]:
        return {"k": self.kv.get_key_buffer(layer), "v": self.kv.get_value_buffer(layer)}

    def _state_buffers(self, layer: int) -> dict[str, torch.Tensor]:
        cache = self.requests.mamba2_layer_cache(layer)
        return {"conv": cache.conv[0], "ssm": cache.temporal}

    def check_layer(self, layer: int, keys: list[str], slots: list[int], state: int | None) -> None:
        """What a forward pass reads of a prefix in one layer is what the model once wrote."""
        if layer in ATTENTION_LAYERS:
            for name, buffer in self._kv_buffers(layer).items():
                for key, slot in zip(keys, slots, strict=True):
                    assert same(buffer[slot], drawn(f"{name}{layer}", key, buffer[slot])), (
                        layer,
                        name,
                    )
        elif state is not None:
            for name, buffer in self._state_buffers(layer).items():
                wanted = drawn(f"{name}{layer}", keys[-1], buffer[state])
                assert same(buffer[state], wanted), (layer, name)

    def write_layer(self, layer: int, keys: list[str], slots: list[int], state: int) -> None:
        if layer in ATTENTION_LAYERS:
            for name, buffer in self._kv_buffers(layer).items():
                for key, slot in zip(keys, slots, strict=True):
                    buffer[slot] = drawn(f"{name}{layer}", key, buffer[slot])
        else:
            for name, buffer in self._state_buffers(layer).items():
                buffer[state] = drawn(f"{name}{layer}", keys[-1], buffer[state])

    # ---- requests ----

    def admit(self, request: ToyRequest) -> tuple[int, int]:
        """Match, load and allocate as the scheduler does; tokens resident and loaded."""
        # At least one token is always computed.
        key = RadixKey(
            array("q", request.tokens[:-1]), request.extra_key, cache_salt=request.cache_salt
        )
        match = self.cache.match_prefix(MatchPrefixParams(key=key, cow_mamba=True, req=request))
        resident = match.device_prefix_len
        request.last_node = match.last_device_node
        request.lock = self.cache.lock(match.last_device_node)
        loaded = 0
        if match.host_hit_length:
            loaded, _ = self.cache.init_load_back(
                InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
            )
        [row] = self.requests.alloc([request])
        table = self.requests.req_to_token
        if resident:
            path = self.cache.path_device_indices(match.last_device_node)
            table[row, :resident] = path[:resident].to(table.dtype)
        prefix = resident + loaded
        if loaded:
            private = self.cache.linker.private_load_indices[request.rid]
            table[row, resident:prefix] = private.to(table.dtype)
        fresh = self.slots.alloc(len(request.tokens) - prefix)
        table[row, prefix : len(request.tokens)] = fresh.to(table.dtype)
        request.kv.cache_protected_len = resident
        request.kv.kv_allocated_len = request.kv.kv_committed_len = len(request.tokens)
        return resident, loaded

    def forward(self, request: ToyRequest, prefix: int) -> None:
        """One batch of one request: read what it stands on, layer by layer, and write the rest."""
        keys = page_keys(request.tokens, 1, request.extra_key, request.cache_salt)
        row = self.requests.req_to_token[request.kv.req_pool_idx, : len(keys)].tolist()
        own = int(request.kv.mamba_pool_idx)
        source = request.kv.mamba_cow_src_index
        start = int(source[0]) if source is not None else own
        self.linker.layer_done_counter.set_consumer(self.cache.linker.start_layer_wise_loading())
        for layer in range(LAYERS):
            if prefix:
                self.check_layer(layer, keys[:prefix], row[:prefix], start)
            self.write_layer(layer, keys[prefix:], row[prefix:], own)
        self.linker.layer_done_counter.set_consumer(-1)

    def finish(self, request: ToyRequest, *, insert: bool = True) -> None:
        request.finished_reason = "stop"
        if insert:
            self.cache.checkpoint(request, up_to=len(request.tokens))
        else:
            self.requests.free_mamba_cache(request)
        row, table = request.kv.req_pool_idx, self.requests.req_to_token
        owned = table[row, request.kv.cache_protected_len : len(request.tokens)]
        if owned.numel():
            self.slots.free(owned.long())
        self.cache.unlock(request.lock)
        self.cache.linker.release_request(request.rid)
        self.requests.free(request)

    def serve(
        self, tokens: list[int], *, rid: str | None = None, extra_key: str | None = None
    ) -> Served:
        """A request from admission to its end, its copy included."""
        self.running += 1
        request = ToyRequest(rid or f"rid-{self.running}", list(tokens), extra_key)
        resident, loaded = self.admit(request)
        self.forward(request, resident + loaded)
        failed = self.cache.finish_external_linker_loads([request])
        self.finish(request, insert=not failed)
        self.settle()
        return Served(resident, loaded, bool(failed))

    def settle(self) -> None:
        """Until every copy is done and the scheduler has noticed."""
        self.tiers.quiesce()
        self.cache.check_hicache_events()

    def check_pools(self) -> None:
        """The tree is sane, nothing is locked, and every slot is free or in the tree."""
        self.cache.sanity_check()
        assert self.slots.available_size() + self.cache.full_evictable_size() == SLOTS
        assert self.cache.full_protected_size() == 0
        states = self.requests.mamba_allocator.available_size()
        assert states + self.cache.mamba_evictable_size() == STATES
        assert self.cache.mamba_protected_size() == 0

    def nothing_is_held(self) -> None:
        """No lease, no load and no capture keeps anything in RAM."""
        assert self.tiers.ram.held == 0

    def clear_vram(self) -> None:
        """What `/flush_cache` does."""
        self.cache.reset()
        self.requests.clear()
        self.slots.clear()

    def boundaries(self, tokens: list[int], extra_key: str | None = None) -> list[int]:
        """Where boundaries of a sequence are held."""
        keys = page_keys(tokens, 1, extra_key)
        return [end for end, key in enumerate(keys, 1) if self.tiers.boundary(key) is not None]

    def close(self) -> None:
        self.linker.close()


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bytes."""
    return torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
