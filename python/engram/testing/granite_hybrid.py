"""The tiny Granite-4.0-H: attention and Mamba-2 layers, and in each a dense MLP, or experts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("mamba", "attention")
DEFAULT_LAYERS = ("mamba", "attention", "mamba", "mamba", "attention", "mamba")

_TRANSFORMERS_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> GraniteMoeHybridForCausalLM:
    """Return the dense model in float32; head counts divide by two, for two ranks."""
    return _build(layers, vocab_size, max_length, experts=0, experts_per_token=0)


def build_moe(
    layers: Sequence[str], vocab_size: int, max_length: int
) -> GraniteMoeHybridForCausalLM:
    """Return the model with six experts, two a token, beside the shared MLP of each layer."""
    return _build(layers, vocab_size, max_length, experts=6, experts_per_token=2)


def _build(
    layers: Sequence[str],
    vocab_size: int,
    max_length: int,
    *,
    experts: int,
    experts_per_token: int,
) -> GraniteMoeHybridForCausalLM:
    config = GraniteMoeHybridConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        shared_intermediate_size=256,
        intermediate_size=64 if experts else 256,
        num_hidden_layers=len(layers),
        layer_types=[_TRANSFORMERS_KINDS[kind] for kind in layers],
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.125,
        embedding_multiplier=4.0,
        logits_scaling=0.25,
        residual_multiplier=0.5,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=32,
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
        max_position_embeddings=max_length,
        position_embedding_type="nope",
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return GraniteMoeHybridForCausalLM(config)
