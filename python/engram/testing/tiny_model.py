"""Small models with random weights, written as model directories that SGLang serves.

    python -m engram.testing.tiny_model --family granite-hybrid --out DIR --seed 0

The same seed writes the same bytes. The weights mean nothing, but they are scaled so that greedy
output varies and every token read counts long after: a test in which a wrong state changes nothing
would prove nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from engram.testing import (
    falcon_h1,
    gated_delta,
    granite_hybrid,
    kimi_linear,
    lfm2,
    llama,
    mamba1,
    mamba2_pure,
    nemotron_h,
    qwen3,
)
from engram.testing.tiny_tokenizer import BYTES, SPECIALS, build_tokenizer

MAX_LENGTH = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """One kind of tiny model.

    `build(layers, vocab_size, max_length)` returns the untrained model in float32; `layers` is a
    sequence of the family's layer kinds, of which `default_layers` is the usual one. `gains` makes
    the weights of modules (by name) larger where the family has no multiplier of its own for it.
    `publish(fields)` changes the fields of config.json to what published checkpoints have and
    SGLang reads, `renamed` says the same of parts of weights' names.
    """

    build: Callable[[Sequence[str], int, int], PreTrainedModel]
    layer_kinds: tuple[str, ...]
    default_layers: tuple[str, ...]
    gains: Mapping[str, float] = field(default_factory=dict)
    publish: Callable[[dict[str, Any]], None] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


KEPT = {
    "mamba": ("conv0", "ssm"),
    "delta": ("conv0", "ssm"),
    "kda": ("conv0", "ssm"),
    "conv": ("conv0",),
    "attention": ("k", "v"),
    "mla": ("kv",),
    "parallel": ("conv0", "k", "ssm", "v"),
    "moe": (),
    "mlp": (),
}
"""Kind of a layer -> what a server keeps of it, by the names that segments have for it."""

# A wider head gives a reply's best token a lead over the next that rounding cannot take. Sharp
# queries look at some tokens more than at others; else a reply is soon one token again and again.
_WIDE_HEAD = {"lm_head": 4.0}
# Norms that scale by 1 more than their weight widen what comes to the head themselves.
_WIDER_HEAD = {"lm_head": 2.0}


FAMILIES = {
    "granite-hybrid": Family(
        granite_hybrid.build, granite_hybrid.LAYER_KINDS, granite_hybrid.DEFAULT_LAYERS
    ),
    "granite-moe": Family(
        granite_hybrid.build_moe, granite_hybrid.LAYER_KINDS, granite_hybrid.DEFAULT_LAYERS
    ),
    "mamba2": Family(
        mamba2_pure.build, mamba2_pure.LAYER_KINDS, mamba2_pure.DEFAULT_LAYERS, _WIDE_HEAD
    ),
    "falcon-h1": Family(
        falcon_h1.build, falcon_h1.LAYER_KINDS, falcon_h1.DEFAULT_LAYERS, {"q_proj": 4.0}
    ),
    "mamba": Family(mamba1.build, mamba1.LAYER_KINDS, mamba1.DEFAULT_LAYERS, _WIDE_HEAD),
    "falcon-mamba": Family(
        mamba1.build_falcon, mamba1.LAYER_KINDS, mamba1.DEFAULT_LAYERS, _WIDE_HEAD
    ),
    "lfm2": Family(
        lfm2.build, lfm2.LAYER_KINDS, lfm2.DEFAULT_LAYERS, {**_WIDE_HEAD, "q_layernorm": 4.0}
    ),
    "lfm2-moe": Family(
        lfm2.build_moe, lfm2.LAYER_KINDS, lfm2.DEFAULT_LAYERS, {**_WIDE_HEAD, "q_layernorm": 4.0}
    ),
    "qwen3-next": Family(
        gated_delta.build_next, gated_delta.LAYER_KINDS, gated_delta.DEFAULT_LAYERS, _WIDER_HEAD
    ),
    "qwen3.5": Family(
        gated_delta.build_dense, gated_delta.LAYER_KINDS, gated_delta.DEFAULT_LAYERS, _WIDER_HEAD
    ),
    "qwen3.5-moe": Family(
        gated_delta.build_moe, gated_delta.LAYER_KINDS, gated_delta.DEFAULT_LAYERS, _WIDER_HEAD
    ),
    "nemotron-h": Family(
        nemotron_h.build,
        nemotron_h.LAYER_KINDS,
        nemotron_h.DEFAULT_LAYERS,
        _WIDE_HEAD,
        nemotron_h.publish,
    ),
    "nemotron-h-latent": Family(
        nemotron_h.build_latent,
        nemotron_h.LAYER_KINDS,
        nemotron_h.DEFAULT_LAYERS,
        _WIDE_HEAD,
        nemotron_h.publish,
    ),
    "kimi-linear": Family(
        kimi_linear.build,
        kimi_linear.LAYER_KINDS,
        kimi_linear.DEFAULT_LAYERS,
        {**_WIDE_HEAD, **kimi_linear.GAINS},
        renamed=kimi_linear.RENAMED,
    ),
    "llama": Family(
        llama.build, llama.LAYER_KINDS, llama.DEFAULT_LAYERS, {**_WIDE_HEAD, "q_proj": 4.0}
    ),
    "qwen3": Family(
        qwen3.build, qwen3.LAYER_KINDS, qwen3.DEFAULT_LAYERS, {**_WIDE_HEAD, "q_norm": 4.0}
    ),
}


def write_tiny_model(
    out: str | Path,
    family: str = "granite-hybrid",
    seed: int = 0,
    dtype: str = "float32",
    layers: Sequence[str] | None = None,
    force: bool = False,
    max_length: int = MAX_LENGTH,
) -> Path:
    """Write a model directory: config, weights, tokenizer with chat template, generation config.

    Args:
        out: the directory; made if missing.
        family: a key of `FAMILIES`.
        seed: of the weights.
        dtype: "float32" or "bfloat16", of the weights and in the config.
        layers: kinds of the family, first layer first.
        force: write into a directory that is not empty, replacing files of the same names.
        max_length: tokens a sequence may have.

    Returns:
        The directory.

    Raises:
        ValueError: unknown family, dtype or layer kind, or a negative seed.
        FileExistsError: the directory is not empty and `force` is not given.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; supported: {', '.join(sorted(FAMILIES))}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    spec = FAMILIES[family]
    kinds = tuple(spec.default_layers if layers is None else layers)
    unknown = sorted(set(kinds) - set(spec.layer_kinds))
    if unknown or not kinds:
        raise ValueError(
            f"unknown or no layer kinds {unknown}; {family} has {', '.join(spec.layer_kinds)}"
        )
    out = Path(out)
    _make_directory(out, force)

    tokenizer = build_tokenizer(max_length)
    model = spec.build(kinds, len(tokenizer), max_length)
    fill_weights(model, seed, spec.gains)
    model.to(DTYPES[dtype]).save_pretrained(out)
    _publish(out, spec)
    tokenizer.save_pretrained(out)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(out)
    return out


