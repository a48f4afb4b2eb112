"""What SGLang's pools keep for one layer of each kind, as shapes of one slot of one rank.

One slot of a KV buffer is a token, one slot of a state buffer is a sequence. Names, shapes and
dtypes are those of `engram.sglang_plugin.pools`, so that the two can be compared.

Sources, SGLang 0.5.23: `Mamba2StateShape`, `KimiLinearStateShape` in `configs/mamba_utils.py`,
`MHATokenToKVPool` and `MLATokenToKVPool` in `mem_cache/memory_pool.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engram.errors import InvalidRequestError
from engram.snapshot.dtypes import ITEM_BYTES


@dataclass(frozen=True)
class Buffer:
    """One buffer of one layer; ``part`` is its name without the layer, ``shape`` that of a slot."""

    part: str
    layer: int
    per_token: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As segments name it."""
        return f"{self.part}.{self.layer}"

    @property
    def bytes(self) -> int:
        """Bytes a slot."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class State:
    """The recurrent state of one layer: the window of its convolution, and the state itself.

    A shape with a 0 in it (LFM2 has no state but the window) is kept by no pool.
    """

    conv: tuple[int, ...]
    temporal: tuple[int, ...]

    def buffers(self, layer: int, conv_dtype: str, state_dtype: str) -> list[Buffer]:
        """The buffers of one layer."""
        both = [
            Buffer("conv0", layer, False, conv_dtype, self.conv),
            Buffer("ssm", layer, False, state_dtype, self.temporal),
        ]
        return [buffer for buffer in both if buffer.bytes]


def split(amount: int, ranks: int, what: str) -> int:
    """One rank's share. Raises `InvalidRequestError` if it does not come out even."""
    if amount % ranks:
        raise InvalidRequestError(
            f"{amount} {what} cannot be divided among {ranks} ranks",
            hint="choose a --tp that divides them",
        )
    return amount // ranks


def mamba2_state(
    *, channels: int, groups: int, heads: int, head_dim: int, state: int, kernel: int, ranks: int
) -> State:
    """Mamba-2 and gated delta nets: B and C (keys and queries) go through the convolution too.

    Groups that do not divide among the ranks are kept once on each, as SGLang does.
    """
    own_groups = groups // ranks if groups % ranks == 0 else 1
    if groups % ranks and groups > ranks:
        raise InvalidRequestError(
            f"{groups} groups cannot be divided among {ranks} ranks",
            hint="choose a --tp that divides them",
        )
    own_channels = split(channels, ranks, "channels")
    return State(
        conv=(own_channels + 2 * own_groups * state, kernel - 1),
        temporal=(split(heads, ranks, "recurrent heads"), head_dim, state),
    )


def mamba1_state(*, channels: int, state: int, kernel: int, ranks: int) -> State:
    """Mamba-1: every channel is a head of its own; B and C do not go through the convolution."""
    own = split(channels, ranks, "channels")
    return State(conv=(own, kernel - 1), temporal=(own, 1, state))


def kda_state(*, heads: int, head_dim: int, kernel: int, ranks: int) -> State:
    """Kimi delta attention: windows of q, k and v side by side, the kernel's axis first."""
    own = split(heads, ranks, "recurrent heads")
    return State(conv=(kernel - 1, 3 * own * head_dim), temporal=(own, head_dim, head_dim))


def short_conv_state(*, channels: int, kernel: int, ranks: int) -> State:
    """LFM2's gated short convolution: a window and nothing else."""
    return State(conv=(split(channels, ranks, "channels"), kernel - 1), temporal=(0,))


def mha_rows(layer: int, *, kv_heads: int, head_dim: int, dtype: str, ranks: int) -> list[Buffer]:
    """Keys and values of a token. With fewer heads than ranks, each rank keeps one."""
    own = split(kv_heads, ranks, "KV heads") if kv_heads >= ranks else 1
    return [Buffer(part, layer, True, dtype, (own, head_dim)) for part in ("k", "v")]


def mla_rows(layer: int, *, latent: int, rope: int, dtype: str) -> list[Buffer]:
    """The compressed KV of multi-head latent attention; every rank keeps all of it."""
    return [Buffer("kv", layer, True, dtype, (1, latent + rope))]
