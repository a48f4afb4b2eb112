"""The tiny Qwen3: attention layers alone, with norms on queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Qwen3Config, Qwen3ForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("attention",)
DEFAULT_LAYERS = ("attention",) * 4


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> Qwen3ForCausalLM:
    """Return the model in float32; as in real ones the heads are wider than the model."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return Qwen3ForCausalLM(config)
