"""Hashes of texts that arrive in pieces: chunked prefill, decode, and drafts taken back."""

from __future__ import annotations

import torch

from engram.conditional_memory.hashing import NgramHashLayout, as_token_tensor
from engram.errors import InvalidRequestError


class HashStream:
    """The last tokens of a batch of texts, so that pushed pieces hash like the whole.

    ``max_rollback`` bounds how many tokens `rollback` can take back, and so the memory: it keeps
    max_n - 1 + max_rollback ids a text. Not for use from several threads at once.
    """

    def __init__(
        self,
        layout: NgramHashLayout,
        batch_size: int,
        *,
        max_rollback: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_rollback < 0 or batch_size < 0:
            raise InvalidRequestError(
                f"a stream has no batch of {batch_size} and takes back no {max_rollback} tokens",
                hint="give batch_size and max_rollback of at least 0",
            )
        self._layout = layout
        self._context = layout.config.max_n - 1
        self._max_rollback = max_rollback
        # Compressed ids, pad in front of the text; the last `_context` are what n-grams reach.
        self._history = layout.start(batch_size, device)
        self.length = 0
        """Tokens pushed and not taken back, of each text."""

    @property
    def batch_size(self) -> int:
        """How many texts there are."""
        return self._history.shape[0]

    def push(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append ``token_ids``, integers [B, t]; the window to hash, int64 [B, max_n - 1 + t].

        `NgramHashLayout.hash_window` takes it for each layer. Raises `InvalidRequestError` for
        another batch size.
        """
        ids = as_token_tensor(token_ids)
        if ids.shape[0] != self.batch_size:
            raise InvalidRequestError(
                f"{ids.shape[0]} texts were pushed to a stream of {self.batch_size}",
                hint="make one stream for each batch",
            )
        whole = self._layout.window(self._history, ids.to(self._history.device))
        kept = self._history.shape[1] - self._context + ids.shape[1]
        kept = min(kept, self._max_rollback)
        window = whole[:, self._history.shape[1] - self._context :]
        self._history = whole[:, whole.shape[1] - self._context - kept :].clone()
        self.length += ids.shape[1]
        return window

    def mark(self) -> tuple[torch.Tensor, int]:
        """What `reset` takes to undo everything since."""
        return self._history, self.length

    def reset(self, mark: tuple[torch.Tensor, int]) -> None:
        """Be as at `mark`."""
        self._history, self.length = mark

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens of every text, as after refused drafts.

        Raises:
            InvalidRequestError: more than are kept.
        """
        kept = self._history.shape[1] - self._context
        if not 0 <= count <= kept:
            raise InvalidRequestError(
                f"cannot take back {count} tokens, {kept} are kept",
                hint="raise max_rollback of the stream",
            )
        self._history = self._history[:, : self._history.shape[1] - count]
        self.length -= count
