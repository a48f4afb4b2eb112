"""Which rows of its table each token looks up: primes, multipliers, hashes.

The hash is the demo's: compressed ids in an n-gram are multiplied by odd numbers drawn for the
layer, XORed, and taken modulo one prime for each head. Every head of every order and layer has a
prime of its own, drawn upwards from the table size in the order of ``layer_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import torch

from engram.conditional_memory import hash_numpy, kernel
from engram.conditional_memory.compression import TokenCompression
from engram.conditional_memory.config import EngramConfig
from engram.conditional_memory.hash_plan import BLOCK, HashPlan, Int64Array
from engram.conditional_memory.hash_torch import TorchHash
from engram.conditional_memory.primes import next_prime
from engram.errors import InvalidRequestError, UnsupportedError

Backend = Literal["numpy", "torch", "kernel"]

INT64_MAX = (1 << 63) - 1
INT32_MAX = (1 << 31) - 1
_LAYER_STRIDE = 10007  # between the seeds of two layers; the demo's PRIME_1


class NgramHashLayout:
    """The hash of every layer of one `EngramConfig`.

    With a ``compression``, `hash` takes the tokenizer's ids and compresses them; without one it
    takes ids that are compressed already, and ``config.pad_id`` is one of those.

    Raises:
        InvalidRequestError: the compression has another size than ``compressed_vocab_size``, or
            the numbers do not fit 64 bits.
    """

    def __init__(self, config: EngramConfig, compression: TokenCompression | None = None) -> None:
        if compression is not None:
            config = compression.applied_to(config)
        self.config = config
        self.compression = compression
        self.pad_id = self._pad()
        plan = _polynomial_plan if config.layout == "polynomial" else _xor_plan
        taken: set[int] = set()
        self._plans = {i: plan(config, i, self.pad_id, taken) for i in config.layer_ids}
        self._torch: dict[tuple[int, torch.device], TorchHash] = {}

    def plan(self, layer_id: int | None = None) -> HashPlan:
        """The numbers of a layer's hash. Raises `InvalidRequestError` for a layer without one."""
        layer_id = self.config.layer_id if layer_id is None else layer_id
        if layer_id not in self._plans:
            raise InvalidRequestError(
                f"layer {layer_id} has no memory",
                hint=f"layer_ids are {tuple(self._plans)}",
            )
        return self._plans[layer_id]

    def primes(self, layer_id: int | None = None) -> Int64Array:
        """The moduli, int64 [orders, heads]."""
        return self.plan(layer_id).moduli

    def multipliers(self, layer_id: int | None = None) -> Int64Array:
        """By distance from the newest token, int64 [max_n]; of `polynomial` see `HashPlan`."""
        return self.plan(layer_id).multipliers

    def rows(self, layer_id: int | None = None) -> int:
        """Rows of the layer's table: all orders and heads."""
        return self.plan(layer_id).rows

    def offsets(self, layer_id: int | None = None) -> Int64Array:
        """First row of each column's part of the table, int64 [orders * heads]."""
        return self.plan(layer_id).offsets

    @overload
    def hash(
        self,
        token_ids: torch.Tensor,
        layer_id: int | None = None,
        *,
        with_offsets: bool = True,
        backend: Backend | None = None,
    ) -> torch.Tensor: ...

    @overload
    def hash(
        self,
        token_ids: npt.NDArray[np.integer] | Sequence[Sequence[int]],
        layer_id: int | None = None,
        *,
        with_offsets: bool = True,
        backend: Backend | None = None,
    ) -> Int64Array: ...

    def hash(
        self,
        token_ids: torch.Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]],
        layer_id: int | None = None,
        *,
        with_offsets: bool = True,
        backend: Backend | None = None,
    ) -> torch.Tensor | Int64Array:
        """Rows of the layer's table that each token looks up.

        Args:
            token_ids: integers [B, T], each row a text from its start. Negative ids are not
                compressed.
            layer_id: which of ``layer_ids``; None: ``config.layer_id``.
            with_offsets: False gives rows within each head's part, as the demo does.
            backend: `numpy`, `torch` or `kernel`; all give the same bits. None: the kernel on a
                CPU where it is installed, else torch.

        Returns:
            int64 [B, T, orders * heads], orders ascending, heads of an order side by side; a tensor
            on the device of ``token_ids`` if that is a tensor, else an array.

        Raises:
            InvalidRequestError: not integers [B, T], or an id beyond the vocabulary compressed.
            UnsupportedError: `kernel` was asked for, and is not installed or not for this device.
        """
        ids = as_token_tensor(token_ids)
        window = self.window(self.start(ids.shape[0], ids.device), ids)
        rows = self.hash_window(window, layer_id, with_offsets=with_offsets, backend=backend)
        return rows if isinstance(token_ids, torch.Tensor) else rows.numpy()

    def start(self, batch_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """What stands before the first token: pad, int64 [B, max_n - 1]."""
        shape = (batch_size, self.config.max_n - 1)
        return torch.full(shape, self.pad_id, dtype=torch.int64, device=device)

    def window(self, history: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """``history`` (compressed, [B, H]) with ``token_ids`` ([B, T]) compressed behind it."""
        ids = token_ids.to(torch.int64)
        compressed = ids if self.compression is None else self.compression(ids)
        if self.config.image_token_id is not None:
            compressed = compressed.masked_fill(ids == self.config.image_token_id, BLOCK)
        return torch.cat([history, compressed], dim=1)

    def hash_window(
        self,
        window: torch.Tensor,
        layer_id: int | None = None,
        *,
        with_offsets: bool = True,
        backend: Backend | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        """`hash` for a `window` with max_n - 1 ids of history in front: [B, T, C] of ``dtype``.

        ``dtype`` int32 halves what is written; `InvalidRequestError` if the rows do not fit, for
        another dtype, and for what is no window.
        """
        plan = self.plan(layer_id)
        _check_window(window, plan)
        if dtype not in (torch.int64, torch.int32):
            raise InvalidRequestError(f"rows are int64 or int32, not {dtype}")
        if backend not in (None, *get_args(Backend)):
            raise InvalidRequestError(
                f"unknown backend {backend!r}", hint=f"there are: {', '.join(get_args(Backend))}"
            )
        if dtype == torch.int32 and plan.rows > INT32_MAX:
            raise InvalidRequestError(
                f"{plan.rows} rows do not fit int32", hint="ask for torch.int64"
            )
        backend = backend or ("kernel" if kernel.usable(window.device) else "torch")
        if backend == "kernel":
            return kernel.require(window.device).hash_window(window, plan, with_offsets, dtype)
        if backend == "torch":
            return self._torch_hash(plan, layer_id, window.device)(window, offsets=with_offsets).to(
                dtype
            )
        rows = hash_numpy.hash_window(window.cpu().numpy(), plan)
        if with_offsets:
            rows = rows + plan.offsets
        return torch.from_numpy(rows).to(device=window.device, dtype=dtype)

    def _torch_hash(self, plan: HashPlan, layer_id: int | None, device: torch.device) -> TorchHash:
        key = (self.config.layer_id if layer_id is None else layer_id, device)
        assert key[0] is not None
        if key not in self._torch:
            self._torch[key[0], device] = TorchHash(plan, device)
        return self._torch[key[0], device]

    def _pad(self) -> int:
        if self.config.layout == "polynomial":
            return 0
        if self.compression is None:
            return self.config.pad_id
        return self.compression.compress_one(self.config.pad_id)


def as_token_tensor(
    token_ids: torch.Tensor | npt.NDArray[np.integer] | Sequence[Sequence[int]],
) -> torch.Tensor:
    """``token_ids`` as a tensor of integers [B, T]. Raises `InvalidRequestError` if it is none."""
    try:
        if isinstance(token_ids, np.ndarray) and token_ids.dtype.kind in "iu":
            # torch takes no negative strides, foreign byte orders or read-only memory.
            token_ids = np.array(token_ids, dtype=token_ids.dtype.newbyteorder("="), order="C")
        ids = token_ids if isinstance(token_ids, torch.Tensor) else torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequestError(
            f"token ids cannot be read as a tensor: {error}", hint="give integers [batch, tokens]"
        ) from error
    integer = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    if ids.dim() != 2 or not (integer or ids.numel() == 0):
        raise InvalidRequestError(
            f"token ids must be integers [batch, tokens], not {ids.dtype} {tuple(ids.shape)}",
            hint="for a single text add a dimension: ids[None]",
        )
    return ids


def _check_window(window: torch.Tensor, plan: HashPlan) -> None:
    context = plan.max_n - 1
    # int32 ids would multiply in 32 bits: another hash, not an error.
    if window.dtype != torch.int64 or window.dim() != 2 or window.shape[1] < context:
        raise InvalidRequestError(
            f"a window is int64 [B, {context} + T], not {window.dtype} {tuple(window.shape)}",
            hint="make it with NgramHashLayout.window or HashStream.push",
        )


def _xor_plan(config: EngramConfig, layer_id: int, pad: int, taken: set[int]) -> HashPlan:
    """Layouts `official` and `v41`. ``taken`` are the primes of the layers before; it grows."""
    # Half of what an id may be multiplied by without leaving 63 bits, since it is doubled below.
    bound = max(1, INT64_MAX // config.hash_vocab_size // 2)
    draw = np.random.default_rng(config.seed + _LAYER_STRIDE * layer_id)
    multipliers = draw.integers(0, bound, size=config.max_n, dtype=np.int64) * 2 + 1
    moduli = []
    for size in config.table_sizes:
        prime = size - 1
        for _ in range(config.num_hash_heads):
            prime = next_prime(prime + 1, taken)
            taken.add(prime)
            moduli.append(prime)
    return _plan(config, pad, multipliers, moduli, moduli)


def _polynomial_plan(config: EngramConfig, layer_id: int, pad: int, taken: set[int]) -> HashPlan:
    """Layout `polynomial`: one hash for all layers; orders share the bases.

    Head h has the first prime from 31 + 100 h as base and the first from size + 1000 h as modulus,
    and what is left is taken modulo the size.
    """
    heads = range(config.num_hash_heads)
    bases = [next_prime(31 + 100 * h) for h in heads]
    powers = [[base**j for j in range(config.max_n)] for base in bases]
    if max(sum(row) for row in powers) * config.hash_vocab_size > INT64_MAX:
        raise InvalidRequestError(
            f"layout 'polynomial' does not fit 64 bits with max_n {config.max_n}",
            hint="use layout 'official', or smaller n-grams",
        )
    moduli = [next_prime(size + 1000 * h) for size in config.table_sizes for h in heads]
    sizes = [size for size in config.table_sizes for _ in heads]
    return _plan(config, pad, np.array(powers, dtype=np.int64), moduli, sizes)


def _plan(
    config: EngramConfig, pad: int, multipliers: Int64Array, moduli: list[int], sizes: list[int]
) -> HashPlan:
    if max(sum(sizes), *moduli) > INT64_MAX:
        raise UnsupportedError("the table has more than 2^63 rows", hint="make it smaller")
    heads = config.num_hash_heads
    plan = HashPlan(
        polynomial=config.layout == "polynomial",
        min_n=config.min_n,
        max_n=config.max_n,
        pad=pad,
        blocks=config.image_token_id is not None,
        multipliers=multipliers,
        moduli=np.array(moduli, dtype=np.int64).reshape(-1, heads),
        sizes=np.array(sizes, dtype=np.int64),
        offsets=np.cumsum([0, *sizes[:-1]], dtype=np.int64),
    )
    for array in (plan.multipliers, plan.moduli, plan.sizes, plan.offsets):
        array.flags.writeable = False
    return plan
