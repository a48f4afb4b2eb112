"""The whole memory of one layer, written again from the equations, one token at a time.

From the paper's section 2 and the demo's facts, not from the code under test: lists and loops in
float64 numpy, weights read by name from a state dict.
"""

from __future__ import annotations

import numpy as np
import torch

from engram.conditional_memory import EngramConfig


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + eps) * weight


def forward(
    config: EngramConfig,
    weights: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    rows: torch.Tensor,
    eps: float,
) -> tuple[np.ndarray, np.ndarray]:
    """``hidden`` [B, T, G, D], ``rows`` [B, T, C] of table rows; states and gate."""
    w = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
    h = hidden.detach().double().numpy()
    batch, tokens, branches, width = h.shape
    value = np.zeros_like(h)
    gates = np.zeros((batch, tokens, branches))
    for b in range(batch):
        for t in range(tokens):
            memory = np.concatenate([w["table.weight"][row] for row in rows[b, t].tolist()])
            keys = w["gate.key_proj.weight"] @ memory
            shared = w["gate.value_proj.weight"] @ memory
            if config.bias:
                keys = keys + w["gate.key_proj.bias"]
                shared = shared + w["gate.value_proj.bias"]
            for g in range(branches):
                key = rms_norm(
                    keys[g * width : (g + 1) * width],
                    w["gate.key_norm"][g],
                    eps if config.norm_eps is None else config.norm_eps,
                )
                query = rms_norm(
                    h[b, t, g],
                    w["gate.query_norm"][g],
                    eps if config.norm_eps is None else config.norm_eps,
                )
                score = float(key @ query) / width**0.5
                if config.gate_transform != "identity":
                    root = max(abs(score), 1e-6) ** 0.5
                    score = root if score > 0 else -root
                gates[b, t, g] = 1 / (1 + np.exp(-score))
                value[b, t, g] = gates[b, t, g] * shared
    output = value.copy()
    if config.use_conv:
        dilation = config.conv_dilation or config.max_n
        taps = w["conv.weight"].reshape(branches, width, -1)
        for b in range(batch):
            for t in range(tokens):
                for g in range(branches):
                    mixed = np.zeros(width)
                    for j in range(config.kernel_size):
                        earlier = t - (config.kernel_size - 1 - j) * dilation
                        if earlier >= 0:
                            normed = rms_norm(
                                value[b, earlier, g], w["conv.norm"][g], config.conv_norm_eps
                            )
                            mixed += taps[g, :, j] * normed
                    output[b, t, g] += mixed / (1 + np.exp(-mixed))
    return h + output, gates
