"""The control plane: the rank's side answers, the HTTP process's side asks.

`RankControl` lives in a scheduler process.  Its handlers run on the scheduler thread between two
steps; what takes long goes on in the tiers' threads, and the reply leaves from there.
`RankClient` lives in the HTTP process and collects one reply from every rank.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.managers.io_struct import sock_send

from engram.core.waiting import within
from engram.errors import (
    CaptureLostError,
    DeadlineError,
    EngramError,
    InternalError,
    NamespaceChangedError,
    RamTierFullError,
    StaleTreeError,
    error_from_dict,
)
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.messages import (
    DemoteRequest,
    DescribeRequest,
    DropRequest,
    EngramReply,
    EngramRequest,
    PersistRequest,
    PinRequest,
    ProbeRequest,
    PromoteRequest,
    ReleaseRequest,
    ResidentsRequest,
    StateRequest,
    StatsRequest,
    UnpinRequest,
)
from engram.snapshot.manifest import SegmentRef
from engram.tiers.base import Persisted, Promoted, Segment, Tier

if TYPE_CHECKING:
    from engram.sglang_plugin.cache import EngramRadixCache
    from engram.tiers.manager import TierManager

logger = logging.getLogger(__name__)

Result = dict[str, Any]


class ReplySocket:
    """A push socket of our own into the HTTP process's inbox; any thread may send."""

    def __init__(self, endpoint: str) -> None:
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(endpoint)

    def send(self, reply: EngramReply) -> None:
        """Send one reply."""
        with self._lock:
            sock_send(self._socket, reply)


