"""Hash tokens/s: numpy, torch and the native kernel, one thread, one text of 2048 tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmark.conditional_memory.measure import interleaved

from engram.conditional_memory import EngramConfig, NgramHashLayout, kernel


def measure(seconds: float) -> dict[str, object]:
    """For each preset, tokens/s of all layers together, and over numpy."""
    return {name: _preset(name, seconds) for name in ("deepseek-demo", "deepseek-v4.1-flash")}


def _preset(name: str, seconds: float) -> dict[str, object]:
    config = EngramConfig.preset(name, compressed_vocab_size=99092)
    layout = NgramHashLayout(config)
    ids = torch.randint(0, 99092, (1, 2048), generator=torch.Generator().manual_seed(1))
    window = layout.window(layout.start(1), ids)

    def of(backend: str, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: [
            layout.hash_window(window, layer, backend=backend, dtype=dtype)
            for layer in config.layer_ids
        ]

    works = {"numpy": of("numpy", torch.int64), "torch": of("torch", torch.int64)}
    if native := kernel.load():
        works["kernel int64"] = of("kernel", torch.int64)
        works["kernel int32"] = of("kernel", torch.int32)
        out = torch.empty(1, 2048, config.num_columns, dtype=torch.int32)
        works["kernel int32, output reused"] = lambda: [
            native.hash_window(window, layout.plan(layer), True, torch.int32, out)
            for layer in config.layer_ids
        ]
    rates = interleaved(works, ids.numel(), seconds)
    return {
        "ids_per_token": config.num_columns * len(config.layer_ids),
        "tokens_per_s": rates,
        "over_numpy": {key: value / rates["numpy"] for key, value in rates.items()},
    }
