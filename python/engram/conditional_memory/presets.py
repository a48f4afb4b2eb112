"""The memories of published models. `EngramConfig.preset` says what their sources leave open."""

from __future__ import annotations

from collections.abc import Mapping

_PAPER: dict[str, object] = {
    "vocab_size": 129280,
    "min_n": 2,
    "max_n": 3,
    "num_hash_heads": 8,
    "embedding_dim": 80,
    "hidden_dim": 2560,
    "layer_ids": (2, 15),
    "num_branches": 4,
    "gate_transform": "identity",
}

PRESETS: Mapping[str, Mapping[str, object]] = {
    "deepseek-v4.1-flash": {
        "vocab_size": 129280,
        "compressed_vocab_size": 99092,
        "min_n": 2,
        "max_n": 4,
        "num_hash_heads": 8,
        "embedding_table_size": 16_000_000,
        "embedding_dim": 256,
        "hidden_dim": 4096,
        "layer_ids": (1, 14),
        "pad_id": 2,
        "layout": "v41",
        "num_branches": 4,
        "use_conv": False,
        "gate_transform": "copysign_sqrt",
        "bias": False,
        "norm_eps": 1e-6,
    },
    "deepseek-demo": {
        "vocab_size": 129280,
        "min_n": 2,
        "max_n": 3,
        "num_hash_heads": 8,
        "embedding_table_size": 129280 * 5,
        "embedding_dim": 64,
        "hidden_dim": 1024,
        "layer_ids": (1, 15),
        "pad_id": 2,
        "num_branches": 4,
        "zero_init_conv": False,
    },
    "engram-27b": {**_PAPER, "embedding_table_size": 2_262_400},
    "engram-40b": {**_PAPER, "embedding_table_size": 7_239_680},
}
