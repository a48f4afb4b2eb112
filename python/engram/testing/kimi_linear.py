"""The tiny Kimi-Linear: Kimi delta attention and multi-head latent attention, with experts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import KimiLinearConfig, KimiLinearForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("kda", "mla")
DEFAULT_LAYERS = ("kda", "mla", "kda", "kda", "mla", "kda")

_TRANSFORMERS_KINDS = {"kda": "linear_attention", "mla": "full_attention"}
RENAMED = {"layers.0.block_sparse_moe.": "layers.0.mlp."}
"""transformers calls the dense MLP of the first layer as it calls the experts of the others."""

GAINS = {"kv_a_proj_with_mqa": 4.0}
"""transformers norms latent rows with an epsilon of its own, SGLang with the configured one; in
large rows neither shows."""

_HEADS, _HEAD_DIM, _KERNEL = 4, 32, 4


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> KimiLinearForCausalLM:
    """Return the model in float32: a dense first layer, then six experts, two a token.

    The fields at the end are those of published checkpoints, which SGLang reads and transformers
    does not write by itself.
    """
    config = KimiLinearConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=len(layers),
        layer_types=[_TRANSFORMERS_KINDS[kind] for kind in layers],
        num_attention_heads=4,
        num_key_value_heads=4,
        # Not the width of a head's keys without their position: a server that takes latent keys
        # for full ones must fail, not answer.
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        linear_num_heads=_HEADS,
        linear_head_dim=_HEAD_DIM,
        linear_conv_kernel_dim=_KERNEL,
        num_local_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        rms_norm_eps=1e-5,  # the published one; SGLang norms a delta layer's output with no other
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
        linear_attn_config={
            "kda_layers": [n for n, kind in enumerate(layers, 1) if kind == "kda"],
            "full_attn_layers": [n for n, kind in enumerate(layers, 1) if kind == "mla"],
            "num_heads": _HEADS,
            "head_dim": _HEAD_DIM,
            "short_conv_kernel_size": _KERNEL,
        },
        first_k_dense_replace=1,
        mla_use_nope=True,
        moe_router_activation_func="sigmoid",
    )
    return KimiLinearForCausalLM(config)
