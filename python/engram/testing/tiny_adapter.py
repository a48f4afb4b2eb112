"""A small LoRA adapter of random weights for a tiny model, as PEFT writes one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_tiny_adapter(out: str | Path, model: str | Path, seed: int) -> Path:
    """Write an adapter of the attention projections of the model in `model`; the same seed writes
    the same bytes.

    Its weights are large enough for replies to be other ones than the model's own.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(model) / "config.json").read_text())
    width, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "q_proj": (width, heads * head),
        "k_proj": (width, kv_heads * head),
        "v_proj": (width, kv_heads * head),
        "o_proj": (heads * head, width),
    }
    numbers = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (into, outof) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down = torch.randn(RANK, into, generator=numbers) / into**0.5
            up = torch.randn(outof, RANK, generator=numbers) / RANK**0.5
            weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = down, up
    save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(MODULES),
        "bias": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return out
