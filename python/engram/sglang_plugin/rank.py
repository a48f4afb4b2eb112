"""What one scheduler rank owns: its shard of the store, its RAM tier, and who it is.

Who it is changes when the weights do.  `RankContext.change_weights` is the only place where that
happens: other tiers, over another shard, take over from one scheduler step to the next, and the
ones before finish what was asked of them and are closed by a thread of their own.
"""

from __future__ import annotations

import json
import os
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import torch

from engram.core.canonical import blake3_hex, canonical_json
from engram.core.namespace import FieldValue, Namespace
from engram.core.settings import Settings
from engram.core.weights import Checkpoint, config_digest
from engram.errors import UnsupportedError
from engram.sglang_plugin.args import open_store
from engram.sglang_plugin.keys import page_keys_after
from engram.sglang_plugin.pools import DevicePools
from engram.snapshot.segment import VERSION as SEGMENT_VERSION
from engram.snapshot.segment import Shard
from engram.tiers.health import HealthPolicy
from engram.tiers.manager import TierManager
from engram.tiers.ram import RamTier

WEIGHTS: Final = "model.weights"
"""The field of the namespace that says which weights the model computes with."""

CHANGES_THE_MODEL: Final = (
    *("json_model_override_args", "model_impl", "model_config_parser", "enable_tf32_matmul"),
    *("quantization_param_path", "modelopt_quant", "modelopt_checkpoint_restore_path"),
    *("quantize_and_serve", "rl_quant_profile"),
)
"""Settings of SGLang's with which the same files make another model, beside `quantization`."""

READ_FROM_FILES: Final = frozenset(
    {
        *("auto", "pt", "safetensors", "npcache", "mistral", "fastsafetensors", "gguf"),
        *("bitsandbytes", "layered", "instanttensor", "runai_streamer"),
    }
)
"""Values of `--load-format` with which a model has the weights that its directory holds."""


@dataclass(frozen=True)
class Launch:
    """What a rank was started with.

    `id` is the same on all ranks of a server and of no other server; `checkpoint` is None where the
    weights are not those of a directory (`--load-format dummy`); `revision` is the one that a name
    of the hub stands for.
    """

    id: str
    load_format: str
    verify: Literal["fast", "full"]
    checkpoint: Checkpoint | None
    revision: str | None = None


@dataclass
class RankContext:
    """The identity and the tiers of one rank.

    `epoch` counts the changes of weights, from 0; `pin_budget` are bytes of VRAM, None for a share;
    `interval` are the tokens between states that are kept inside prompts and replies, 0 for none.
    """

    namespace: Namespace
    shard: Shard
    tiers: TierManager
    page_size: int
    num_layers: int
    model_type: str
    model_name: str
    launch: Launch
    epoch: int = 0
    pin_budget: int | None = None
    interval: int = 0
    _runtime: int = 0
    _retiring: list[threading.Thread] = field(default_factory=list)

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

    @property
    def weights(self) -> str:
        """What the namespace calls the weights that the model computes with."""
        return str(self.namespace.fields[WEIGHTS])

    def runtime_weights(self) -> str:
        """A name for weights that nothing else has: no state made with them ever matches again.

        It is counted, not drawn, so that all ranks of a server agree: each of them takes one when
        any does (`EngramRadixCache.weights_changed`).
        """
        self._runtime += 1
        return runtime_name(self.launch.id, self._runtime)

    def change_weights(self, weights: str) -> bool:
        """Go on under other weights, on the scheduler thread; False if they are those of before.

        Waits for copies off the device, which take milliseconds, not for the disk.
        """
        namespace = Namespace({**self.namespace.fields, WEIGHTS: weights})
        if namespace == self.namespace:
            return False
        before = self.tiers
        before.quiesce()
        shard = Shard(namespace.id, self.shard.rank, self.shard.world_size)
        ram = RamTier(before.ram.capacity, pinned=before.ram.pinned, stats=before.ram.stats)
        tiers = TierManager(
            ram,
            before.store,
            shard,
            before.layout,
            before.stateful,
            health=before.health,
            page_keys=before.page_keys,
        )
        self.namespace, self.shard, self.tiers = namespace, shard, tiers
        self.epoch += 1
        before.forget()
        self._retiring = [thread for thread in self._retiring if thread.is_alive()]
        self._retiring.append(threading.Thread(target=before.close, name="engram-retire"))
        self._retiring[-1].start()
        return True

    def close(self) -> None:
        """Finish what was asked of the tiers and stop their threads."""
        self.tiers.close()
        for thread in self._retiring:
            thread.join()


