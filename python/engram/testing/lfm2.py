"""The tiny LFM2: gated short convolutions and attention, with dense MLPs, or experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("conv", "attention")
DEFAULT_LAYERS = ("conv", "attention", "conv", "conv", "attention", "conv")

_TRANSFORMERS_KINDS = {"conv": "conv", "attention": "full_attention"}


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> Lfm2ForCausalLM:
    """Return the dense model in float32."""
    config = Lfm2Config(
        **_fields(layers, vocab_size, max_length),
        intermediate_size=256,
        block_auto_adjust_ff_dim=False,
    )
    return Lfm2ForCausalLM(config)


def build_moe(layers: Sequence[str], vocab_size: int, max_length: int) -> Lfm2MoeForCausalLM:
    """Return the model with a dense first layer, then six experts, two a token."""
    config = Lfm2MoeConfig(
        **_fields(layers, vocab_size, max_length),
        intermediate_size=256,
        moe_intermediate_size=64,
        num_dense_layers=1,
        num_experts=6,
        num_experts_per_tok=2,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )
    return Lfm2MoeForCausalLM(config)


def _fields(layers: Sequence[str], vocab_size: int, max_length: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": len(layers),
        "layer_types": [_TRANSFORMERS_KINDS[kind] for kind in layers],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(END_OF_TEXT),
        "pad_token_id": SPECIALS.index(PAD),
    }
