"""Which layers an architecture has, read from its configuration.

The fields, their other names and their defaults are those that SGLang 0.5.23 reads
(``sglang/srt/configs``). Add an architecture by a function and its row in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from engram.errors import InvalidRequestError, UnsupportedError
from engram.sizing.buffers import (
    Buffer,
    State,
    kda_state,
    mamba1_state,
    mamba2_state,
    mha_rows,
    mla_rows,
    short_conv_state,
)
from engram.sizing.config import Config

DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What configurations call dtypes -> what segments call them."""

# SGLang's own ways to spell a layer's kind, and those of newer checkpoints.
_RECURRENT: Final = frozenset({"mamba", "linear_attention", "conv", "short_conv"})
_ATTENTION: Final = frozenset({"attention", "full_attention"})
_NEITHER: Final = frozenset({"mlp", "moe"})
_PATTERN: Final = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class Precision:
    """The dtypes of the pools, as configurations spell them; None: what SGLang would choose."""

    conv: str | None = None
    state: str | None = None
    kv: str | None = None


@dataclass(frozen=True)
class Layout:
    """What is being put together: the configuration, the number of ranks and the dtypes."""

    config: Config
    ranks: int
    conv_dtype: str
    state_dtype: str
    kv_dtype: str

    def states(self, layers: Iterable[int], state: State) -> list[Buffer]:
        """The same state on each of some layers."""
        return [b for n in layers for b in state.buffers(n, self.conv_dtype, self.state_dtype)]

    def attention(self, layers: Iterable[int], head_dim: int | None = None) -> list[Buffer]:
        """Keys and values on each of some layers; without ``head_dim`` as the configuration says.

        No layers, no fields: a pure Mamba has none about attention.
        """
        layers = list(layers)
        if not layers:
            return []
        heads = self.config.count("num_attention_heads")
        kv_heads = self.config.count("num_key_value_heads", default=heads)
        if head_dim is None:
            own = self.config.count("hidden_size") // heads
            head_dim = self.config.count("head_dim", default=own)
        return [
            buffer
            for layer in layers
            for buffer in mha_rows(
                layer,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=self.kv_dtype,
                ranks=self.ranks,
            )
        ]


def _granite_hybrid(layout: Layout) -> list[Buffer]:
    config = layout.config
    names = config.strings("layer_types")
    if names is None:
        raise InvalidRequestError(f"{config.source} has no 'layer_types'")
    recurrent, attention = _kinds(config, names)
    heads, head_dim = config.count("mamba_n_heads"), config.count("mamba_d_head")
    state = mamba2_state(
        channels=heads * head_dim,
        groups=config.count("mamba_n_groups", default=1),
        heads=heads,
        head_dim=head_dim,
        state=config.count("mamba_d_state"),
        kernel=config.count("mamba_d_conv", default=4),
        ranks=layout.ranks,
    )
    # SGLang's class for this model knows no head_dim of its own.
    own = config.count("hidden_size") // config.count("num_attention_heads")
    return layout.states(recurrent, state) + layout.attention(attention, own)


def _mamba2(layout: Layout) -> list[Buffer]:
    config = layout.config
    heads, head_dim = config.count("num_heads"), config.count("head_dim")
    state = mamba2_state(
        channels=config.count("intermediate_size", default=heads * head_dim),
        groups=config.count("n_groups"),
        heads=heads,
        head_dim=head_dim,
        state=config.count("state_size"),
        kernel=config.count("conv_kernel", default=4),
        ranks=layout.ranks,
    )
    return layout.states(config.layers, state)


def _mamba1(layout: Layout) -> list[Buffer]:
    config = layout.config
    state = mamba1_state(
        channels=config.count("intermediate_size"),
        state=config.count("state_size"),
        kernel=config.count("conv_kernel", default=4),
        ranks=layout.ranks,
    )
    return layout.states(config.layers, state)


