"""The whole memory of one layer, and of all layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from engram.conditional_memory.compression import TokenCompression
from engram.conditional_memory.config import EngramConfig
from engram.conditional_memory.conv import ShortConv
from engram.conditional_memory.gate import ContextGate
from engram.conditional_memory.hashing import NgramHashLayout, as_token_tensor
from engram.conditional_memory.prefetch import Prefetcher, PrefetchHandle, shared_prefetcher
from engram.conditional_memory.state import EngramState, Piece
from engram.conditional_memory.tables.base import MemoryTable
from engram.conditional_memory.tables.memory import TorchTable
from engram.errors import InvalidRequestError


class EngramModule(nn.Module):
    """Looks up the n-grams of a text and adds what the gate lets through to the hidden state.

    Args:
        config: its ``layer_id`` says which layer this is.
        compression: maps ids before they are hashed; None: ids are hashed as they come.
        table: where the rows are; None: a new `TorchTable` with random rows. Only a `TorchTable`
            is part of the state dict and trained.
        layout: shared by the modules of one model; None: made from ``config``.

    Submodules: ``table`` (if a module), ``compression``, ``gate``, ``conv`` (if ``use_conv``).
    Buffers ``hash_multipliers`` and ``hash_primes`` let a state dict of another hash be refused.

    Raises:
        InvalidRequestError: the table has not the rows or width that the config gives, or the
            layout was made from another config or compression.
    """

    hash_multipliers: torch.Tensor
    hash_primes: torch.Tensor

    def __init__(
        self,
        config: EngramConfig,
        compression: TokenCompression | None = None,
        table: MemoryTable | None = None,
        *,
        layout: NgramHashLayout | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout or NgramHashLayout(config, compression)
        assert config.layer_id is not None
        self._check_layout(config, compression)
        self.config = config = self.layout.config.for_layer(config.layer_id)
        self.compression = self.layout.compression
        rows = self.layout.rows(config.layer_id)
        self.table = table if table is not None else _new_table(config, rows)
        if (self.table.rows, self.table.dim) != (rows, config.embedding_dim):
            raise InvalidRequestError(
                f"layer {config.layer_id} needs a table of {rows} x {config.embedding_dim}, "
                f"this one is {self.table.rows} x {self.table.dim}",
                hint="make table and module from the same config, with layer_ids in the same order",
            )
        self.gate = ContextGate(
            config.memory_dim,
            config.hidden_dim,
            num_branches=config.num_branches,
            transform=config.gate_transform,
            bias=config.bias,
            norm_eps=config.norm_eps,
        )
        self.conv = _new_conv(config) if config.use_conv else None
        self.prefetcher: Prefetcher | None = None
        """Runs this module's prefetches; None: one shared by all modules."""
        plan = self.layout.plan(config.layer_id)
        self.register_buffer("hash_multipliers", torch.tensor(plan.multipliers))
        self.register_buffer("hash_primes", torch.tensor(plan.moduli))

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        memory_embeddings: torch.Tensor | PrefetchHandle | None = None,
        return_gating: bool = False,
        *,
        state: EngramState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states with the memory added.

        Args:
            hidden_states: [B, T, D], or [B, T, branches, D].
            input_ids: integers [B, T], the text; may be left out with ``memory_embeddings``.
            memory_embeddings: what `prefetch_embeddings` returned, or [B, T, memory_dim].
            return_gating: whether to return the gate too.
            state: for texts in pieces, from `new_state`; the pieces come in order.

        Returns:
            hidden states of the given shape and dtype, and the gate [B, T, branches] or None.

        Raises:
            InvalidRequestError: shapes that do not fit, neither ids nor embeddings, or embeddings
                that are not those of the state's next tokens. The state is then as before.
        """
        hidden = self._branched(hidden_states)
        if state is None:
            states, gate = self._states(hidden, input_ids, memory_embeddings, None)
        else:
            mark = state.mark()
            try:
                states, gate = self._states(hidden, input_ids, memory_embeddings, state)
            except BaseException:
                state.reset(mark)
                raise
        states = states.to(hidden_states.dtype).view_as(hidden_states)
        return states, gate if return_gating else None

    def _states(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor | None,
        embeddings: torch.Tensor | PrefetchHandle | None,
        state: EngramState | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self._memory(hidden, input_ids, embeddings, state)
        value, gate = self.gate(hidden, memory)
        output = value
        if self.conv is not None:
            normed = None if state is None else state.push_inputs(self.conv.normed(value))
            output = value + self.conv(value, normed)
        if state is not None:
            state.advance(hidden.shape[1])
        return hidden + output, gate

    def prefetch_embeddings(
        self,
        input_ids: torch.Tensor,
        *,
        state: EngramState | None = None,
        device: torch.device | str | None = None,
    ) -> PrefetchHandle:
        """Start to look up ``input_ids`` [B, T] on a thread; give what it returns to ``forward``.

        With ``state`` the ids are taken in as the next piece of its texts. ``device`` is where the
        embeddings go; None: where the gate is.
        """
        mark = None if state is None else state.mark()
        window, piece = self._window(input_ids, state)
        target = self.gate.key_norm.device if device is None else torch.device(device)
        prefetcher = self.prefetcher or shared_prefetcher()
        try:
            handle = prefetcher.submit(lambda: self._lookup(window), target)
        except BaseException:
            if state is not None and mark is not None:
                state.reset(mark)
            raise
        handle.piece = piece
        return handle

    def new_state(self, batch_size: int, *, max_rollback: int = 64) -> EngramState:
        """The state before the first token, for ``forward(state=...)``."""
        return EngramState(
            self.layout,
            self.conv,
            batch_size,
            max_rollback=max_rollback,
            layer_id=self.config.layer_id,
        )

    def _check_layout(self, config: EngramConfig, compression: TokenCompression | None) -> None:
        own = self.layout.compression
        if compression is not None and own is not compression:
            raise InvalidRequestError(
                "the layout was made with another compression",
                hint="give the compression to the layout, and here that layout alone",
            )
        given = config if own is None else own.applied_to(config)
        if given.for_layer(self.layout.config.layer_ids[0]) != self.layout.config.for_layer(
            self.layout.config.layer_ids[0]
        ):
            raise InvalidRequestError(
                "the layout was made from another config", hint="make both from the same config"
            )

    def _lookup(self, window: torch.Tensor) -> torch.Tensor:
        return self.table.lookup(self.layout, window, self.config.layer_id)

    def _window(
        self, input_ids: torch.Tensor, state: EngramState | None
    ) -> tuple[torch.Tensor, Piece | None]:
        ids = as_token_tensor(input_ids)
        if state is not None:
            self._check_owner(state)
            return state.push(ids)
        return self.layout.window(self.layout.start(ids.shape[0], ids.device), ids), None

    def _check_owner(self, state: EngramState) -> None:
        assert self.config.layer_id is not None
        state.check_owner(self.layout, self.conv, self.config.layer_id)

    def _branched(self, hidden_states: torch.Tensor) -> torch.Tensor:
        config = self.config
        wanted = (config.num_branches, config.hidden_dim)
        if not hidden_states.is_floating_point():
            raise InvalidRequestError(
                f"hidden states must be floating-point numbers, not {hidden_states.dtype}"
            )
        if hidden_states.dim() == 3 and config.num_branches == 1:
            hidden_states = hidden_states.unsqueeze(2)
        if hidden_states.dim() != 4 or hidden_states.shape[2:] != wanted:
            raise InvalidRequestError(
                f"hidden states must be [B, T, {config.num_branches}, {config.hidden_dim}], "
                f"not {tuple(hidden_states.shape)}",
                hint="with one branch [B, T, D] is taken too",
            )
        return hidden_states

    def _memory(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor | None,
        embeddings: torch.Tensor | PrefetchHandle | None,
        state: EngramState | None,
    ) -> torch.Tensor:
        if state is not None:
            self._check_owner(state)
        if embeddings is not None:
            if state is not None:
                state.check_next(getattr(embeddings, "piece", None), hidden.shape[1])
            if isinstance(embeddings, PrefetchHandle):
                embeddings = embeddings.result()
        else:
            if input_ids is None:
                raise InvalidRequestError(
                    "neither input_ids nor memory_embeddings were given", hint="give one of them"
                )
            if state is not None:
                state.check_nothing_ahead()
            embeddings = self._lookup(self._window(input_ids, state)[0])
        wanted = (*hidden.shape[:2], self.config.memory_dim)
        if embeddings.shape != wanted:
            raise InvalidRequestError(
                f"memory embeddings must be {wanted}, not {tuple(embeddings.shape)}",
                hint="ids and hidden states must cover the same tokens",
            )
        return embeddings.to(hidden.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        plan = self.layout.plan(self.config.layer_id)
        # Against the plan: a module made on the meta device has nothing in its buffers yet.
        for name, own in (("hash_multipliers", plan.multipliers), ("hash_primes", plan.moduli)):
            found = state_dict.get(prefix + name)
            if found is not None and not np.array_equal(found.cpu().numpy(), own):
                raise InvalidRequestError(
                    f"the state dict's {prefix}{name} are those of another memory",
                    hint="layer_ids and their order, sizes, seed and compression must be the same",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class EngramStack(nn.Module):
    """The memories of all layers of a model: modules that share one hash layout.

    ``stack[layer_id]`` is the `EngramModule` of a layer. ``tables`` may give some layers theirs.
    """

    def __init__(
        self,
        config: EngramConfig,
        compression: TokenCompression | None = None,
        tables: Mapping[int, MemoryTable] | None = None,
    ) -> None:
        super().__init__()
        self.layout = NgramHashLayout(config, compression)
        tables = tables or {}
        for layer in tables:
            self.layout.plan(layer)  # names the layers there are, if it is none
        self.layers = nn.ModuleDict(
            {
                str(layer): EngramModule(
                    config.for_layer(layer), table=tables.get(layer), layout=self.layout
                )
                for layer in config.layer_ids
            }
        )

    def __getitem__(self, layer_id: int) -> EngramModule:
        self.layout.plan(layer_id)  # names the layers there are, if it is none
        module = self.layers[str(layer_id)]
        assert isinstance(module, EngramModule)
        return module

    def __iter__(self) -> Iterator[int]:
        return (int(layer) for layer in self.layers)

    def new_state(self, batch_size: int, *, max_rollback: int = 64) -> dict[int, EngramState]:
        """A state for each layer."""
        return {i: self[i].new_state(batch_size, max_rollback=max_rollback) for i in self}

    def prefetch_embeddings(
        self, input_ids: torch.Tensor, *, state: Mapping[int, EngramState] | None = None
    ) -> dict[int, PrefetchHandle]:
        """`EngramModule.prefetch_embeddings` of every layer, first layers first."""
        return {
            i: self[i].prefetch_embeddings(input_ids, state=None if state is None else state[i])
            for i in self
        }


def _new_table(config: EngramConfig, rows: int) -> TorchTable:
    return TorchTable(
        rows,
        config.embedding_dim,
        init_std=config.table_init_std,
        sparse=config.sparse_gradients,
    )


def _new_conv(config: EngramConfig) -> ShortConv:
    return ShortConv(
        config.hidden_dim,
        num_branches=config.num_branches,
        kernel_size=config.kernel_size,
        dilation=config.dilation,
        norm_eps=config.conv_norm_eps,
        zero_init=config.zero_init_conv,
    )
