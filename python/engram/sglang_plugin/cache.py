"""`EngramRadixCache`: decides what of the tree is captured, and copies it out behind the scheduler.

Every insert is reconciled with Engram's own index: the keys of the path on which the insert ended
are compared with what is stored, the run of pages past the last stored rows becomes a segment, and
the recurrent state at its end another.  Upstream's own offers (`offload`) miss a state that lands
on a node already stored and cannot be repeated, hence this.

Captured is the end of a finished request.  States inside prompts and replies (`points.py`) stay in
the tree: each state of a real model is tens of MiB.

While a copy is running its path is locked in the tree, so the device memory it reads cannot be
given to another request; `check_hicache_events`, which every scheduler step calls, unlocks it.

The trees of tensor-parallel ranks must stay the same: ranks that evict differently schedule
differently, and then wait for each other for ever.  What a rank has in RAM, how fast it copies and
what fails there is its own; so a path is locked and looked up on every rank alike, whether there is
anything to copy or not, and unlocked when it is done on all.

States are those of the weights that made them.  A request is marked with the weights it computes
with when the tree is asked for its prefix, for from there on it computes.  If others have come
before it ends, its state is a mixture: it is not captured, and the tree it was inserted into is
*stale*, as is one that the weights changed under.  From a stale tree nothing is captured, and
nothing is loaded on top of it, until SGLang empties it (`/flush_cache`).
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from engram.core.canonical import blake3_hex
from engram.sglang_plugin.contain import Containment, contained
from engram.sglang_plugin.linker import EngramLinker
from engram.sglang_plugin.live_state import LiveStateComponent
from engram.sglang_plugin.points import is_point, last_point, next_point
from engram.sglang_plugin.streams import SideStream
from engram.sglang_plugin.vram import VramPins
from engram.tiers.health import StateCheck
from engram.tiers.manager import TierManager

logger = logging.getLogger(__name__)

MAX_FINISHED: Final = 100_000
"""Request ids whose boundaries are remembered; about 200 bytes each."""
MAX_FINISHED_OF_A_RID: Final = 8
"""A client may give one id to all its requests."""


@dataclass(frozen=True, slots=True)
class FinishedTurn:
    """Where the state of a finished request stands."""

    key: str
    boundary: int


@dataclass(frozen=True, slots=True)
class Resident:
    """What the tree holds of a token sequence: `length` tokens, the state at their end."""

    length: int
    state_slot: int | None


class EngramLinkerWrapper(UnifiedCacheLinkerWrapper):
    """Upstream's tree-side flow, with leases that end when the request's interest ends."""

    def match(self, key: Any, req: Any, result: Any) -> Any:
        # Upstream never clears the marker of a hit that has since vanished.
        self.hit_markers.pop(req.rid, None)
        if not self.cache.stale:
            result = super().match(key, req, result)
        if req.rid not in self.hit_markers:
            # Nothing was promised: what the request waited for is in VRAM, or of no use.
            self.cache_linker.tiers.release(req.rid)
        return result

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        self.cache_linker.tiers.release(rid)


class EngramRadixCache(UnifiedRadixCache):
    """The unified radix tree, with capture."""

    linker: EngramLinkerWrapper | None

    def init_cache_linker(self, cache_linker: EngramLinker) -> None:
        """Attach the linker; upstream calls this once, before anything is served."""
        self.linker = EngramLinkerWrapper(self, cache_linker)
        cache_linker.least_of_ranks = self._least_of_ranks
        self.containment: Containment = cache_linker.containment
        self.rank = cache_linker.rank
        self._pools = cache_linker.device_pools
        self._stream = SideStream(self._pools.device, cache_linker.forward_stream)
        self._has_state = ComponentType.MAMBA in self.components
        if self._has_state:
            # Upstream's own way to another component (`component_registry_override`) gives up the
            # native tree core.
            self.components[ComponentType.MAMBA].__class__ = LiveStateComponent
        self._finishing: Any = None
        self._finished: OrderedDict[str, tuple[FinishedTurn, ...]] = OrderedDict()
        self._locks: dict[int, Any] = {}
        self._copied: set[int] = set()
        self._next_lock = 0
        self._empty = True
        self._stale = False
        self.pins = VramPins(self, self._pools, self.rank.pin_budget)

    @property
    def tiers(self) -> TierManager:
        """The tiers of the weights that the model computes with now."""
        return self.rank.tiers

    @property
    def stale(self) -> bool:
        """Whether the tree may hold states that other weights made."""
        return self._stale

    @property
    def locks(self) -> int:
        """Paths that are locked because a copy of them is running."""
        return len(self._locks)

    def weights_changed(self, name: str | None) -> None:
        """The model computes with the weights of this name from here on, or with weights that
        nothing names; on the scheduler thread, on every rank alike.

        Each rank has read the directory for itself, and one may have failed to, or met another
        content: then the weights are nobody's on all of them.
        """
        if not self._ranks_agree(name or ""):
            logger.warning("Engram: the ranks do not agree on the name of the weights")
            name = None
        if name is None:
            name = self.rank.runtime_weights()
        if not self.rank.change_weights(name):
            return
        self._stale = not self._empty
        logger.info(
            "Engram: the weights are %s now, namespace %s%s",
            name,
            self.rank.namespace.id[:12],
            "; nothing is saved until the cache is flushed" if self._stale else "",
        )

    # ---- upstream's calls ----

    def match_prefix(self, params: Any) -> Any:
        """Mark the request that will compute what is not found: with which weights."""
        if params.req is not None:
            params.req.engram_epoch = None if self._stale else self.rank.epoch
        return super().match_prefix(params)

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Remember whose finished tokens the inserts inside are."""
        if getattr(req, "engram_epoch", None) != self.rank.epoch:
            self._stale = True
        if not req.finished() and self._follows_last_point(req, up_to):
            return
        self._finishing = req if req.finished() else None
        try:
            super().checkpoint(req, up_to=up_to, **kwargs)
            if self._finishing is not None:
                # Nothing was inserted: SGLang kept no state of this turn past what the tree has.
                self._remember_nearest(req, up_to)
        finally:
            self._finishing = None

    def insert(self, params: Any) -> Any:
        """Insert, then reconcile a finished request's path with the boundary index."""
        result = super().insert(params)
        self._empty = False
        # Of the inserts inside one checkpoint the first is the whole sequence.
        req, self._finishing = self._finishing, None
        if req is not None:
            self._reconcile(req, params, result)
        return result

    # ---- states inside prompts and replies ----

    def next_point(self, req: Any, start: int) -> int | None:
        """The first point past token `start` of a request's prompt; None if there is none."""
        if not self._has_state or req.skip_radix_cache_insert:
            return None
        # What is no text is computed by encoders, whose pieces SGLang cuts in its own way.
        if req.input_embeds is not None or req.multimodal_inputs is not None:
            return None
        # Of a prefill in pieces SGLang returns the hidden states of the last piece alone.
        if req.return_hidden_states is True:
            return None
        return next_point(start, len(req.origin_input_ids), self.page_size, self.rank.interval)

    def at_point(self, req: Any, end: int) -> bool:
        """Whether token `end` is a point of a request's prompt."""
        return is_point(end, len(req.origin_input_ids), self.page_size, self.rank.interval)

    def _follows_last_point(self, req: Any, end: int) -> bool:
        """Whether a prompt ends here whose last point is in the tree: a state one token further
        would cost as much as that one, and nothing can start from it that cannot from that."""
        prompt = len(req.origin_input_ids)
        if not self._has_state or end != prompt:
            return False
        return 0 < req.kv.cache_protected_len == last_point(prompt, self.page_size)

    def keep_reply(self, req: Any) -> None:
        """Put the state of a running reply into the tree, at the first it has past a multiple of
        the interval."""
        interval = self.rank.interval
        if not interval or not self._has_state or req.skip_radix_cache_insert:
            return
        if self.enable_mamba_extra_buffer:
            end = req.kv.mamba_last_track_seqlen or 0
        else:
            end = req.kv.kv_committed_len // self.page_size * self.page_size
        if end // interval <= req.kv.cache_protected_len // interval or not self.room_for_state():
            return
        req.refresh_fill_ids()
        self.checkpoint(req, up_to=end)

    def room_for_state(self) -> bool:
        """Whether a slot for another state is free or can be made free; SGLang asserts there is."""
        free: int = self.req_to_token_pool.mamba_allocator.available_size()
        return free + self.mamba_evictable_size() > 0

    def on_forward_stream(self) -> AbstractContextManager[Any]:
        """A context in which device work is in order with forward passes."""
        return self._stream.on_forward()

    def check_hicache_events(self) -> None:
        """Called every scheduler step: let go of paths whose copies are done."""
        super().check_hicache_events()
        self.unlock_copied()

    def reset(self) -> None:
        """The tree is emptied: its locks die with it."""
        super().reset()
        self._empty, self._stale = True, False
        if getattr(self, "_locks", None) is not None:
            self._locks.clear()
            self._copied.clear()
            self.pins.forget()

    # ---- capture ----

    @contained("capture")
    def _reconcile(self, req: Any, params: Any, result: Any) -> None:
        if self._has_state and params.mamba_value is None:
            return
        if self._stale:
            self.tiers.ram.stats.capture_stale += 1
            return
        turn = self._capture(result.last_device_node, params.key.token_ids)
        if turn is not None:
            self._remember(req.rid, turn)

    @contained("capture")
    def _remember_nearest(self, req: Any, end: int) -> None:
        """The turn stands at the longest part of it that the tree has a state of."""
        tokens = array("q", req.full_untruncated_fill_ids[:end])
        if self._stale or not tokens:
            return
        found = self._match(tokens, req.extra_key, req.cache_salt)
        if found.device_prefix_len:
            turn = self._capture(found.last_device_node, tokens[: found.device_prefix_len])
            if turn is not None:
                self._remember(req.rid, turn)

    def _capture(self, node: Any, token_ids: Sequence[int]) -> FinishedTurn | None:
        """Queue the copy of what the path to `node` has past its last stored rows."""
        keys = [*self.tree_core.get_prefix_hash_values(node), *self.tree_core.get_hash_values(node)]
        if not keys:
            return None
        end = len(keys) * self.page_size
        if self._has_state and self._state_slot(node) is None:
            return None
        token = self._lock(node)
        # Where the turn stands is known to all ranks alike, also to one whose copy fails here.
        queued = self.containment.run(
            "capture", lambda: self._keep(token, node, keys, token_ids), False
        )
        if not queued:
            self._copied.add(token)
        return FinishedTurn(keys[-1], end)

    def _keep(self, token: int, node: Any, keys: list[str], token_ids: Sequence[int]) -> bool:
        """Queue the copy of a locked path, unless what is at its end is held already."""
        known = self.tiers.boundary(keys[-1])
        if known is not None and self.tiers.ram.whole(known):
            self.tiers.ram.touch(known.ancestors())
            return False
        return self._copy(token, node, keys, token_ids)

    def _copy(self, token: int, node: Any, keys: list[str], token_ids: Sequence[int]) -> bool:
        """Queue the copy of a locked path; False if the RAM tier has no room for it."""
        end = len(keys) * self.page_size
        # Never those that end here: what is copied now are rows and state of one computation.
        parent = self.tiers.stand(keys[:-1])
        start = parent.end if parent is not None else 0
        state_slot = self._state_slot(node)
        kv_slots = self.path_device_indices(node)[start:].long()
        assert len(kv_slots) == end - start, (len(kv_slots), start, end)
        fence = self._stream.fence()

        def read(
            targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck
        ) -> None:
            with self._stream.after(fence):
                self._pools.gather(targets, kv_slots[first:last], state_slot, check)
            self._stream.synchronize()

        return self.tiers.capture(
            keys[start // self.page_size :],
            start,
            token_ids[start:end],
            parent,
            read,
            on_done=lambda: self._copied.add(token),
        )

    def _state_slot(self, node: Any) -> torch.Tensor | None:
        if not self._has_state:
            return None
        value = self.tree_core.get_component_device_value(node, ComponentType.MAMBA)
        return None if value is None else value.long().view(-1)

    def _lock(self, node: Any) -> int:
        self._next_lock += 1
        self._locks[self._next_lock] = self.lock(node)
        return self._next_lock

    def unlock_copied(self) -> None:
        """Unlock the paths whose copies are done on every rank; on the scheduler thread only.

        Every rank has the same locks, so that all or none ask the others here.
        """
        if not self._locks:
            return
        done = next(
            (count for count, token in enumerate(self._locks) if token not in self._copied),
            len(self._locks),
        )
        for token in list(self._locks)[: self._least_of_ranks(done)]:
            self._copied.discard(token)
            self.unlock(self._locks.pop(token))

    def _least_of_ranks(self, number: int) -> int:
        """The least that any tensor-parallel rank says; every one must ask at the same place."""
        least = torch.tensor([number], dtype=torch.int)
        self._all_reduce_attn_groups(least, torch.distributed.ReduceOp.MIN)
        return int(least.item())

    def _ranks_agree(self, text: str) -> bool:
        """Whether every tensor-parallel rank says the same; all must ask at the same place."""
        number = int(blake3_hex(text.encode())[:15], 16)
        both = torch.tensor([number, -number], dtype=torch.int64)
        self._all_reduce_attn_groups(both, torch.distributed.ReduceOp.MIN)
        least, minus_most = both.tolist()
        return bool(least == -minus_most)

    # ---- what the control plane asks ----

    def finished_turns(self, rid: str) -> tuple[FinishedTurn, ...]:
        """The boundaries at which the requests of this id ended, as far as they are remembered."""
        return self._finished.get(rid, ())

    def resident(self, token_ids: Any, extra_key: str | None, cache_salt: str | None) -> Resident:
        """How much of a token sequence the tree could serve without any load."""
        if self._stale:
            return Resident(0, None)
        result = self._match(token_ids, extra_key, cache_salt)
        slot = None
        if result.device_prefix_len and self._has_state:
            value = self._state_slot(result.last_device_node)
            slot = None if value is None else int(value[0])
        return Resident(result.device_prefix_len, slot)

    def path_of(
        self, token_ids: Any, extra_key: str | None, cache_salt: str | None
    ) -> tuple[Any, torch.Tensor, int | None] | None:
        """Node, KV slots and state slot of a sequence that the tree holds to its last token; None
        if it does not."""
        if self._stale:
            return None
        result = self._match(token_ids, extra_key, cache_salt)
        node = result.last_device_node
        state = self._state_slot(node)
        if result.device_prefix_len != len(token_ids) or (self._has_state and state is None):
            return None
        slot = None if state is None else int(state[0])
        return node, self.path_device_indices(node).long(), slot

    def resident_sizes(self) -> tuple[int, int]:
        """How many tokens' KV and how many states the tree holds."""
        tokens = self.full_evictable_size() + self.full_protected_size()
        if not self._has_state:
            return tokens, 0
        return tokens, self.mamba_evictable_size() + self.mamba_protected_size()

    def capture_resident(
        self, token_ids: Any, extra_key: str | None, cache_salt: str | None
    ) -> FinishedTurn | None:
        """Capture a sequence that the tree holds to its last token; None if it does not."""
        if self._stale:
            return None
        result = self._match(token_ids, extra_key, cache_salt)
        if result.device_prefix_len != len(token_ids):
            return None
        return self._capture(result.last_device_node, token_ids)

    def _match(self, token_ids: Any, extra_key: str | None, cache_salt: str | None) -> Any:
        key = RadixKey(token_ids, extra_key, cache_salt=cache_salt)
        return self.match_prefix(MatchPrefixParams(key=key))

    def _remember(self, rid: str, turn: FinishedTurn) -> None:
        earlier = [known for known in self._finished.pop(rid, ()) if known != turn]
        self._finished[rid] = (*earlier, turn)[-MAX_FINISHED_OF_A_RID:]
        if len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)
