"""The tiny Falcon-H1: a Mamba-2 mixer and attention side by side in every layer, then an MLP."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import FalconH1Config, FalconH1ForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("parallel",)
DEFAULT_LAYERS = ("parallel",) * 4


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> FalconH1ForCausalLM:
    """Return the model in float32; every multiplier that the family has is another number.

    There is one group, as in the tiny Mamba-2, and no norm in the mixer, as in published models.
    """
    config = FalconH1Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=32,
        mamba_chunk_size=32,
        mamba_rms_norm=False,
        embedding_multiplier=4.0,
        lm_head_multiplier=2.0,
        key_multiplier=1.5,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.8,
        ssm_in_multiplier=1.1,
        ssm_out_multiplier=0.7,
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.05],
        mlp_multipliers=[0.9, 0.6],
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return FalconH1ForCausalLM(config)
