"""What one scheduler rank owns: its shard of the store, its RAM tier, and who it is."""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from engram.core.namespace import Namespace
from engram.core.settings import Settings
from engram.core.weights import config_digest, weights_digest
from engram.sglang_plugin.pools import DevicePools
from engram.snapshot.segment import VERSION as SEGMENT_VERSION
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.tiers.manager import TierManager
from engram.tiers.ram import RamTier


@dataclass(frozen=True)
class RankContext:
    """The identity and the tiers of one rank."""

    namespace: Namespace
    shard: Shard
    tiers: TierManager
    page_size: int
    num_layers: int
    model_type: str
    model_name: str

    def describe(self) -> dict[str, Any]:
        """The answer to a `DescribeRequest`."""
        return {
            "namespace": dict(self.namespace.fields),
            "rank": self.shard.rank,
            "world_size": self.shard.world_size,
            "page_size": self.page_size,
            "num_layers": self.num_layers,
            "model_type": self.model_type,
            "model_name": self.model_name,
        }

    def close(self) -> None:
        """Finish what was asked of the tiers and stop their threads."""
        self.tiers.close()


MODEL_CONFIG: ContextVar[Any] = ContextVar("MODEL_CONFIG")
"""Upstream's ModelConfig while the cache is built: the linker's constructor is not given it."""


def open_rank(params: Any, pools: DevicePools, extra_config: dict[str, Any]) -> RankContext:
    """Build the context of this process's rank; called once, while the cache is constructed."""
    from sglang.srt.runtime_context import get_serving

    settings = Settings.model_validate(extra_config["settings"])
    rank, world_size = _shard_of(params)
    model = MODEL_CONFIG.get()
    model_dir = _model_dir(model.model_path)
    namespace = Namespace(
        {
            "format": SEGMENT_VERSION,
            "model.config": config_digest(model_dir),
            "model.weights": weights_digest(model_dir, settings.snapshot_verify_weights),
            "model.weights_mode": settings.snapshot_verify_weights,
            "model.dtype": str(model.dtype),
            "page_size": params.page_size,
            "tp_size": world_size,
            **pools.describe(),
        }
    )
    shard = Shard(namespace.id, rank, world_size)
    tiers = TierManager(
        RamTier(settings.max_warm_bytes, pinned=pools.device.type == "cuda"),
        DiskStore.open(settings.snapshot_dir, lock=False),
        shard,
        pools.layout,
    )
    return RankContext(
        namespace,
        shard,
        tiers,
        params.page_size,
        model.num_hidden_layers,
        model.hf_text_config.model_type,
        get_serving().served_model_name,
    )


def _shard_of(params: Any) -> tuple[int, int]:
    group = params.tp_cache_group
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _model_dir(model_path: str) -> str:
    """The local directory of a model: itself, or where the hub's cache has put it."""
    if os.path.isdir(model_path):
        return model_path
    from huggingface_hub import snapshot_download

    return snapshot_download(model_path, local_files_only=True)
