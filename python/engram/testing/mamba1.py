"""The tiny Mamba-1 in its two forms: Mamba, and Falcon-Mamba with norms on B, C and the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from engram.testing.tiny_tokenizer import END_OF_TEXT, PAD, SPECIALS

LAYER_KINDS = ("mamba",)
DEFAULT_LAYERS = ("mamba",) * 6


def build(layers: Sequence[str], vocab_size: int, max_length: int) -> MambaForCausalLM:
    """Return the Mamba in float32."""
    return MambaForCausalLM(MambaConfig(**_fields(layers, vocab_size, max_length)))


def build_falcon(layers: Sequence[str], vocab_size: int, max_length: int) -> FalconMambaForCausalLM:
    """Return the Falcon-Mamba in float32."""
    return FalconMambaForCausalLM(FalconMambaConfig(**_fields(layers, vocab_size, max_length)))


def _fields(layers: Sequence[str], vocab_size: int, max_length: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "num_hidden_layers": len(layers),
        "max_position_embeddings": max_length,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(END_OF_TEXT),
        "pad_token_id": SPECIALS.index(PAD),
    }
