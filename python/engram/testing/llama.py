"""The tiny Llama: attention layers alone, grouped queries."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig, LlamaForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("attention",)
DEFAULT_LAYERS = ("attention",) * 4


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> LlamaForCausalLM:
    """Return the model in float32; head counts divide by two, for two tensor-parallel ranks."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return LlamaForCausalLM(config)
