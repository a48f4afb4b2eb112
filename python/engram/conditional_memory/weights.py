"""Weights of the official demo's ``Engram``, brought here and taken back.

| demo | here |
|---|---|
| ``multi_head_embedding.embedding.weight`` | ``table.weight`` |
| ``multi_head_embedding.offsets`` | from the layout; checked |
| ``key_projs.<branch>.{weight,bias}`` | ``gate.key_proj.{weight,bias}``, branches side by side |
| ``value_proj.{weight,bias}`` | ``gate.value_proj.{weight,bias}`` |
| ``norm1.<branch>.weight`` | ``gate.key_norm[branch]`` |
| ``norm2.<branch>.weight`` | ``gate.query_norm[branch]`` |
| ``short_conv.conv.weight`` [G * D, 1, K] | ``conv.weight`` [G * D, K] |
| ``short_conv.norms.<branch>.weight`` | ``conv.norm[branch]`` |

V4.1's layer (``wkv``, ``q_weight``, ``k_weight``) goes through `load_v41`; its table is loaded with
`engram.conditional_memory.safetensors_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from engram.conditional_memory.module import EngramModule
from engram.conditional_memory.tables.memory import TorchTable
from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError

State = Mapping[str, torch.Tensor]

_TABLE = "multi_head_embedding.embedding.weight"
_OFFSETS = "multi_head_embedding.offsets"
# What follows from the config, and the table where it is no module.
_NOT_CONVERTED = ("hash_multipliers", "hash_primes", "compression.lookup")


def load_demo(module: EngramModule, state: State) -> None:
    """Load the state dict of a demo's ``Engram`` into ``module``, whose config must describe it.

    A table that is no `TorchTable` is left as it is.

    Raises:
        InvalidRequestError: a weight is missing, superfluous or has another shape.
    """
    rest = dict(state)
    own: dict[str, torch.Tensor] = {}
    branches = range(module.config.num_branches)

    def stacked(pattern: str) -> torch.Tensor:
        parts = [_take(rest, pattern.format(branch)) for branch in branches]
        if len({part.shape for part in parts}) != 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise InvalidRequestError(
                f"{pattern.format('*')} have different shapes: {shapes}",
                hint="does the config describe this checkpoint?",
            )
        return torch.stack(parts)

    table, offsets = _take(rest, _TABLE), _take(rest, _OFFSETS)
    expected = torch.tensor(module.layout.offsets(module.config.layer_id))
    if not torch.equal(offsets.cpu(), expected):
        raise InvalidRequestError(
            f"{_OFFSETS} are not those of layer {module.config.layer_id}",
            hint="layer_ids and their order, and embedding_table_size, must be the demo's",
        )
    if isinstance(module.table, TorchTable):
        own["table.weight"] = table
    for part in ("weight", "bias") if module.config.bias else ("weight",):
        own[f"gate.key_proj.{part}"] = stacked(f"key_projs.{{}}.{part}").flatten(0, 1)
        own[f"gate.value_proj.{part}"] = _take(rest, f"value_proj.{part}")
    own["gate.key_norm"] = stacked("norm1.{}.weight")
    own["gate.query_norm"] = stacked("norm2.{}.weight")
    if module.conv is not None:
        own["conv.weight"] = _take(rest, "short_conv.conv.weight").squeeze(1)
        own["conv.norm"] = stacked("short_conv.norms.{}.weight")
    _load(module, own, rest)


def to_demo(module: EngramModule) -> dict[str, torch.Tensor]:
    """The state dict that a demo's ``Engram`` with these weights has.

    Raises:
        InvalidRequestError: the demo has no such module: without convolution or bias, with a table
            that is no `TorchTable` of numbers, or with another gate, norm, convolution or hash.
    """
    config = module.config
    demo = replace(
        config,
        layout="official",
        min_n=2,
        gate_transform="signed_sqrt",
        norm_eps=None,
        conv_norm_eps=1e-5,
        conv_dilation=config.max_n,
    )
    if demo != replace(config, conv_dilation=config.dilation):
        raise InvalidRequestError(
            "the demo would compute something else with these weights",
            hint="it has layout 'official', min_n 2, gate 'signed_sqrt', norm_eps None, "
            "conv_norm_eps 1e-5 and conv_dilation max_n",
        )
    numbers = isinstance(module.table, TorchTable) and module.table.format is not RowFormat.FP8
    if module.conv is None or not config.bias or not numbers:
        raise InvalidRequestError(
            "the demo has a convolution, biases and its table in memory; this module has not",
            hint="convert a module with use_conv, bias and a TorchTable",
        )
    own = module.state_dict()
    state = {
        _TABLE: own["table.weight"],
        _OFFSETS: torch.tensor(module.layout.offsets(module.config.layer_id)),
        "short_conv.conv.weight": own["conv.weight"].unsqueeze(1),
    }
    for part in ("weight", "bias"):
        state[f"value_proj.{part}"] = own[f"gate.value_proj.{part}"]
    for branch in range(module.config.num_branches):
        rows = slice(branch * module.config.hidden_dim, (branch + 1) * module.config.hidden_dim)
        for part in ("weight", "bias"):
            state[f"key_projs.{branch}.{part}"] = own[f"gate.key_proj.{part}"][rows]
        state[f"norm1.{branch}.weight"] = own["gate.key_norm"][branch]
        state[f"norm2.{branch}.weight"] = own["gate.query_norm"][branch]
        state[f"short_conv.norms.{branch}.weight"] = own["conv.norm"][branch]
    return {name: tensor.clone() for name, tensor in state.items()}


def load_v41(module: EngramModule, state: State) -> None:
    """Load a V4.1 layer's ``wkv.weight`` (dequantised), ``q_weight`` and ``k_weight``.

    ``wkv`` holds one key projection a branch and then the value projection. Raises
    `InvalidRequestError` as `load_demo` does.
    """
    rest = dict(state)
    keys = module.config.num_branches * module.config.hidden_dim
    wkv = _take(rest, "wkv.weight")
    own = {
        "gate.key_proj.weight": wkv[:keys],
        "gate.value_proj.weight": wkv[keys:],
        "gate.query_norm": _take(rest, "q_weight"),
        "gate.key_norm": _take(rest, "k_weight"),
    }
    kept = {name: t for name, t in module.state_dict().items() if name.startswith("table.")}
    own.update(kept)
    _load(module, own, rest)


def _take(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state:
        raise InvalidRequestError(
            f"the state dict has no {name}", hint="does the config describe this checkpoint?"
        )
    return state.pop(name)


def _load(module: EngramModule, own: State, rest: State) -> None:
    wanted = {name: t for name, t in module.state_dict().items() if name not in _NOT_CONVERTED}
    problems = [f"{name} is superfluous" for name in rest]
    problems += [f"{name} is missing" for name in wanted if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise InvalidRequestError(
            f"the weights do not fit: {'; '.join(problems)}",
            hint="does the config describe this checkpoint?",
        )
    module.load_state_dict(own, strict=False)
