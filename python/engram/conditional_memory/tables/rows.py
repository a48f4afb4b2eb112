"""How a row lies in bytes: fp32, bf16, or FP8 with shared exponents.

An fp8 row is ``dim`` bytes E4M3 followed by one E8M0 exponent for every 32 of them: a number is
``e4m3 * 2 ** (exponent - 127)``. That is V4.1's row (256 + 8 = 264 bytes) and the MX format's
block (OCP Microscaling 1.0). Rows decode to bfloat16, in which every such number is exact but those
at the ends of its range. An exponent of 255 stands for NaN.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from engram.errors import InvalidRequestError

BLOCK = 32
_BIAS = 127
_MAX_E4M3 = 448.0
_TOP_EXPONENT = 120  # of a block that holds the largest float32


class RowFormat(Enum):
    """The dtype of stored rows."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @classmethod
    def parse(cls, name: str | RowFormat) -> RowFormat:
        """The format called ``name``. Raises `InvalidRequestError` naming those there are."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(item.value for item in cls)
            raise InvalidRequestError(
                f"unknown dtype {name!r} of a table", hint=f"there are: {known}"
            ) from None

    @property
    def output_dtype(self) -> torch.dtype:
        """What rows decode to."""
        return torch.float32 if self is RowFormat.FP32 else torch.bfloat16

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of ``dim`` numbers."""
        if self is RowFormat.FP8:
            return dim + -(-dim // BLOCK)
        return dim * self.output_dtype.itemsize

    def decode(self, raw: npt.NDArray[np.uint8], dim: int) -> torch.Tensor:
        """Bytes [n, row_bytes] to numbers [n, dim]. fp32 and bf16 share memory with ``raw``."""
        data = torch.from_numpy(raw)
        if self is not RowFormat.FP8:
            return data.view(self.output_dtype)
        return decode_fp8(data[:, :dim].view(torch.float8_e4m3fn), data[:, dim:])

    def encode(self, values: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Numbers [n, dim] to bytes [n, row_bytes]; to the nearest that the format has.

        Raises:
            InvalidRequestError: fp8 has no place for a NaN or an infinity beside other numbers.
        """
        if self is not RowFormat.FP8:
            data = values.to(self.output_dtype).contiguous().view(torch.uint8)
        else:
            numbers, exponents = encode_fp8(values)
            data = torch.cat([numbers.view(torch.uint8), exponents], dim=1)
        return data.numpy()


def encode_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, dim] to E4M3 [n, dim] and E8M0 exponents uint8 [n, ceil(dim / 32)].

    Each block's exponent is the smallest with which its largest number does not overflow. Raises
    `InvalidRequestError` for NaN and infinities: their block could hold nothing else.
    """
    rows, dim = values.shape
    padded = torch.nn.functional.pad(values.float(), (0, -dim % BLOCK)).view(rows, -1, BLOCK)
    if not bool(padded.isfinite().all()):
        raise InvalidRequestError(
            "rows of an fp8 table must be finite in float32",
            hint="look for NaN and infinities where the rows come from",
        )
    # largest = fraction * 2 ** power with a fraction from 0.5 to 1, and 448 is 0.875 * 2 ** 9.
    fraction, power = torch.frexp(padded.abs().amax(-1).clamp_min(2.0**-126))
    exponent = (power - 9 + (fraction > _MAX_E4M3 / 512).int()).clamp(-_BIAS, _BIAS)
    numbers = torch.ldexp(padded, -exponent.unsqueeze(-1))
    # 256 * 2 ** 120 would be infinite in bfloat16 and float32; 240 is the number below.
    limit = torch.where(exponent < _TOP_EXPONENT, _MAX_E4M3, 240.0).unsqueeze(-1)
    numbers = numbers.clamp(-limit, limit).reshape(rows, -1)[:, :dim]
    return numbers.contiguous().to(torch.float8_e4m3fn), (exponent + _BIAS).to(torch.uint8)


def decode_fp8(numbers: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """E4M3 [n, dim] and uint8 [n, blocks] to bfloat16 [n, dim]."""
    dim = numbers.shape[1]
    # A bfloat16 has E8M0's exponent in its place: shifted there it is the power of two itself,
    # except for 0, which stands for 2 ** -127, and 255, where bfloat16 has infinity and E8M0 NaN.
    scale = (exponents.to(torch.int16) << 7).view(torch.bfloat16)
    scale = scale.masked_fill(exponents == 0, 2.0**-_BIAS)
    scale = scale.masked_fill(exponents == 255, torch.nan)
    blocks = scale.repeat_interleave(BLOCK, dim=1)[:, :dim]
    return numbers.to(torch.bfloat16) * blocks