MODEL_CONFIG: ContextVar[Any] = ContextVar("MODEL_CONFIG")
"""Upstream's ModelConfig while the cache is built: the linker's constructor is not given it."""


def open_rank(
    server_args: Any, params: Any, pools: DevicePools, extra_config: dict[str, Any]
) -> RankContext:
    """Build the context of this process's rank; called once, while the cache is constructed.

    Raises `UnsupportedError` for a model that generates nothing.
    """
    from sglang.srt.runtime_context import get_serving

    settings = Settings.model_validate(extra_config["settings"])
    rank, world_size = _shard_of(params)
    model = MODEL_CONFIG.get()
    if not model.is_generation:
        raise UnsupportedError(
            "snapshots are of conversations, and this model generates nothing: SGLang serves it "
            "for embeddings or rewards",
            hint="start the server without --enable-snapshot-persistence",
        )
    path = model_dir(model.model_path, model.revision)
    launch = Launch(
        extra_config["launch_id"],
        str(server_args.load_format),
        settings.snapshot_verify_weights,
        Checkpoint.read(path, settings.snapshot_verify_weights)
        if server_args.load_format in READ_FROM_FILES
        else None,
        model.revision,
    )
    namespace = Namespace(
        {
            "format": SEGMENT_VERSION,
            "model.config": config_digest(path),
            WEIGHTS: launch.checkpoint.digest if launch.checkpoint else runtime_name(launch.id, 0),
            "model.weights_mode": settings.snapshot_verify_weights,
            "model.dtype": str(model.dtype),
            **model_settings(server_args, model),
            "page_size": params.page_size,
            "tp_size": world_size,
            **pools.describe(),
        }
    )
    shard = Shard(namespace.id, rank, world_size)
    tiers = TierManager(
        RamTier(settings.max_warm_bytes, pinned=pools.device.type == "cuda"),
        open_store(server_args, lock=False),
        shard,
        pools.layout,
        pools.has_state,
        health=HealthPolicy.of(settings),
        page_keys=partial(page_keys_after, page_size=params.page_size),
    )
    return RankContext(
        namespace,
        shard,
        tiers,
        params.page_size,
        model.num_hidden_layers,
        model.hf_text_config.model_type,
        get_serving().served_model_name,
        launch,
        pin_budget=settings.pin_budget_bytes,
        interval=settings.snapshot_point_interval,
    )


def model_settings(server_args: Any, model: Any) -> dict[str, FieldValue]:
    """Fields of the namespace: what the command line makes of the files of a model.

    Quantisation is SGLang's own finding, the same whether asked for or read from the checkpoint.
    """
    settings: dict[str, FieldValue] = {"model.quantization": model.quantization}
    for name in CHANGES_THE_MODEL:
        value = getattr(server_args, name)
        if name == "json_model_override_args":
            value = canonical_json(json.loads(value)).decode()
        settings[f"model.{name}"] = value
    return settings


def runtime_name(launch_id: str, number: int) -> str:
    """The name of the `number`-th weights of a server that no directory holds."""
    return "runtime-" + blake3_hex(canonical_json([launch_id, number]))[:32]


def _shard_of(params: Any) -> tuple[int, int]:
    group = params.tp_cache_group
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def model_dir(model_path: str, revision: str | None) -> str:
    """The local directory of a model: itself, or where the hub's cache has put it."""
    if os.path.isdir(model_path):
        return model_path
    from huggingface_hub import snapshot_download

    return snapshot_download(model_path, revision=revision, local_files_only=True)