class RankControl:
    """Answers requests on behalf of one rank of a data-parallel replica."""

    def __init__(self, cache: EngramRadixCache, replies: ReplySocket, replica: int = 0) -> None:
        self._cache = cache
        self._replica = replica
        self._rank = cache.rank
        self._replies = replies
        self.handlers: dict[type[EngramRequest], Callable[[Any], None]] = {
            kind: self._answering(method)
            for kind, method in {
                DescribeRequest: self._describe,
                PersistRequest: self._persist,
                PromoteRequest: self._promote,
                ProbeRequest: self._probe,
                DropRequest: self._drop,
                ResidentsRequest: self._residents,
                DemoteRequest: self._demote,
                PinRequest: self._pin,
                UnpinRequest: self._unpin,
                ReleaseRequest: self._release,
                StatsRequest: self._stats,
            }.items()
        }

    def _answering(self, method: Callable[[Any], Result | Future[Result] | None]) -> Any:
        def handle(request: EngramRequest) -> None:
            # SGLang sends what is no generation to every replica.
            if request.replica not in (None, self._replica):
                return
            # A paused engine skips the scheduler's poll point, but not its requests.
            self._cache.unlock_copied()
            try:
                self._check_namespace(request)
                answer = method(request)
            except Exception as error:
                self._reply(request, error=error)
                return
            if isinstance(answer, Future):
                answer.add_done_callback(lambda done: self._settle(request, done))
            elif answer is not None:
                self._reply(request, result=answer)

        return handle

    @property
    def _tiers(self) -> TierManager:
        return self._rank.tiers

    def _check_namespace(self, request: EngramRequest) -> None:
        if isinstance(request, StateRequest) and request.namespace != self._rank.shard.namespace:
            raise NamespaceChangedError(
                "the server's weights have changed since this was asked for", hint="ask again"
            )

    def _settle(self, request: EngramRequest, done: Future[Result]) -> None:
        error = done.exception()
        if error is not None:
            self._reply(request, error=error)
        else:
            self._reply(request, result=done.result())

    def _reply(
        self,
        request: EngramRequest,
        result: Result | None = None,
        error: BaseException | None = None,
    ) -> None:
        if error is not None and not isinstance(error, EngramError):
            logger.error("Engram: %s failed", type(request).__name__, exc_info=error)
            error = InternalError(f"{type(error).__name__}: {error}")
        told = error.to_dict() if isinstance(error, EngramError) else None
        try:
            self._send(request, result, told)
        except Exception as failure:
            # A path that is no text, say: nobody may wait for an answer that cannot be written.
            logger.exception("Engram: the reply to %s was not sent", type(request).__name__)
            self._rank.tiers.ram.stats.contained_errors += 1
            lost = InternalError(f"the reply cannot be sent: {type(failure).__name__}").to_dict()
            self._cache.containment.run("a reply", lambda: self._send(request, None, lost), None)

    def _send(self, request: EngramRequest, result: Result | None, error: Result | None) -> None:
        rank = self._rank.shard.rank
        self._replies.send(
            EngramReply(
                call_id=request.call_id,
                rank=rank,
                replica=self._replica,
                result=result,
                error=error,
            )
        )

    # ---- handlers ----

    def _describe(self, request: DescribeRequest) -> Result:
        return self._rank.describe()

    def _persist(self, request: PersistRequest) -> Result | Future[Result]:
        boundary = self._locate(request)
        if request.locate:
            # It is asked because it will be saved: until then it is not the first to leave RAM.
            self._tiers.ram.want(boundary)
            located: Result = {"boundary": boundary.end, "key": boundary.key}
            if not request.measure:
                return located
            return _then(
                self._tiers.in_background(lambda: self._tiers.unsaved_bytes(boundary)),
                lambda needed: {**located, "needed": needed},
            )

        def result(done: Persisted) -> Result:
            return {
                "boundary": boundary.end,
                "key": boundary.key,
                "refs": [ref.model_dump(mode="json") for ref in done.refs],
                "bytes": done.nbytes,
                "unique_bytes": done.written,
                "health": done.health,
            }

        return _then(self._tiers.persist(boundary), result)

    def _locate(self, request: PersistRequest) -> Segment:
        """The boundary a snapshot of these tokens ends at, captured now if VRAM still has it."""
        page_size = self._rank.page_size
        keys = page_keys(request.tokens, page_size, request.extra_key, request.cache_salt)
        end = self._end(request, keys)
        if end % page_size or not 0 < end <= len(keys) * page_size:
            if end == 0:
                raise CaptureLostError(
                    f"the turn's {len(request.tokens)} tokens fill no page of {page_size}: there "
                    "is no state of it to keep",
                    hint="save a later turn, or start the server with --page-size 1",
                    details={"boundary": end},
                )
            raise CaptureLostError(
                f"there is no boundary at token {end} of {len(request.tokens)}",
                hint="save a later turn",
                details={"boundary": end},
            )
        keys = keys[: end // page_size]
        tokens = array("q", request.tokens[:end])
        ram = self._tiers.ram
        # Before anything that only this rank knows: see `cache.py` on ranks.
        captured = self._cache.capture_resident(tokens, request.extra_key, request.cache_salt)
        held = self._tiers.boundary(keys[-1])
        if held is not None and ram.whole(held):
            return held
        if self._cache.stale:
            raise StaleTreeError(
                f"the state at token {end} cannot be saved: the weights have changed, and SGLang's "
                "cache has not been flushed since",
                hint="POST /flush_cache when no request is running, then save again",
            )
        if captured is None:
            raise CaptureLostError(
                f"the state at token {end} is no longer in VRAM, in RAM or on disk",
                details={"boundary": end},
            )
        held = self._tiers.boundary(keys[-1])
        if held is None:
            raise RamTierFullError(
                f"no room in the RAM tier for the state at token {end}",
                hint="raise --max-warm-memory-gb, or retry when running saves are done",
            )
        return held

    def _end(self, request: PersistRequest, keys: list[str]) -> int:
        """Where the state of these tokens stands: as remembered of their request, or as expected.

        An id that a client used again stands for several requests; the page key tells which.
        """
        turns = self._cache.finished_turns(request.request_rid) if request.request_rid else ()
        for turn in reversed(turns):
            last = turn.boundary // self._rank.page_size - 1
            if last < len(keys) and keys[last] == turn.key:
                return turn.boundary
        if len(turns) == 1:
            raise InternalError(
                f"request {request.request_rid}: the recorded tokens are not those of its state",
                hint="please report this; the state was not saved",
            )
        return request.boundary

    def _promote(self, request: PromoteRequest) -> Future[Result]:
        resident = None
        if request.tokens is not None:
            tokens = array("q", request.tokens)
            resident = self._cache.resident(tokens, request.extra_key, request.cache_salt)
        refs = self._refs(request.refs)
        promoted = self._tiers.promote(
            refs, request.owner, seconds=request.seconds, exact=request.exact
        )

        def result(done: Promoted) -> Result:
            return {
                "source_tier": done.source.value,
                "bytes": done.nbytes,
                "read_bytes": done.read,
                "vram_tokens": resident.length if resident else None,
                "state_slot": resident.state_slot if resident else None,
            }

        return _then(promoted, result)

    def _probe(self, request: ProbeRequest) -> Result:
        tokens = array("q", request.tokens)
        resident = self._cache.resident(tokens, request.extra_key, request.cache_salt)
        if resident.length == len(tokens):
            return {"tier": Tier.VRAM.value}
        ram = self._tiers.ram
        held = self._tiers.boundary(request.key)
        in_ram = held is not None and ram.loadable(held, 0)
        return {"tier": (Tier.RAM if in_ram else Tier.DISK).value}

    def _drop(self, request: DropRequest) -> Future[Result]:
        mine = request.segment_ids[self._rank.shard.rank]
        return _then(self._tiers.drop(mine), lambda count: {"dropped": count})

    def _residents(self, request: ResidentsRequest) -> Future[Result]:
        return _then(
            self._tiers.in_background(self._tiers.ram.durable_residents),
            lambda found: {"segments": [list(one) for one in found]},
        )

    def _demote(self, request: DemoteRequest) -> Future[Result]:
        mine = frozenset(request.segment_ids[self._rank.shard.rank])
        ram = self._tiers.ram
        return _then(
            self._tiers.in_background(lambda: ram.demote(mine)), lambda freed: {"bytes": freed}
        )

    def _pin(self, request: PinRequest) -> Result:
        keys = page_keys(
            request.tokens, self._rank.page_size, request.extra_key, request.cache_salt
        )
        end = self._end(request, keys)
        tokens = array("q", request.tokens[:end])
        resident = self._cache.pins.pin(
            request.owner, tokens, request.extra_key, request.cache_salt
        )
        return {"resident": resident, "tokens": end, **self._cache.pins.report()}

    def _unpin(self, request: UnpinRequest) -> Result:
        return {"unpinned": self._cache.pins.unpin(request.owner)}

    def _release(self, request: ReleaseRequest) -> None:
        self._tiers.abandon(request.owner)

    def _stats(self, request: StatsRequest) -> Result:
        ram = self._tiers.ram
        return {
            "replica": self._replica,
            "ram_bytes": ram.used,
            "ram_capacity": ram.capacity,
            "ram_held_bytes": ram.held,
            "ram_segments": ram.residents,
            **self._tiers.depths(),
            "tree_locks": self._cache.locks,
            "vram": self._cache.pins.report(),
            "segments": len(ram),
            "weights_changes": self._rank.epoch,
            "stale_tree": self._cache.stale,
            **asdict(ram.stats),
        }

    def _refs(self, chains: list[list[dict[str, Any]]]) -> list[SegmentRef]:
        return [SegmentRef.model_validate(ref) for ref in chains[self._rank.shard.rank]]


def _then(future: Future[Any], convert: Callable[[Any], Result]) -> Future[Result]:
    """A future of the converted result, or of the same error."""
    converted: Future[Result] = Future()

    def finish(done: Future[Any]) -> None:
        if done.cancelled():
            converted.set_exception(DeadlineError("given up by whoever asked for it"))
            return
        error = done.exception()
        if error is not None:
            converted.set_exception(error)
            return
        try:
            converted.set_result(convert(done.result()))
        except BaseException as failure:
            converted.set_exception(failure)

    future.add_done_callback(finish)
    return converted


@dataclass
class _Call:
    future: asyncio.Future[list[Result]]
    expected: int
    results: dict[tuple[int, int], Result] = field(default_factory=dict)


class RankClient:
    """Asks every rank and waits for all their answers; one event loop, the HTTP process's.

    There are `ranks` in each of `replicas`.
    """

    def __init__(self, tokenizer_manager: Any, ranks: int, replicas: int = 1) -> None:
        self._manager = tokenizer_manager
        self._ranks = ranks
        self.replicas = replicas
        self._calls: dict[str, _Call] = {}

    async def ask(
        self,
        kind: type[EngramRequest],
        *,
        timeout: float,
        replica: int | None = None,
        **fields: Any,
    ) -> list[Result]:
        """The ranks' results in the order of ranks, or the first error as an `EngramError`.

        Those of one replica; without `replica` those of all, one replica after another.
        """
        call_id = uuid.uuid4().hex
        expected = self._ranks * (self.replicas if replica is None else 1)
        call = _Call(asyncio.get_running_loop().create_future(), expected)
        self._calls[call_id] = call
        try:
            self.tell(kind, call_id=call_id, replica=replica, **fields)
            return await within(timeout, call.future)
        except asyncio.TimeoutError:
            raise DeadlineError(
                f"{kind.__name__}: no answer from every rank within {timeout:g} s",
                hint="the store may be slow; look at the server's log and retry",
            ) from None
        finally:
            self._calls.pop(call_id, None)

    def tell(self, kind: type[EngramRequest], *, call_id: str = "", **fields: Any) -> None:
        """Send a request whose replies nobody waits for."""
        self._manager.auto_create_handle_loop()
        self._manager._dispatch_to_scheduler(kind(call_id=call_id, **fields))

    def on_reply(self, reply: EngramReply) -> None:
        """Called by SGLang's receive loop for every `EngramReply`."""
        call = self._calls.get(reply.call_id)
        if call is None or call.future.done():
            return
        if reply.error is not None:
            call.future.set_exception(error_from_dict(reply.error))
            return
        call.results[reply.replica, reply.rank] = reply.result or {}
        if len(call.results) == call.expected:
            call.future.set_result([call.results[place] for place in sorted(call.results)])
