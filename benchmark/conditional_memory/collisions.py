"""Collisions against the number of heads, on the n-grams of real text."""

from __future__ import annotations

import numpy as np
import torch
from benchmark.conditional_memory.measure import real_text, token_ids, tokenizer_of

from engram.conditional_memory import EngramConfig, NgramHashLayout, TokenCompression

HEADS = (1, 2, 4, 8, 16)
TOTAL_ROWS = 1 << 21


def measure(seconds: float) -> dict[str, object]:
    """Distinct trigrams none of whose rows is their own, by heads; and how layouts spread."""
    text = real_text()
    tokenizer = tokenizer_of(text)
    compression = TokenCompression.from_tokenizer(tokenizer)
    ids = torch.from_numpy(token_ids(tokenizer, text)[: 1 << 20])
    compressed = compression(ids).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(compressed, 3)
    trigrams = np.unique(windows, axis=0)
    return {
        "tokens": ids.numel(),
        "distinct_trigrams": len(trigrams),
        "same_rows_a_head": [_shared(trigrams, compression, h, TOTAL_ROWS // 2) for h in HEADS],
        "same_rows_in_all": [_shared(trigrams, compression, h, TOTAL_ROWS // h) for h in HEADS],
        "heads": list(HEADS),
        "rows_a_head": TOTAL_ROWS // 2,
        "rows_in_all": TOTAL_ROWS,
        "layouts": {
            layout: _used(trigrams, compression, layout) for layout in ("official", "polynomial")
        },
    }


def _hashes(
    trigrams: np.ndarray, compression: TokenCompression, heads: int, rows: int, layout: str
) -> np.ndarray:
    """[n, heads]: the rows of every trigram in its third order."""
    config = EngramConfig(
        vocab_size=compression.size,
        min_n=3,
        max_n=3,
        num_hash_heads=heads,
        embedding_table_size=rows,
        layer_ids=(1,),
        layout=layout,
    )
    hashed = NgramHashLayout(config).hash(trigrams, with_offsets=False)
    return hashed[:, 2]


def _shared(trigrams: np.ndarray, compression: TokenCompression, heads: int, rows: int) -> float:
    """The part of the trigrams that share every one of their rows with another."""
    shared = np.ones(len(trigrams), dtype=bool)
    for head in _hashes(trigrams, compression, heads, rows, "official").T:
        shared &= np.bincount(head)[head] > 1
    return float(shared.mean())


def _used(trigrams: np.ndarray, compression: TokenCompression, layout: str) -> list[int]:
    """Of a million rows, how many each of four heads uses for half a million trigrams."""
    some = trigrams[np.random.default_rng(1).permutation(len(trigrams))[: 1 << 19]]
    hashes = _hashes(some, compression, 4, 1_000_000, layout)
    return [len(np.unique(head)) for head in hashes.T]
