"""The tiny Qwen3-Next and Qwen3.5: gated delta nets, and gated attention in every fourth layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("delta", "attention")
DEFAULT_LAYERS = ("delta", "attention", "delta", "attention")

_TRANSFORMERS_KINDS = {"delta": "linear_attention", "attention": "full_attention"}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def build_next(layers: Sequence[str], vocab_size: int, max_length: int) -> Qwen3NextForCausalLM:
    """Return the Qwen3-Next in float32; six experts, two a token, beside a gated shared one."""
    fields = _fields(layers, vocab_size, max_length)
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(**fields, **_EXPERTS, norm_topk_prob=True, intermediate_size=256)
    )


def build_dense(layers: Sequence[str], vocab_size: int, max_length: int) -> Qwen3_5ForCausalLM:
    """Return the text part of a dense Qwen3.5 in float32."""
    fields = _fields(layers, vocab_size, max_length)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**fields, intermediate_size=256))


def build_moe(layers: Sequence[str], vocab_size: int, max_length: int) -> Qwen3_5MoeForCausalLM:
    """Return the text part of a Qwen3.5 with experts in float32."""
    fields = _fields(layers, vocab_size, max_length)
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**fields, **_EXPERTS))


def _fields(layers: Sequence[str], vocab_size: int, max_length: int) -> dict[str, Any]:
    """What the three have in common; twice as many value heads as key heads, as in real ones.

    SGLang knows the layers by `full_attention_interval` alone, which published checkpoints have.
    """
    kinds = [_TRANSFORMERS_KINDS[kind] for kind in layers]
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": len(layers),
        "layer_types": kinds,
        "full_attention_interval": _interval(kinds),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 16,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(END_OF_TEXT),
        "pad_token_id": SPECIALS.index(PAD),
    }


def _interval(kinds: Sequence[str]) -> int:
    """Every so many layers comes attention. Raises `ValueError` if the layers are not like that."""
    interval = next((n for n, kind in enumerate(kinds, 1) if kind == "full_attention"), None)
    interval = interval or len(kinds) + 1
    periodic = [
        "linear_attention" if n % interval else "full_attention" for n in range(1, len(kinds) + 1)
    ]
    if list(kinds) != periodic:
        raise ValueError(f"attention must come every so many layers, first layer first: {kinds}")
    return interval
