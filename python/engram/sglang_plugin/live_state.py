"""The state where a request really stands, under the `extra_buffer` strategy.

There SGLang copies a request's recurrent state every so many tokens (it *tracks* it) and gives the
tree the last copy: what was computed after it, up to 255 tokens, is lost for the next turn.

When a request has ended nobody writes its own, *live* state any more, so the tree can have that.
This is an exchange of two slot numbers: the request's own slot takes the place of the tracking slot
that upstream would keep, and upstream's own clean-up frees the other.  At a point inside a prompt
(`points.py`) the request goes on with its slot, and the tree gets a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.components import MambaComponent


class LiveStateComponent(MambaComponent):
    """The tree's keeper of states, which prefers the live one where a request has ended."""

    def prepare_for_caching_req(
        self, req: Any, insert_params: Any, token_ids_len: int, is_finished: bool
    ) -> int | None:
        """Say which state goes into the tree, and how many tokens it covers."""
        if self._stands_at(req, token_ids_len):
            if is_finished:
                self._hand_over(req, insert_params)
                return token_ids_len
            if self.cache.at_point(req, token_ids_len) and self.cache.room_for_state():
                insert_params.mamba_value = self._copy(req)
                return token_ids_len
        length: int | None = super().prepare_for_caching_req(
            req=req,
            insert_params=insert_params,
            token_ids_len=token_ids_len,
            is_finished=is_finished,
        )
        return length

    def _stands_at(self, req: Any, token_ids_len: int) -> bool:
        """Whether the live state is that after exactly these tokens, and the tree can name it.

        `kv_committed_len` counts what the state has seen: with overlap a step that was launched
        before the stop token was known has consumed that token too.
        """
        kv = req.kv
        return (
            self.cache.enable_mamba_extra_buffer
            and kv.mamba_pool_idx is not None
            and kv.mamba_ping_pong_track_buffer is not None
            and kv.kv_committed_len == token_ids_len
            and token_ids_len % self.cache.page_size == 0
        )

    def _hand_over(self, req: Any, insert_params: Any) -> None:
        pool = self.cache.req_to_token_pool
        keep = pool.get_mamba_ping_pong_keep_idx(req)
        live = req.kv.mamba_pool_idx.unsqueeze(-1).clone()
        req.kv.mamba_pool_idx = req.kv.mamba_ping_pong_track_buffer[keep].clone()
        pool.set_mamba_ping_pong_slot(req, keep, live[0])
        insert_params.mamba_value = live
        insert_params.mamba_keep_idx = keep

    def _copy(self, req: Any) -> torch.Tensor:
        pool = self.cache.req_to_token_pool
        translate = pool.translate_mamba_indices
        slot = self._alloc_mamba_slot(req)
        # Behind the prefill that makes the state, which with overlap may still be running.
        with self.cache.on_forward_stream():
            source = req.kv.mamba_pool_idx.unsqueeze(0)
            pool.mamba_pool.copy_from(translate(source), translate(slot))
        return slot
