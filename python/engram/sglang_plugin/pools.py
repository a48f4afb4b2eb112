"""Engram's own view of SGLang's device pools: what a segment of this model holds, and where.

Upstream's helper for external linkers refuses hybrids with MHA key/value pools, so the buffers are
named here.  Anything a pool holds beyond what is named would silently not be saved, therefore a
pool with something unknown is refused by name.

Sources: `HybridLinearKVPool`, `MHATokenToKVPool`, `MLATokenToKVPool`, `HybridReqToTokenPool` and
`MambaPool` in `sglang.srt.mem_cache.memory_pool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from engram.core.namespace import POOL
from engram.errors import UnsupportedError
from engram.tiers.payload import DTYPE_NAMES

if TYPE_CHECKING:
    from engram.tiers.base import BufferPlan
    from engram.tiers.health import StateCheck


class Kind(Enum):
    """What one slot of a buffer stands for: a token, or a whole sequence."""

    KV = "kv"
    STATE = "state"


@dataclass(frozen=True)
class DeviceBuffer:
    """One device tensor of one layer, [slots, ...]; `layer` is the model's layer index."""

    name: str
    layer: int
    kind: Kind
    tensor: torch.Tensor


class DevicePools:
    """The buffers of one rank, ordered by layer, as segments store them."""

    def __init__(self, buffers: Sequence[DeviceBuffer]) -> None:
        self.buffers = tuple(sorted(buffers, key=lambda b: (b.layer, b.name)))
        self.num_layers = 1 + max(buffer.layer for buffer in buffers)
        self.has_state = any(buffer.kind is Kind.STATE for buffer in buffers)
        self.device = self.buffers[0].tensor.device
        self.by_layer: dict[int, list[DeviceBuffer]] = {n: [] for n in range(self.num_layers)}
        for buffer in self.buffers:
            self.by_layer[buffer.layer].append(buffer)

    def layout(self, num_tokens: int, has_state: bool) -> list[BufferPlan]:
        """Name, dtype and shape of each buffer of a state, or of `num_tokens` KV rows."""
        kind, slots = (Kind.STATE, 1) if has_state else (Kind.KV, num_tokens)
        return [
            (
                buffer.name,
                DTYPE_NAMES[buffer.tensor.dtype],
                (slots, *buffer.tensor.shape[1:]),
            )
            for buffer in self.buffers
            if buffer.kind is kind
        ]

    def gather(
        self,
        targets: dict[str, torch.Tensor],
        kv_slots: torch.Tensor,
        state_slot: torch.Tensor | None,
        check: StateCheck,
    ) -> None:
        """Copy rows of the device buffers into host tensors, one gather a buffer; those in
        `targets` alone.

        `kv_slots` (int64, [num_tokens]) and `state_slot` (int64, [1]) are on the device.  `check`
        sees each buffer of the state.  On CUDA all of it is only enqueued on the current stream.
        """
        for buffer in self.buffers:
            slots = kv_slots if buffer.kind is Kind.KV else state_slot
            target = targets.get(buffer.name)
            if slots is None or target is None:
                continue
            if buffer.tensor.is_cuda:
                source = buffer.tensor.index_select(0, slots)
                target.copy_(source, non_blocking=True)
            else:
                source = torch.index_select(buffer.tensor, 0, slots, out=target)
            if buffer.kind is Kind.STATE:
                check.look(buffer.name, source)

    def describe(self) -> dict[str, str]:
        """Fields of the namespace: what each slot of each buffer holds."""
        return {
            f"{POOL}{buffer.name}": f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape[1:])}"
            for buffer in self.buffers
            for tensor in (buffer.tensor,)
        }


def resolve_pools(params: Any) -> DevicePools:
    """The buffers behind a `CacheInitParams`; `UnsupportedError` names what is in the way."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool

    kv_pool = params.token_to_kv_pool_allocator.get_kvcache()
    req_pool = params.req_to_token_pool
    buffers: list[DeviceBuffer] = []
    if type(kv_pool) is HybridLinearKVPool:
        rows = _mla_buffers if kv_pool.use_mla else _mha_buffers
        buffers += rows(kv_pool.full_kv_pool, kv_pool.full_attention_layer_id_mapping)
    elif type(kv_pool) is MHATokenToKVPool:
        first = kv_pool.start_layer or 0
        buffers += _mha_buffers(kv_pool, {first + n: n for n in range(kv_pool.layer_num)})
    else:
        raise UnsupportedError(
            f"snapshots cannot hold a {type(kv_pool).__name__} yet",
            hint="see the list of models in the documentation",
        )
    if getattr(req_pool, "mamba_pool", None) is not None:
        buffers += _state_buffers(req_pool)
    return DevicePools(buffers)


def _mha_buffers(pool: Any, layer_ids: dict[int, int]) -> list[DeviceBuffer]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if type(pool) is not MHATokenToKVPool:
        raise UnsupportedError(f"snapshots cannot hold a {type(pool).__name__} yet")
    if pool.quant_method.name != "unquantized":
        raise UnsupportedError(
            f"snapshots cannot hold a KV cache quantised by {pool.quant_method.name} yet",
            hint="use --kv-cache-dtype auto",
        )
    found = []
    for layer, index in layer_ids.items():
        found.append(DeviceBuffer(f"k.{layer}", layer, Kind.KV, pool.k_buffer[index]))
        found.append(DeviceBuffer(f"v.{layer}", layer, Kind.KV, pool.v_buffer[index]))
    return found


def _mla_buffers(pool: Any, layer_ids: dict[int, int]) -> list[DeviceBuffer]:
    """The latent rows, of which keys and values are both made; one buffer a layer."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if type(pool) is not MLATokenToKVPool:
        raise UnsupportedError(f"snapshots cannot hold a {type(pool).__name__} yet")
    if pool.store_dtype != pool.dtype:
        raise UnsupportedError(
            f"snapshots cannot hold latent rows stored as {pool.dtype} yet",
            hint="use --kv-cache-dtype auto",
        )
    return [
        DeviceBuffer(f"kv.{layer}", layer, Kind.KV, pool.kv_buffer[index])
        for layer, index in layer_ids.items()
    ]


def _state_buffers(req_pool: Any) -> list[DeviceBuffer]:
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, MambaPool

    pool = req_pool.mamba_pool
    if type(req_pool) is not HybridReqToTokenPool or type(pool) is not MambaPool:
        raise UnsupportedError(
            f"snapshots cannot hold a {type(req_pool).__name__} over a {type(pool).__name__} yet"
        )
    beside = {
        "an int8 state checkpoint pool": req_pool.mamba_ckpt_pool,
        "side states beside the recurrent state": list(pool._slot_siblings) or None,
        "the ReplaySSM ring": pool.mamba_cache.replayssm_g,
    }
    for what, value in beside.items():
        if value is not None:
            raise UnsupportedError(f"snapshots cannot hold {what} yet")
    found = []
    for layer, index in req_pool.mamba_map.items():
        for part, conv in enumerate(pool.mamba_cache.conv):
            found.append(DeviceBuffer(f"conv{part}.{layer}", layer, Kind.STATE, conv[index]))
        temporal = pool.mamba_cache.temporal[index]
        if temporal[0].numel():  # a short convolution has no state but its window
            found.append(DeviceBuffer(f"ssm.{layer}", layer, Kind.STATE, temporal))
    return found
