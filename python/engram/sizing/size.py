"""What a model's snapshots cost, and how many of them a tier holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engram.errors import InvalidRequestError
from engram.sizing.buffers import Buffer
from engram.sizing.config import Config
from engram.sizing.families import Precision, layout_of


@dataclass(frozen=True)
class ModelSize:
    """The buffers of one rank, by layer and name. All figures are bytes of one rank.

    They are the model's own bytes. A segment's file adds its tokens (4 bytes each), a header and
    alignment: a few KiB.
    """

    architecture: str
    ranks: int
    conv_dtype: str
    state_dtype: str
    kv_dtype: str
    buffers: tuple[Buffer, ...]

    @cached_property
    def state_bytes(self) -> int:
        """The recurrent state of one sequence at one boundary, whatever its length."""
        return sum(buffer.bytes for buffer in self.buffers if not buffer.per_token)

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """The KV rows of one token."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.per_token)

    @cached_property
    def recurrent_layers(self) -> int:
        """Layers that have a recurrent state."""
        return len({buffer.layer for buffer in self.buffers if not buffer.per_token})

    @cached_property
    def attention_layers(self) -> int:
        """Layers that have a KV cache."""
        return len({buffer.layer for buffer in self.buffers if buffer.per_token})

    def snapshot_bytes(self, tokens: int, states: int = 1) -> int:
        """A snapshot of ``tokens`` tokens that stands on ``states`` stored states.

        A conversation saved at every turn stores one state a turn, and all KV once.
        """
        if tokens < 1 or states < 1:
            raise InvalidRequestError("a snapshot has at least one token and one state")
        return states * self.state_bytes + tokens * self.kv_bytes_per_token

    def capacity(self, room: int, tokens: int) -> int:
        """How many conversations with one snapshot of ``tokens`` tokens fit into ``room`` bytes."""
        return room // self.snapshot_bytes(tokens)


def size_of(config: Config, *, ranks: int = 1, precision: Precision | None = None) -> ModelSize:
    """The size of a model served on ``ranks`` tensor-parallel ranks.

    Raises `UnsupportedError` for an architecture that is not known, `InvalidRequestError` for a
    configuration that is incomplete, or a number of ranks that does not divide its heads.
    """
    layout, buffers = layout_of(config, ranks, precision or Precision())
    if not any(buffer.bytes for buffer in buffers):
        raise InvalidRequestError(f"{config.source} describes a model without a state")
    return ModelSize(
        architecture=config.architecture,
        ranks=ranks,
        conv_dtype=layout.conv_dtype,
        state_dtype=layout.state_dtype,
        kv_dtype=layout.kv_dtype,
        buffers=tuple(buffers),
    )
