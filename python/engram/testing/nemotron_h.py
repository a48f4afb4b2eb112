"""The tiny Nemotron-H: layers of one thing each, Mamba-2, attention, experts or an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import NemotronHConfig, NemotronHForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("mamba", "attention", "moe", "mlp")
DEFAULT_LAYERS = ("mamba", "moe", "attention", "mamba", "mlp", "attention")

_TRANSFORMERS_KINDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "moe": "moe",
    "mlp": "mlp",
}

_LETTERS = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> NemotronHForCausalLM:
    """Return the model in float32: six experts, two a token, beside a shared one."""
    return _build(layers, vocab_size, max_length, latent=None)


def build_latent(layers: Sequence[str], vocab_size: int, max_length: int) -> NemotronHForCausalLM:
    """Return the model whose experts work in a smaller space than the layers."""
    return _build(layers, vocab_size, max_length, latent=64)


def _build(
    layers: Sequence[str], vocab_size: int, max_length: int, *, latent: int | None
) -> NemotronHForCausalLM:
    config = NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        layers_block_type=[_TRANSFORMERS_KINDS[kind] for kind in layers],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=2,
        conv_kernel=4,
        expand=2,
        chunk_size=32,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=latent,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        # transformers lets no step be shorter than this, SGLang and the original code let all.
        time_step_min=1e-12,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return NemotronHForCausalLM(config)


def publish(fields: dict[str, Any]) -> None:
    """Say which layers there are as published checkpoints do, and the rest in SGLang's names.

    SGLang knows no `n_groups` and takes 8 instead; published checkpoints have 8.
    """
    fields["hybrid_override_pattern"] = "".join(
        _LETTERS[kind] for kind in fields.pop("layers_block_type")
    )
    fields["mamba_n_groups"] = fields["n_groups"]
    fields["mamba_d_conv"] = fields["conv_kernel"]
    fields["mamba_expand"] = fields["expand"]
    fields["mamba_chunk_size"] = fields["chunk_size"]
