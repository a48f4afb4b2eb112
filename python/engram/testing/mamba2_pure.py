"""The tiny pure Mamba-2: the architecture of Codestral-Mamba, no attention and no MLPs."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Mamba2Config, Mamba2ForCausalLM

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("mamba",)
DEFAULT_LAYERS = ("mamba",) * 6


def build(
    layers: Sequence[str], vocab_size: int, max_length: int, groups: int = 1
) -> Mamba2ForCausalLM:
    """Return the model in float32.

    `intermediate_size` and `rms_norm` are no fields of transformers' configuration, but SGLang
    reads them and published checkpoints have them.  With more than one of `groups` transformers
    normalises over all of them at once where SGLang, as the original code, does it group by group.
    """
    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        state_size=32,
        num_heads=8,
        head_dim=32,
        expand=2,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=32,
        num_hidden_layers=len(layers),
        max_position_embeddings=max_length,
        residual_in_fp32=False,
        intermediate_size=256,
        rms_norm=True,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END_OF_TEXT),
        pad_token_id=SPECIALS.index(PAD),
    )
    return Mamba2ForCausalLM(config)
