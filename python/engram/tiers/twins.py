"""Rows that begin alike: what conversations with a common prefix need to store only once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from engram.snapshot.segment import BufferSpec
from engram.tiers.base import Segment
from engram.tiers.payload import bytes_of, tokens_of, views

MOST: Final = 8
"""Segments that are remembered for one beginning, the newest ones."""


class Twins:
    """Rows in RAM by the key of their first page, which tells everything before them too.

    Not thread-safe: used under the lock of the RAM tier.
    """

    def __init__(self) -> None:
        self._by_first_key: dict[str, list[Segment]] = {}

    def add(self, rows: Segment) -> None:
        """Rows whose payload is whole."""
        if rows.first_key is not None:
            known = self._by_first_key.setdefault(rows.first_key, [])
            known.append(rows)
            del known[:-MOST]

    def remove(self, rows: Segment) -> None:
        """Rows that leave RAM; no effect if they are not here."""
        known = self._by_first_key.get(rows.first_key or "", [])
        if rows in known:
            known.remove(rows)
            if not known:
                del self._by_first_key[rows.first_key or ""]

    def of(self, rows: Segment) -> list[Segment]:
        """Others that begin with the same page, newest first."""
        known = self._by_first_key.get(rows.first_key or "", [])
        return [other for other in reversed(known) if other is not rows]

    def common(self, first_key: str, tokens: np.ndarray) -> int:
        """How many of `tokens` (u32, 1-d; `first_key` is their first page's) known rows begin
        with."""
        found = 0
        for rows in self._by_first_key.get(first_key, ()):
            assert rows.payload is not None
            theirs = tokens_of(rows.payload, rows.buffers)
            length = min(len(theirs), len(tokens))
            differing = np.flatnonzero(theirs[:length] != tokens[:length])
            found = max(found, int(differing[0]) if len(differing) else length)
        return found


def begins_with(whole: Segment, part: Segment) -> bool:
    """Whether `whole` begins with the very bits of `part`, tokens included; both are in RAM."""
    assert whole.payload is not None
    assert part.payload is not None
    count = part.end - part.start
    tokens = tokens_of(whole.payload, whole.buffers)[:count]
    if not np.array_equal(tokens, tokens_of(part.payload, part.buffers)):
        return False
    theirs = views(whole.payload, whole.buffers)
    return all(
        torch.equal(theirs[name][:count].view(torch.uint8), own.view(torch.uint8))
        for name, own in views(part.payload, part.buffers).items()
    )


def copy_beginning(
    piece: memoryview, position: int, buffers: Sequence[BufferSpec], part: Segment
) -> None:
    """Copy what `piece` has of the first rows into the payload of `part`.

    `piece` are the bytes from `position` of a payload that is laid out by `buffers`: the same ones
    as those of `part`, of more rows.
    """
    assert part.payload is not None
    target = bytes_of(part.payload)
    for theirs, own in zip(buffers, part.buffers, strict=True):
        # Row-major with a row for each token: the first rows are the first bytes.
        first = max(theirs.offset, position)
        last = min(theirs.offset + own.length, position + len(piece))
        if first < last:
            to = own.offset + first - theirs.offset
            target[to : to + last - first] = piece[first - position : last - position]
