"""Typed views of a payload: one contiguous host buffer, many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from engram.snapshot.segment import TOKENS, BufferSpec

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
}
"""torch dtypes in safetensors' spelling."""

_DTYPES: Final = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def views(payload: torch.Tensor, buffers: Sequence[BufferSpec]) -> dict[str, torch.Tensor]:
    """Name -> tensor of the buffer's dtype and shape, sharing memory with `payload`.

    The tokens are left out: they are u32, which torch computes little with; see `tokens_of`.
    """
    return {
        spec.name: payload[spec.offset : spec.offset + spec.length]
        .view(_DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in buffers
        if spec.name != TOKENS
    }


def tokens_of(payload: torch.Tensor, buffers: Sequence[BufferSpec]) -> np.ndarray:
    """The token ids of a payload, u32 [num_tokens], sharing memory with it."""
    spec = next(spec for spec in buffers if spec.name == TOKENS)
    return payload[spec.offset : spec.offset + spec.length].numpy().view("<u4")


def bytes_of(payload: torch.Tensor) -> memoryview:
    """The payload as bytes, without a copy."""
    return payload.numpy().data


def zero_padding(payload: torch.Tensor, buffers: Sequence[BufferSpec]) -> None:
    """Zero the gaps between buffers: the digest covers them."""
    position = 0
    for spec in buffers:
        payload[position : spec.offset] = 0
        position = spec.offset + spec.length
