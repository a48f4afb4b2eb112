"""Sizes against SGLang's own: its configurations, and the pools it makes from them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch, ModelConfig
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import get_context

from engram.errors import InvalidRequestError
from engram.sglang_plugin.pools import DevicePools, resolve_pools
from engram.sizing import ModelSize, Precision, read_config, size_of
from engram.testing.tiny_model import FAMILIES, write_tiny_model
from unit.sizing.samples import NAMES, fields, model_directory

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

# What no configuration above is of; dimensions of no real model.
SMALL: dict[str, dict[str, Any]] = {
    "mamba": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "conv_kernel": 4,
    },
    "lfm2-moe": {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
    },
    "qwen3.5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {
            "model_type": "qwen3_5_text",
            "dtype": "float16",
            "hidden_size": 64,
            "num_hidden_layers": 8,
            "full_attention_interval": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "bfloat16",
        },
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "float32",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "nemotron-blocks": {
        **fields("nemotron-cascade-2-30b"),
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
    },
}


@contextmanager
def served(path: Path, ranks: int) -> Iterator[ModelConfig]:
    """SGLang's view of a model directory, on so many ranks."""
    with get_context().override_server_args(model_path=str(path), tp_size=ranks):
        yield ModelConfig(str(path), dtype="auto")


def upstream_states(model: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every state buffer SGLang would make; empty ones left out."""
    config = mambaish_config(model)
    if config is None:
        return {}
    params = config.mamba2_cache_params
    found = {}
    for layer in params.layers:
        for part, conv in enumerate(params.shape.conv):
            found[f"conv{part}.{layer}"] = (DTYPES[params.dtype.conv], tuple(conv))
        if 0 not in params.shape.temporal:
            dtype = DTYPES[params.dtype.temporal]
            found[f"ssm.{layer}"] = (dtype, tuple(params.shape.temporal))
    return found


def upstream_row(model: ModelConfig, ranks: int) -> set[tuple[str, str, tuple[int, ...]]]:
    """Part, dtype and shape of what an attention layer keeps of a token."""
    dtype = DTYPES[model.dtype]
    if model.attention_arch is AttentionArch.MLA:
        return {("kv", dtype, (1, model.kv_lora_rank + model.qk_rope_head_dim))}
    if model.attention_arch is AttentionArch.SSM:
        return set()
    shape = (model.get_num_kv_heads(ranks), model.head_dim)
    return {("k", dtype, shape), ("v", dtype, shape)}


def upstream_attention_layers(model: ModelConfig) -> list[int]:
    config = mambaish_config(model)
    if config is not None:
        return list(config.full_attention_layer_ids)
    return list(range(model.num_hidden_layers))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [(name, n) for name in NAMES for n in (1, 2, 4, 16)]
    + [(name, n) for name in SMALL for n in (1, 2, 4)],
)
def test_sglang_would_make_the_same_buffers(name: str, ranks: int, tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", SMALL.get(name) or fields(name))
    size = size_of(read_config(path), ranks=ranks)
    with served(path, ranks) as model:
        states = {b.name: (b.dtype, b.shape) for b in size.buffers if not b.per_token}
        assert states == upstream_states(model)
        layers = sorted({b.layer for b in size.buffers if b.per_token})
        assert layers == upstream_attention_layers(model)
        for layer in layers:
            row = {
                (b.part, b.dtype, b.shape) for b in size.buffers if b.per_token and b.layer == layer
            }
            assert row == upstream_row(model, ranks)
        config = mambaish_config(model)
        whole = 0 if config is None else config.mamba2_cache_params.mamba_cache_per_req
        assert size.state_bytes == whole


def test_what_is_refused_for_its_ranks_sglang_refuses_too(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", SMALL["qwen3.5"])
    with pytest.raises(InvalidRequestError, match="4 recurrent heads cannot be divided among 16"):
        size_of(read_config(path), ranks=16)
    with served(path, 16) as model, pytest.raises(AssertionError, match="not divisible"):
        upstream_states(model)


def described(size: ModelSize) -> dict[str, str]:
    return {f"pool.{b.name}": f"{b.dtype}{list(b.shape)}" for b in size.buffers}


def pools_of(model: ModelConfig, dtype: torch.dtype) -> DevicePools:
    """SGLang's pools for a few slots of a model, as Engram sees them."""
    config = mambaish_config(model)
    heads = {"head_num": model.get_num_kv_heads(1), "head_dim": model.head_dim}
    kv: HybridLinearKVPool | MHATokenToKVPool
    if config is None:
        kv = MHATokenToKVPool(
            size=16,
            page_size=1,
            dtype=dtype,
            layer_num=model.num_hidden_layers,
            device="cpu",
            enable_memory_saver=False,
            **heads,
        )
        return resolved(kv, dtype, ReqToTokenPool(2, 16, "cpu", False), ComponentType.FULL)
    params = config.mamba2_cache_params
    requests = HybridReqToTokenPool(
        size=2,
        mamba_size=3,
        mamba_spec_state_size=2,
        max_context_len=16,
        device="cpu",
        enable_memory_saver=False,
        cache_params=params,
        mamba_layer_ids=params.layers,
        enable_mamba_extra_buffer=False,
        enable_overlap_schedule=False,
    )
    latent: dict[str, Any] = {}
    if model.attention_arch is AttentionArch.MLA:
        latent = {
            "use_mla": True,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_rope_head_dim": model.qk_rope_head_dim,
        }
    kv = HybridLinearKVPool(
        size=16,
        dtype=dtype,
        page_size=1,
        full_attention_layer_ids=config.full_attention_layer_ids,
        device="cpu",
        mamba_pool=requests.mamba_pool,
        **heads,
        **latent,
    )
    return resolved(kv, dtype, requests, ComponentType.FULL, ComponentType.MAMBA)


def resolved(
    kv: Any, dtype: torch.dtype, requests: ReqToTokenPool, *components: ComponentType
) -> DevicePools:
    return resolve_pools(
        CacheInitParams(
            disable=False,
            req_to_token_pool=requests,
            token_to_kv_pool_allocator=TokenToKVPoolAllocator(16, dtype, "cpu", kv, False),
            page_size=1,
            tree_components=components,
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_models_pools_hold_what_was_said(family: str, dtype: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", family, dtype=dtype)
    with served(path, 1) as model:
        pools = pools_of(model, getattr(torch, dtype))
    size = size_of(read_config(path), precision=Precision(kv=dtype))
    assert pools.describe() == described(size)
    held = sum(b.tensor[0].numel() * b.tensor.element_size() for b in pools.buffers)
    assert held == size.state_bytes + size.kv_bytes_per_token


def test_a_float32_checkpoint_is_served_in_float16_unless_told(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model")
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    with served(path, 1) as model:
        assert DTYPES[model.dtype] == size_of(read_config(path)).kv_dtype == "F16"