def _nemotron_h(layout: Layout) -> list[Buffer]:
    config = layout.config
    names = config.strings("layers_block_type")
    if names is None:
        pattern = config.word("hybrid_override_pattern")
        if pattern is None:
            raise InvalidRequestError(
                f"{config.source} has neither 'layers_block_type' nor 'hybrid_override_pattern'"
            )
        names = [_PATTERN.get(letter, letter) for letter in pattern]
    recurrent, attention = _kinds(config, names)
    heads, head_dim = config.count("mamba_num_heads"), config.count("mamba_head_dim")
    state = mamba2_state(
        channels=heads * head_dim,
        groups=config.count("n_groups", "mamba_n_groups"),
        heads=heads,
        head_dim=head_dim,
        state=config.count("ssm_state_size"),
        kernel=config.count("conv_kernel", "mamba_d_conv", default=4),
        ranks=layout.ranks,
    )
    own = config.count("head_dim", default=128)
    return layout.states(recurrent, state) + layout.attention(attention, own)


def _falcon_h1(layout: Layout) -> list[Buffer]:
    config = layout.config
    layers = config.layers
    heads = config.count("mamba_n_heads")
    channels = config.count("mamba_d_ssm")
    state = mamba2_state(
        channels=channels,
        groups=config.count("mamba_n_groups", default=1),
        heads=heads,
        head_dim=channels // heads,
        state=config.count("mamba_d_state"),
        kernel=config.count("mamba_d_conv", default=4),
        ranks=layout.ranks,
    )
    # Every layer has both, side by side.
    return layout.states(layers, state) + layout.attention(layers)


def _gated_delta(layout: Layout) -> list[Buffer]:
    config = layout.config
    recurrent, attention = _kinds(config, _interval_or_types(config))
    keys, key_dim = config.count("linear_num_key_heads"), config.count("linear_key_head_dim")
    values, dim = config.count("linear_num_value_heads"), config.count("linear_value_head_dim")
    state = mamba2_state(
        channels=values * dim,
        groups=keys,
        heads=values,
        head_dim=dim,
        state=key_dim,
        kernel=config.count("linear_conv_kernel_dim", default=4),
        ranks=layout.ranks,
    )
    own = config.count("head_dim", default=256)
    return layout.states(recurrent, state) + layout.attention(attention, own)


def _kimi_linear(layout: Layout) -> list[Buffer]:
    config = layout.config
    linear = config.inner("linear_attn_config")
    numbered_from_one = linear.numbers("kda_layers")
    if numbered_from_one is None:
        raise InvalidRequestError(f"{linear.source} has no 'kda_layers'")
    recurrent = {n - 1 for n in numbered_from_one}
    layers = config.layers
    state = kda_state(
        heads=linear.count("num_heads"),
        head_dim=linear.count("head_dim"),
        kernel=linear.count("short_conv_kernel_size"),
        ranks=layout.ranks,
    )
    latent, rope = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    rows = [
        buffer
        for layer in layers
        if layer not in recurrent
        for buffer in mla_rows(layer, latent=latent, rope=rope, dtype=layout.kv_dtype)
    ]
    return layout.states((n for n in layers if n in recurrent), state) + rows


def _lfm2(layout: Layout) -> list[Buffer]:
    config = layout.config
    names = config.strings("layer_types")
    if names is None:
        full = config.numbers("full_attn_idxs")
        if full is None:
            raise InvalidRequestError(
                f"{config.source} has neither 'layer_types' nor 'full_attn_idxs'"
            )
        layers = config.layers
        names = ["full_attention" if n in full else "conv" for n in layers]
    recurrent, attention = _kinds(config, names)
    state = short_conv_state(
        channels=config.count("hidden_size"),
        kernel=config.count("conv_L_cache"),
        ranks=layout.ranks,
    )
    return layout.states(recurrent, state) + layout.attention(attention)


def _attention_only(layout: Layout) -> list[Buffer]:
    return layout.attention(layout.config.layers)


@dataclass(frozen=True)
class Family:
    """One architecture: its layers, and what is particular about how it is configured.

    ``wrapped`` says that the language part is inside ``text_config``, ``chooses_state_dtype`` that
    SGLang takes the state's dtype from the configuration.
    """

    buffers: Callable[[Layout], list[Buffer]]
    wrapped: bool = False
    chooses_state_dtype: bool = False


