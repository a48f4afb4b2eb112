"""What one conditional memory consists of: orders, heads, sizes, layers and switches.

Sources, by the short names used in this room: *paper* is arXiv 2601.07372, *demo* is
``engram_demo_v1.py`` of its official repository, *V4.1* is the layer that DeepSeek-V4.1-Flash
ships, as SGLang 0.5.23 computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Literal, get_args

from engram.conditional_memory.presets import PRESETS
from engram.errors import InvalidRequestError

Layout = Literal["official", "v41", "polynomial"]
GateTransform = Literal["signed_sqrt", "copysign_sqrt", "identity"]


@dataclass(frozen=True)
class EngramConfig:
    """Settings of the memory of one model; immutable, checked when made.

    Addressing:
        vocab_size: ids the tokenizer has.
        compressed_vocab_size: ids left after `TokenCompression`, V'. It bounds the multipliers, so
            another value hashes everything elsewhere. None: no compression, V' = ``vocab_size``.
        min_n, max_n: smallest and largest order of n-grams.
        num_hash_heads: heads of each order.
        embedding_table_size: rows of each head, an int or one per order. Layouts `official` and
            `v41` take the primes from there upwards, `polynomial` exactly this many.
        layer_ids: the layers with a memory, in the order in which they draw their primes.
        layer_id: the layer an `EngramModule` of this config serves; None: the first.
        pad_id: id in front of the first token, before compression. `polynomial` pads with 0.
        seed: of the multipliers. V4.1 and the demo have 0.
        layout: `official` (demo), `v41` (the same hash; an image token ends every n-gram),
            `polynomial` (the hash of an early third-party library, for its checkpoints).
        image_token_id: with `v41`, the id that ends n-grams: it and what is older count as pad.

    Shapes:
        embedding_dim: width of one row, that is of one head.
        hidden_dim: width of one branch of the hidden state.
        num_branches: hyper-connection branches.

    Switches:
        use_conv: whether a `ShortConv` follows the gate.
        kernel_size, conv_dilation: of the `ShortConv`; dilation None: ``max_n``.
        zero_init_conv: start the convolution at zero (paper) instead of at random (demo).
        gate_transform: of the normalised dot product g before the sigmoid: `signed_sqrt` is
            ``sign(g) sqrt(max(|g|, 1e-6))`` (demo), `copysign_sqrt` the same with the sign of +0
            being + (V4.1), `identity` nothing (paper).
        bias: whether the key and value projections have one (demo: yes, V4.1: no).
        norm_eps: of the gate's two RMS norms; None: the machine epsilon of the dtype they compute
            in, at least float32 (demo).
        conv_norm_eps: of the norm in the `ShortConv`.
        table_init_std: standard deviation of new rows (demo: 1, that of ``nn.Embedding``).
        sparse_gradients: whether a table in memory gets sparse gradients.

    Raises:
        InvalidRequestError: a field has a value that makes no sense; the message names it.
    """

    vocab_size: int = 129280
    min_n: int = 2
    max_n: int = 3
    num_hash_heads: int = 8
    embedding_table_size: int | Sequence[int] = 646400
    embedding_dim: int = 64
    hidden_dim: int = 1024
    layer_ids: Sequence[int] = (1, 15)
    layer_id: int | None = None
    pad_id: int = 2
    seed: int = 0
    layout: Layout = "official"
    compressed_vocab_size: int | None = None
    image_token_id: int | None = None
    num_branches: int = 1
    use_conv: bool = True
    kernel_size: int = 4
    conv_dilation: int | None = None
    zero_init_conv: bool = True
    gate_transform: GateTransform = "signed_sqrt"
    bias: bool = True
    norm_eps: float | None = None
    conv_norm_eps: float = 1e-5
    table_init_std: float = 1.0
    sparse_gradients: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        # Lists from JSON become tuples, so that configs compare and hash by value.
        object.__setattr__(self, "layer_ids", tuple(int(i) for i in self.layer_ids))
        sizes = self.embedding_table_size
        kept = tuple(int(size) for size in sizes) if isinstance(sizes, Iterable) else int(sizes)
        object.__setattr__(self, "embedding_table_size", kept)
        if self.layer_ids and self.layer_id is None:
            object.__setattr__(self, "layer_id", self.layer_ids[0])
        self._check()

    @property
    def orders(self) -> tuple[int, ...]:
        """The orders of n-grams, ascending."""
        return tuple(range(self.min_n, self.max_n + 1))

    @property
    def num_columns(self) -> int:
        """Rows looked up for one token in one layer: orders x heads."""
        return len(self.orders) * self.num_hash_heads

    @property
    def memory_dim(self) -> int:
        """Width of one token's rows side by side."""
        return self.num_columns * self.embedding_dim

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """`embedding_table_size`, one for each order."""
        if isinstance(self.embedding_table_size, int):
            return (self.embedding_table_size,) * len(self.orders)
        return tuple(self.embedding_table_size)

    @property
    def hash_vocab_size(self) -> int:
        """V', the number of ids that reach the hash."""
        return self.compressed_vocab_size or self.vocab_size

    @property
    def dilation(self) -> int:
        """Dilation of the `ShortConv`."""
        return self.conv_dilation or self.max_n

    def for_layer(self, layer_id: int) -> EngramConfig:
        """The same memory, seen from another of its layers."""
        return replace(self, layer_id=layer_id)

    @classmethod
    def preset(cls, name: str, **overrides: object) -> EngramConfig:
        """A published model's memory, with fields replaced by ``overrides``.

        `deepseek-v4.1-flash`: the checkpoint. Not stated by its source, so a default here:
            ``num_branches`` 4, ``hidden_dim`` 4096 and ``vocab_size`` 129280 (they are the
            backbone's), ``norm_eps`` 1e-6.
        `deepseek-demo`: every default of the demo; ``compressed_vocab_size`` comes from the
            tokenizer there, so give it (or a `TokenCompression`) for its multipliers.
        `engram-27b`, `engram-40b`: the paper's models. Not stated by the paper, so a default here:
            ``pad_id``, ``seed``, ``bias``, ``norm_eps``, ``conv_norm_eps``, ``table_init_std``
            (as in the demo) and ``compressed_vocab_size`` (from the tokenizer). The paper's gate
            has no square root, and its convolution starts at zero.

        Raises:
            InvalidRequestError: there is no such preset, or no such field.
        """
        if name not in PRESETS:
            raise InvalidRequestError(
                f"unknown preset {name!r}", hint=f"there are: {', '.join(PRESETS)}"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise InvalidRequestError(
                f"EngramConfig has no field {unknown[0]!r}",
                hint=f"it has: {', '.join(sorted(known))}",
            )
        values: dict[str, object] = {**PRESETS[name], **overrides}
        return cls(**values)  # type: ignore[arg-type]

    def _check_types(self) -> None:
        """Numbers cut to integers, and integers taken for sequences, would mean something else."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _require(_whole(value), field.name, value, "must be an integer")
            elif field.type == "int | None":
                _require(value is None or _whole(value), field.name, value, "must be an integer")
        sizes: object = self.embedding_table_size
        layers: object = self.layer_ids
        for name, values in (
            ("layer_ids", layers),
            ("embedding_table_size", sizes if isinstance(sizes, Iterable) else [sizes]),
        ):
            whole = isinstance(values, Iterable) and all(_whole(value) for value in values)
            _require(whole, name, getattr(self, name), "must consist of integers")

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "min_n",
            "num_hash_heads",
            "embedding_dim",
            "hidden_dim",
            "num_branches",
            "kernel_size",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.max_n >= self.min_n, "max_n", self.max_n, f"must be at least {self.min_n}")
        sizes = self.table_sizes
        _require(
            len(sizes) == len(self.orders),
            "embedding_table_size",
            sizes,
            f"must be one number, or one for each of the {len(self.orders)} orders",
        )
        _require(min(sizes) >= 2, "embedding_table_size", sizes, "must be at least 2")
        _require(len(self.layer_ids) > 0, "layer_ids", self.layer_ids, "must name a layer")
        _require(
            len(set(self.layer_ids)) == len(self.layer_ids) and min(self.layer_ids) >= 0,
            "layer_ids",
            self.layer_ids,
            "must be different and not negative",
        )
        _require(
            self.layer_id in self.layer_ids,
            "layer_id",
            self.layer_id,
            f"must be one of layer_ids {self.layer_ids}",
        )
        _require(self.layout in get_args(Layout), "layout", self.layout, _one_of(Layout))
        _require(
            self.gate_transform in get_args(GateTransform),
            "gate_transform",
            self.gate_transform,
            _one_of(GateTransform),
        )
        if self.compressed_vocab_size is not None:
            _require(
                1 <= self.compressed_vocab_size <= self.vocab_size,
                "compressed_vocab_size",
                self.compressed_vocab_size,
                f"must be between 1 and vocab_size {self.vocab_size}",
            )
        _require(self.seed >= 0, "seed", self.seed, "must not be negative")
        _require(
            self.conv_dilation is None or self.conv_dilation >= 1,
            "conv_dilation",
            self.conv_dilation,
            "must be at least 1",
        )
        _require(
            self.image_token_id is None or self.layout == "v41",
            "image_token_id",
            self.image_token_id,
            "has a meaning in layout 'v41' only",
        )


def _one_of(choices: object) -> str:
    return f"must be one of {', '.join(get_args(choices))}"


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require(holds: bool, field: str, value: object, rule: str) -> None:
    if not holds:
        raise InvalidRequestError(
            f"EngramConfig.{field} {rule}, it is {value!r}",
            hint="see the docstring of EngramConfig",
            details={"field": field},
        )