def _publish(out: Path, spec: Family) -> None:
    """Make the files those of a published checkpoint, where transformers writes others."""
    if spec.publish is not None:
        config = out / "config.json"
        fields = json.loads(config.read_text())
        spec.publish(fields)
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if spec.renamed:
        file = out / "model.safetensors"
        weights = {}
        for name, weight in load_file(file).items():
            for old, new in spec.renamed.items():
                name = name.replace(old, new)
            weights[name] = weight
        save_file(weights, file, {"format": "pt"})


def fill_weights(
    model: PreTrainedModel, seed: int, gains: Mapping[str, float] | None = None
) -> None:
    """Draw every weight of the model from one generator, in the order of the parameters' names.

    Matrices keep the variance of their input, but for the gains that modules have by their names.
    State-space layers forget with half-lives between a few tokens and a thousand (a fresh Mamba-2
    has shorter ones), and write into their state enough for a token to be seen a hundred tokens on.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    for name, parameter in sorted(model.named_parameters()):
        *_, module, leaf = name.split(".")
        if leaf == "A_log":
            value = uniform(parameter.shape, math.log(0.05), math.log(1.0))
        elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
            step = uniform(parameter.shape, math.log(0.01), math.log(0.3)).exp()
            value = torch.log(torch.expm1(step))  # softplus gives the step back
        elif leaf == "D" or "norm" in name:
            value = uniform(parameter.shape, 0.5, 1.5)
        elif parameter.dim() == 1:
            value = uniform(parameter.shape, -0.1, 0.1)
        else:
            fan_in = parameter.shape[-1]  # of experts too, which lie in one tensor
            value = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
        parameter.data.copy_(value * (gains or {}).get(module, 1.0))
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("_bias"):  # by which routers choose experts, but do not weigh them
            buffer.data.copy_(uniform(buffer.shape, -0.1, 0.1))

    # The model never says a role or a byte escape: their logits are 0, and another is above that.
    head = model.get_output_embeddings().weight.data
    head[1 : len(SPECIALS)] = 0
    head[-len(BYTES) :] = 0


def _make_directory(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; --force writes into it all the same")
    out.mkdir(parents=True, exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engram.testing.tiny_model",
        description="Write a small random model.",
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), default="granite-hybrid")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--layers", help="layer kinds, comma-separated, first layer first")
    parser.add_argument(
        "--force", action="store_true", help="write into DIR though it is not empty"
    )
    options = parser.parse_args(arguments)
    layers = options.layers.split(",") if options.layers else None
    try:
        out = write_tiny_model(
            options.out,
            options.family,
            options.seed,
            options.dtype,
            layers,
            options.force,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
