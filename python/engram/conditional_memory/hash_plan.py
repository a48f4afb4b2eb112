"""The numbers that one layer's hash consists of, and the window of ids it is computed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

BLOCK: Final = -(1 << 63)
"""In a window: an id that ends every n-gram it is part of; it and what is older count as pad."""


@dataclass(frozen=True, eq=False)
class HashPlan:
    """One layer's hash, ready to be computed. C = orders x heads columns, order first.

    A *window* is int64 [B, max_n - 1 + T]: the compressed ids of T tokens with the max_n - 1
    before them, pad where there are none. All arrays are int64 and read-only.

    multipliers: [max_n], by distance to the newest token; of `polynomial`, which weighs by
        distance to the oldest, [heads, max_n] with the powers of the heads' bases.
    moduli: [orders, heads].
    sizes: [C], rows of each column's part of the table. Differs from the moduli in `polynomial`.
    offsets: [C], first row of each column's part.
    """

    polynomial: bool
    min_n: int
    max_n: int
    pad: int
    blocks: bool
    multipliers: Int64Array
    moduli: Int64Array
    sizes: Int64Array
    offsets: Int64Array

    @property
    def columns(self) -> int:
        """C."""
        return int(self.moduli.size)

    @property
    def rows(self) -> int:
        """Rows of the layer's table."""
        return int(self.sizes.sum())
