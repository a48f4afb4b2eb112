"""Fewer token ids: spellings that differ in case, accents or spaces become one id.

The rules are the demo's (``CompressedTokenizer``), which V4.1 shares. Over DeepSeek-V3's
vocabulary they leave about 77 % of the ids (paper, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode_safetensors
from torch import nn

from engram.conditional_memory.config import EngramConfig
from engram.errors import InvalidRequestError
from engram.store.durable import write_durable
from engram.store.filesystem import FileSystem

# Stands for a lone space while the ends are stripped: a private-use character, so in no text.
_LONE_SPACE = "\ue000"
_UNDECODABLE = "\ufffd"
_BATCH = 4096


class TokenCompression(nn.Module):
    """A frozen map from token ids to compressed ids; part of the state dict as buffer `lookup`.

    Args:
        lookup: int64 [V], the compressed id of each id; compressed ids are 0 .. V' - 1.
    """

    lookup: torch.Tensor

    def __init__(self, lookup: torch.Tensor) -> None:
        super().__init__()
        if lookup.dim() != 1 or lookup.numel() == 0 or lookup.is_floating_point():
            raise InvalidRequestError(
                f"a compression map is integers [V], not {lookup.dtype} {tuple(lookup.shape)}",
                hint="make one with TokenCompression.from_tokenizer",
            )
        used = torch.unique(lookup)
        if int(used[0]) != 0 or int(used[-1]) != used.numel() - 1:
            raise InvalidRequestError(
                "a compression map must use every id from 0 upwards",
                hint="make one with TokenCompression.from_tokenizer",
            )
        self._frozen = lookup.to(torch.int64).clone()
        self.register_buffer("lookup", self._frozen)
        self.size: int = used.numel()
        """V', the number of compressed ids."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenCompression:
        """The map of a `transformers` or `tokenizers` tokenizer. New ids in first-seen order.

        Raises:
            InvalidRequestError: it is neither.
        """
        numbers: dict[str, int] = {}
        lookup = [numbers.setdefault(key, len(numbers)) for key in _keys(tokenizer)]
        return cls(torch.tensor(lookup, device="cpu"))

    @property
    def vocab_size(self) -> int:
        """V, the number of ids before."""
        return int(self.lookup.numel())

    @property
    def reduction(self) -> float:
        """The part of the vocabulary that is gone, 0 .. 1."""
        return 1.0 - self.size / self.vocab_size

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Compressed ids, int64 of the same shape; negative ids pass through.

        Raises:
            InvalidRequestError: an id beyond the vocabulary (on a CPU; a GPU asserts).
        """
        ids = token_ids.to(torch.int64)
        if not ids.is_cuda and ids.numel() and int(ids.max()) >= self.vocab_size:
            raise InvalidRequestError(
                f"token id {int(ids.max())} is beyond the vocabulary of {self.vocab_size}",
                hint="use the tokenizer that the compression was made from",
            )
        return torch.where(ids < 0, ids, self.lookup.to(ids.device)[ids.clamp_min(0)])

    def compress_one(self, token_id: int) -> int:
        """The compressed id of one id."""
        return int(self(torch.tensor([token_id], device=self.lookup.device)))

    def applied_to(self, config: EngramConfig) -> EngramConfig:
        """``config`` with this map's sizes. Raises `InvalidRequestError` if it has another V'."""
        stated = config.compressed_vocab_size
        if stated not in (None, self.size):
            raise InvalidRequestError(
                f"the tokenizer compresses to {self.size} ids, the config states {stated}",
                hint="every multiplier depends on it: use the tokenizer the memory was made with",
            )
        return replace(config, vocab_size=self.vocab_size, compressed_vocab_size=self.size)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "lookup")
        # It decides the multipliers, which were drawn when the layout was made. Not the buffer is
        # compared: of a module that was on the meta device it holds nothing yet.
        own = self._frozen
        if found is not None and not torch.equal(found.to(own.device), own):
            raise InvalidRequestError(
                f"the state dict's {prefix}lookup is that of another tokenizer",
                hint="make the module with TokenCompression(state_dict['compression.lookup'])",
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, path: Path | str) -> None:
        """Write the map as a safetensors file, durably. Raises `StoreError`."""
        data = encode_safetensors({"lookup": self.lookup.cpu()}, {"format": "engram-compression"})
        write_durable(Path(path), [data], needed=len(data), fs=FileSystem())

    @classmethod
    def load(cls, path: Path | str) -> TokenCompression:
        """Read what `save` wrote. Raises `InvalidRequestError` if it is something else."""
        try:
            with safe_open(str(path), "pt") as file:
                return cls(file.get_tensor("lookup"))
        except (SafetensorError, OSError) as error:
            raise InvalidRequestError(
                f"{path} holds no compression map: {error}",
                hint="write one with TokenCompression.save",
            ) from error


def _keys(tokenizer: Any) -> Iterable[str]:
    """For each id, in order, the text that ids must share to become one."""
    from tokenizers import Regex, Tokenizer, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        backend = _SlowTokenizer(tokenizer)
    normalize = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    ).normalize_str
    size = backend.get_vocab_size() if backend is tokenizer else len(tokenizer)
    for start in range(0, size, _BATCH):
        ids = range(start, min(start + _BATCH, size))
        texts = backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
        for token_id, text in zip(ids, texts, strict=True):
            if _UNDECODABLE in text:
                # Part of a character: there is nothing to normalise, so its raw form is the key.
                yield backend.id_to_token(token_id)
            else:
                yield normalize(text) or text


class _SlowTokenizer:
    """A `transformers` tokenizer without a Rust backend, with the methods of one that has it."""

    def __init__(self, tokenizer: Any) -> None:
        if not all(hasattr(tokenizer, name) for name in ("decode", "convert_ids_to_tokens")):
            raise InvalidRequestError(
                f"{type(tokenizer).__name__} is no tokenizer",
                hint="give one of the libraries transformers or tokenizers",
            )
        self._tokenizer = tokenizer

    def decode_batch(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        decode = self._tokenizer.decode
        return [decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def id_to_token(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))
