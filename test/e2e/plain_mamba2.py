"""Mamba-2 as its paper has it, one token after another in float64: no chunks, no kernels.

For what `transformers` computes in another way: with several groups it normalises the gated output
over all of them at once, the original code and SGLang group by group.

Source: Dao and Gu, "Transformers are SSMs" (2024); `Mamba2` and its grouped norm in their code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu, softplus

from e2e.reference import NEW_TOKENS, Expected, assert_varied


class PlainMamba2:
    """A model of a directory, and the state after the tokens it was given."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.heads, self.head_dim = self.config["num_heads"], self.config["head_dim"]
        self.groups, self.size = self.config["n_groups"], self.config["state_size"]
        self.inner = self.heads * self.head_dim
        channels = self.inner + 2 * self.groups * self.size
        layers = self.config["num_hidden_layers"]
        kernel = self.config["conv_kernel"]
        self.windows = torch.zeros(layers, channels, kernel, dtype=torch.float64)
        self.states = torch.zeros(layers, self.heads, self.head_dim, self.size, dtype=torch.float64)

    def step(self, token: int) -> torch.Tensor:
        """Log-probabilities of what follows, [vocabulary] float64."""
        hidden = self.weights["backbone.embeddings.weight"][token]
        for layer in range(len(self.states)):
            norm = self.weights[f"backbone.layers.{layer}.norm.weight"]
            hidden = hidden + self._mix(layer, self._rms(hidden) * norm)
        hidden = self._rms(hidden) * self.weights["backbone.norm_f.weight"]
        return torch.log_softmax(self.weights["lm_head.weight"] @ hidden, -1)

    def _mix(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        own = {
            name: self.weights[f"backbone.layers.{layer}.mixer.{name}"]
            for name in (
                *("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"),
                *("norm.weight", "out_proj.weight"),
            )
        }
        shared = self.groups * self.size
        gate, mixed, step = (own["in_proj.weight"] @ hidden).split(
            [self.inner, self.inner + 2 * shared, self.heads]
        )
        window = self.windows[layer] = torch.cat([self.windows[layer][:, 1:], mixed[:, None]], 1)
        mixed = silu((window * own["conv1d.weight"][:, 0]).sum(1) + own["conv1d.bias"])
        value, key, query = mixed.split([self.inner, shared, shared])
        value = value.view(self.heads, self.head_dim)
        # The heads of a group share its key and query.
        each = self.heads // self.groups
        key, query = (
            one.view(self.groups, self.size).repeat_interleave(each, 0) for one in (key, query)
        )
        step = softplus(step + own["dt_bias"])
        decay = torch.exp(-step * torch.exp(own["A_log"]))
        added = (step[:, None] * value)[:, :, None] * key[:, None, :]
        state = self.states[layer] = decay[:, None, None] * self.states[layer] + added
        output = (state @ query[:, :, None])[:, :, 0] + own["D"][:, None] * value
        gated = (output.reshape(-1) * silu(gate)).view(self.groups, -1)
        normed = self._rms(gated).reshape(-1) * own["norm.weight"]
        return own["out_proj.weight"] @ normed

    def _rms(self, values: torch.Tensor) -> torch.Tensor:
        epsilon: float = self.config["layer_norm_epsilon"]
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)


def expect_plain(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Expected]:
    """What the model in `folder` answers: `e2e.reference.expect`, of the recurrence."""
    found = []
    for prompt in prompts:
        model, reply, scores = PlainMamba2(folder), [], []
        follows = model.step(prompt[0])
        for token in prompt[1:]:
            scores.append(float(follows[token]))
            follows = model.step(token)
        for _ in range(NEW_TOKENS):
            reply.append(int(follows.argmax()))
            scores.append(float(follows[reply[-1]]))
            follows = model.step(reply[-1])
        found.append(Expected(list(prompt), reply, scores))
    assert_varied(found)
    return found