ARCHITECTURES: Final[dict[str, Family]] = {
    "FalconH1ForCausalLM": Family(_falcon_h1, chooses_state_dtype=True),
    "FalconMambaForCausalLM": Family(_mamba1),
    "GraniteForCausalLM": Family(_attention_only),
    "GraniteMoeHybridForCausalLM": Family(_granite_hybrid),
    "KimiLinearForCausalLM": Family(_kimi_linear),
    "Lfm2ForCausalLM": Family(_lfm2, chooses_state_dtype=True),
    "Lfm2MoeForCausalLM": Family(_lfm2),
    "LlamaForCausalLM": Family(_attention_only),
    "Mamba2ForCausalLM": Family(_mamba2),
    "MambaForCausalLM": Family(_mamba1),
    "NemotronHForCausalLM": Family(_nemotron_h, chooses_state_dtype=True),
    "Qwen2ForCausalLM": Family(_attention_only),
    "Qwen3ForCausalLM": Family(_attention_only),
    "Qwen3MoeForCausalLM": Family(_attention_only),
    "Qwen3NextForCausalLM": Family(_gated_delta, chooses_state_dtype=True),
    "Qwen3_5ForCausalLM": Family(_gated_delta, chooses_state_dtype=True),
    "Qwen3_5ForConditionalGeneration": Family(_gated_delta, wrapped=True, chooses_state_dtype=True),
    "Qwen3_5MoeForCausalLM": Family(_gated_delta, chooses_state_dtype=True),
    "Qwen3_5MoeForConditionalGeneration": Family(
        _gated_delta, wrapped=True, chooses_state_dtype=True
    ),
}
"""The architectures whose size is known."""


def layout_of(config: Config, ranks: int, precision: Precision) -> tuple[Layout, list[Buffer]]:
    """The dtypes chosen, and every buffer of one rank, by layer and name.

    Raises `UnsupportedError` for an architecture that is not known, `InvalidRequestError` for a
    field that is missing or wrong, or a number of ranks that does not divide the heads.
    """
    family = ARCHITECTURES.get(config.architecture)
    if family is None:
        raise UnsupportedError(
            f"the size of a {config.architecture!r} is not known",
            hint=f"known are {', '.join(ARCHITECTURES)}",
            details={"architecture": config.architecture},
        )
    if ranks < 1:
        raise InvalidRequestError(f"the number of ranks must be above 0, not {ranks}")
    text = config.inner("text_config") if family.wrapped else config
    in_config = text.word("mamba_ssm_dtype") if family.chooses_state_dtype else None
    layout = Layout(
        config=text,
        ranks=ranks,
        conv_dtype=_dtype(precision.conv or "bfloat16"),
        # A dtype there that SGLang does not know makes it warn and take float32.
        state_dtype=_dtype(precision.state or (in_config if in_config in DTYPES else "float32")),
        kv_dtype=_dtype(precision.kv or _served_dtype(text, config)),
    )
    buffers = family.buffers(layout)
    return layout, sorted(buffers, key=lambda buffer: (buffer.layer, buffer.name))


def _served_dtype(text: Config, config: Config) -> str:
    """What SGLang's ``--dtype auto`` makes of the checkpoint's: float16 of float32."""
    names = ("dtype", "torch_dtype")
    named = text.word(*names) or config.word(*names) or "float32"
    return "float16" if named == "float32" else named


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise InvalidRequestError(
            f"a pool of {name!r} is not known", hint=f"one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _interval_or_types(config: Config) -> Sequence[str]:
    """The kinds of a gated delta net's layers; SGLang goes by the interval alone."""
    interval = config.count("full_attention_interval", default=0)
    if not interval:
        names = config.strings("layer_types")
        if names is None:
            raise InvalidRequestError(
                f"{config.source} has neither 'full_attention_interval' nor 'layer_types'"
            )
        return names
    return ["linear_attention" if (n + 1) % interval else "full_attention" for n in config.layers]


def _kinds(config: Config, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The layers with a recurrent state, and those with a KV cache."""
    config.check_layers(len(names))
    for layer, name in enumerate(names):
        if name not in _RECURRENT | _ATTENTION | _NEITHER:
            raise InvalidRequestError(f"{config.source}: layer {layer} is of unknown kind {name!r}")
    return (
        [layer for layer, name in enumerate(names) if name in _RECURRENT],
        [layer for layer, name in enumerate(names) if name in _ATTENTION],
    )
