"""What an `EngramModule` remembers of texts that arrive in pieces."""

from __future__ import annotations

import torch

from engram.conditional_memory.conv import ShortConv
from engram.conditional_memory.hashing import NgramHashLayout
from engram.conditional_memory.streaming import HashStream
from engram.errors import InvalidRequestError


class EngramState:
    """The last tokens, and the last inputs of the convolution, of a batch of texts.

    Tokens may run ahead of the convolution: `EngramModule.prefetch_embeddings` takes a token in as
    soon as it is known, ``forward`` follows. Not for use from several threads at once.
    """

    def __init__(
        self,
        layout: NgramHashLayout,
        conv: ShortConv | None,
        batch_size: int,
        *,
        max_rollback: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokens = HashStream(layout, batch_size, max_rollback=max_rollback, device=device)
        self._max_rollback = max_rollback
        self._context = conv.context if conv is not None else 0
        self._inputs = conv.start(batch_size) if conv is not None else None
        self._computed = 0

    @property
    def length(self) -> int:
        """Tokens taken in and not taken back, of each text."""
        return self.tokens.length

    def push_inputs(self, normed: torch.Tensor) -> torch.Tensor:
        """Append the convolution's inputs [B, C, t]; its window [B, C, context + t]."""
        assert self._inputs is not None
        count = normed.shape[2]
        self._inputs = self._inputs.to(dtype=normed.dtype, device=normed.device)
        whole = torch.cat([self._inputs, normed], dim=2)
        window = whole[:, :, self._inputs.shape[2] - self._context :]
        kept = min(self._inputs.shape[2] - self._context + count, self._max_rollback)
        # No gradient flows from one piece to the next: this is for inference.
        self._inputs = whole[:, :, whole.shape[2] - self._context - kept :].detach().clone()
        return window

    def advance(self, count: int) -> None:
        """Note that ``count`` further tokens were computed.

        Raises:
            InvalidRequestError: they were not taken in before.
        """
        if self._computed + count > self.length:
            raise InvalidRequestError(
                f"{self._computed + count} tokens computed, but {self.length} taken in",
                hint="make memory_embeddings with prefetch_embeddings(ids, state=the same state)",
            )
        self._computed += count

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens, computed or only prefetched.

        Raises:
            InvalidRequestError: more than ``max_rollback`` keeps.
        """
        self.tokens.rollback(count)
        undone = max(0, self._computed - self.length)
        self._computed -= undone
        if self._inputs is not None:
            self._inputs = self._inputs[:, :, : self._inputs.shape[2] - undone]
