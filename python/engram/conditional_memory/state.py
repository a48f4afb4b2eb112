"""What an `EngramModule` remembers of texts that arrive in pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engram.conditional_memory.conv import ShortConv
from engram.conditional_memory.hashing import NgramHashLayout
from engram.conditional_memory.streaming import HashStream
from engram.errors import InvalidRequestError


class Piece:
    """Tokens that were taken in by one call; ``count`` of them are to be computed."""

    def __init__(self, count: int) -> None:
        self.count = count


class Mark(NamedTuple):
    """A state at one moment. Tensors are replaced and never written to, so it copies none."""

    tokens: tuple[torch.Tensor, int]
    inputs: torch.Tensor | None
    ahead: list[tuple[Piece, int]]


class EngramState:
    """The last tokens, and the last inputs of the convolution, of a batch of texts.

    Tokens may run ahead of the convolution: `EngramModule.prefetch_embeddings` takes a token in as
    soon as it is known, ``forward`` follows piece by piece, in the same order. A state serves the
    module alone whose `EngramModule.new_state` made it. Not for use from several threads at once.
    """

    def __init__(
        self,
        layout: NgramHashLayout,
        conv: ShortConv | None,
        batch_size: int,
        *,
        max_rollback: int = 64,
        device: torch.device | str = "cpu",
        layer_id: int | None = None,
    ) -> None:
        self._made_for = (layout, conv, layer_id)
        self.tokens = HashStream(layout, batch_size, max_rollback=max_rollback, device=device)
        self._max_rollback = max_rollback
        self._context = conv.context if conv is not None else 0
        self._inputs = conv.start(batch_size) if conv is not None else None
        self._ahead: list[Piece] = []

    @property
    def length(self) -> int:
        """Tokens taken in and not taken back, of each text."""
        return self.tokens.length

    def check_owner(self, layout: NgramHashLayout, conv: ShortConv | None, layer_id: int) -> None:
        """Raise `InvalidRequestError` unless it was made for this layer."""
        own_layout, own_conv, own_layer = self._made_for
        if own_layout is not layout or own_conv is not conv or own_layer not in (None, layer_id):
            raise InvalidRequestError(
                f"the state was made for another module than this one of layer {layer_id}",
                hint="make one with the module's own new_state",
            )

    def push(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, Piece]:
        """Take in tokens [B, t]: the window to hash, as `HashStream.push`, and their piece."""
        window = self.tokens.push(token_ids)
        piece = Piece(token_ids.shape[1])
        self._ahead.append(piece)
        return window, piece

    def check_next(self, piece: object | None, count: int) -> None:
        """Raise `InvalidRequestError` unless the next ``count`` tokens to compute are ``piece``'s.

        None stands for rows whose tokens are not known: then they only must have been taken in.
        """
        ahead = sum(waiting.count for waiting in self._ahead)
        if count > ahead:
            raise InvalidRequestError(
                f"{count} tokens computed, but {ahead} taken in",
                hint="make memory_embeddings with prefetch_embeddings(ids, state=the same state)",
            )
        following = [waiting for waiting in self._ahead if waiting.count or count == 0][:1]
        if piece is not None and [(p, p.count) for p in following] != [(piece, count)]:
            raise InvalidRequestError(
                "these memory embeddings are not those of the state's next tokens",
                hint="give each handle once, in the order they were made; after a rollback into a "
                "piece take back all of it and prefetch again",
            )

    def check_nothing_ahead(self) -> None:
        """Raise `InvalidRequestError` if tokens were taken in and not computed."""
        if ahead := sum(waiting.count for waiting in self._ahead):
            raise InvalidRequestError(
                f"{ahead} tokens were prefetched and are not computed yet",
                hint="give their handles as memory_embeddings first, or roll them back",
            )

    def mark(self) -> Mark:
        """What `reset` takes to undo everything since."""
        counts = [(piece, piece.count) for piece in self._ahead]
        return Mark(self.tokens.mark(), self._inputs, counts)

    def reset(self, mark: Mark) -> None:
        """Be as at `mark`."""
        self.tokens.reset(mark.tokens)
        self._inputs = mark.inputs
        self._ahead = []
        for piece, count in mark.ahead:
            piece.count = count
            self._ahead.append(piece)

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
        """Note that the next ``count`` tokens, which `check_next` let through, were computed."""
        while self._ahead and self._ahead[0].count <= count:
            count -= self._ahead.pop(0).count
        if count:
            self._ahead[0].count -= count

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens, computed or only prefetched.

        Raises:
            InvalidRequestError: more than ``max_rollback`` keeps.
        """
        self.tokens.rollback(count)
        while count and self._ahead:
            waiting = self._ahead[-1]
            taken = min(count, waiting.count)
            waiting.count -= taken
            count -= taken
            if waiting.count == 0:
                self._ahead.pop()
        if self._inputs is not None:
            self._inputs = self._inputs[:, :, : self._inputs.shape[2] - count]
