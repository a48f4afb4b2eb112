"""SGLang's side of the service's ports: the ranks behind the control plane, and generation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from engram.conversation.turns import FinishedRequest, Tag
from engram.core.namespace import Namespace
from engram.core.tokens import TokenArray
from engram.errors import GenerationAbortedError, InvalidRequestError
from engram.server.tagging import CURRENT_TAG
from engram.service.ports import (
    Brought,
    Chains,
    EngineInfo,
    Generation,
    Located,
    ResidentSegment,
    Stored,
)
from engram.sglang_plugin.chat import WAITED
from engram.sglang_plugin.control import RankClient, Result
from engram.sglang_plugin.keys import page_keys
from engram.sglang_plugin.messages import (
    DemoteRequest,
    DescribeRequest,
    DropRequest,
    PersistRequest,
    PinRequest,
    ProbeRequest,
    PromoteRequest,
    ReleaseRequest,
    ResidentsRequest,
    StatsRequest,
    UnpinRequest,
)
from engram.sglang_plugin.replicas import Replicas
from engram.snapshot.manifest import SegmentRef

ANSWER_TIMEOUT_S: Final = 60.0
"""For answers that need no disk; a long prefill step may be in the way."""
PERSIST_TIMEOUT_S: Final = 600.0


class SglangRanks:
    """The scheduler ranks (`engram.service.ports.Ranks`)."""

    def __init__(self, client: RankClient, replicas: Replicas | None = None) -> None:
        self._client = client
        self.replicas = replicas or Replicas(1)

    async def describe(self) -> EngineInfo:
        """Ask the ranks who they are."""
        answers = await self._client.ask(DescribeRequest, timeout=ANSWER_TIMEOUT_S)
        first = answers[0]
        return EngineInfo(
            Namespace(first["namespace"]),
            first["world_size"],
            first["page_size"],
            first["num_layers"],
            first["model_type"],
            first["model_name"],
        )

    async def locate(
        self, namespace: str, request: FinishedRequest, boundary: int, *, measure: bool = False
    ) -> Located:
        """Where a snapshot of the request would end, and if asked for, what it would write."""
        answers = await self._persist(namespace, request, boundary, locate=True, measure=measure)
        needed = sum(answer["needed"] for answer in answers) if measure else None
        return Located(answers[0]["boundary"], answers[0]["key"], needed)

    async def persist(self, namespace: str, request: FinishedRequest, boundary: int) -> Stored:
        """Make the state at the request's end durable on every rank."""
        answers = await self._persist(namespace, request, boundary, locate=False)
        chains = tuple(
            tuple(SegmentRef.model_validate(ref) for ref in answer["refs"]) for answer in answers
        )
        return Stored(
            answers[0]["boundary"],
            chains,
            sum(ref.bytes for chain in chains for ref in chain),
            sum(answer["unique_bytes"] for answer in answers),
            next((answer["health"] for answer in answers if answer["health"]), None),
        )

    async def _persist(
        self,
        namespace: str,
        request: FinishedRequest,
        boundary: int,
        *,
        locate: bool,
        measure: bool = False,
    ) -> list[Result]:
        return await self._client.ask(
            PersistRequest,
            timeout=PERSIST_TIMEOUT_S,
            replica=self.replicas.holder(request.rid),
            namespace=namespace,
            request_rid=request.rid,
            tokens=request.tokens.tolist(),
            boundary=boundary,
            locate=locate,
            measure=measure,
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
        )

    async def promote(
        self,
        namespace: str,
        chains: Chains,
        *,
        owner: str,
        seconds: float,
        exact: bool,
        timeout: float,
        tokens: TokenArray | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Brought:
        """Bring chains into RAM, verified, leased to `owner`.

        `exact`: by request, into that of every replica, since nobody knows yet which one will be
        asked. Else for the request `owner`, into that of the replica it goes to.
        """
        answers = await self._client.ask(
            PromoteRequest,
            timeout=timeout,
            replica=None if exact else self.replicas.fetch_to(owner),
            namespace=namespace,
            refs=[[ref.model_dump(mode="json") for ref in chain] for chain in chains],
            owner=owner,
            seconds=seconds,
            exact=exact,
            tokens=None if tokens is None else tokens.tolist(),
            extra_key=extra_key,
            cache_salt=cache_salt,
        )
        in_vram = tokens is not None and all(a["vram_tokens"] == len(tokens) for a in answers)
        return Brought(
            max((a["source_tier"] for a in answers), key=("ram", "disk").index),
            sum(a["bytes"] for a in answers),
            sum(a["read_bytes"] for a in answers),
            in_vram,
            answers[0]["state_slot"] if in_vram else None,
        )

    def abandon(self, owner: str) -> None:
        """Nobody waits for the promotions of `owner` any longer."""
        self._client.tell(ReleaseRequest, owner=owner)

    async def tier(self, namespace: str, key: str, tokens: TokenArray) -> str:
        """The fastest tier in which every rank of a replica holds the sequence."""
        answers = await self._client.ask(
            ProbeRequest,
            timeout=ANSWER_TIMEOUT_S,
            namespace=namespace,
            key=key,
            tokens=tokens.tolist(),
        )
        speed = ("vram", "ram", "disk").index
        slowest = [max((a["tier"] for a in one), key=speed) for one in self._by_replica(answers)]
        fastest: str = min(slowest, key=speed)
        return fastest

    def _by_replica(self, answers: list[Result]) -> list[list[Result]]:
        """The answers of all ranks, those of each replica in a list of their own."""
        size = len(answers) // self._client.replicas
        return [answers[begin : begin + size] for begin in range(0, len(answers), size)]

    async def drop(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> None:
        """Delete segment files that no manifest names."""
        await self._client.ask(
            DropRequest,
            timeout=PERSIST_TIMEOUT_S,
            namespace=namespace,
            segment_ids=[list(ids) for ids in segment_ids],
        )

    async def residents(self, namespace: str) -> list[list[ResidentSegment]]:
        """The durable segments in RAM, by rank; what several replicas hold comes several times."""
        answers = await self._client.ask(
            ResidentsRequest, timeout=ANSWER_TIMEOUT_S, namespace=namespace
        )
        return [
            [ResidentSegment(*one) for answer in same_rank for one in answer["segments"]]
            for same_rank in zip(*self._by_replica(answers), strict=True)
        ]

    async def demote(self, namespace: str, segment_ids: Sequence[Sequence[str]]) -> int:
        """Let durable segments leave RAM."""
        answers = await self._client.ask(
            DemoteRequest,
            timeout=ANSWER_TIMEOUT_S,
            namespace=namespace,
            segment_ids=[list(ids) for ids in segment_ids],
        )
        return sum(answer["bytes"] for answer in answers)

    async def pin(
        self, namespace: str, request: FinishedRequest, boundary: int, owner: str
    ) -> bool:
        """Keep the state at the request's end in every rank's tree; False if not all have it."""
        replica = self.replicas.holder(request.rid)
        answers = await self._client.ask(
            PinRequest,
            timeout=ANSWER_TIMEOUT_S,
            replica=replica,
            namespace=namespace,
            request_rid=request.rid or None,
            tokens=request.tokens.tolist(),
            boundary=boundary,
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
            owner=owner,
        )
        resident = all(answer["resident"] for answer in answers)
        if resident:
            # Where the conversation was served before, it is not wanted any longer.
            for other in range(self.replicas.count):
                if other != replica:
                    await self._client.ask(
                        UnpinRequest, timeout=ANSWER_TIMEOUT_S, replica=other, owner=owner
                    )
        return resident

    async def unpin(self, owner: str) -> bool:
        """Let go of what `owner` has pinned."""
        answers = await self._client.ask(UnpinRequest, timeout=ANSWER_TIMEOUT_S, owner=owner)
        return any(answer["unpinned"] for answer in answers)

    async def stats(self) -> list[dict[str, Any]]:
        """The tiers' counters, by rank."""
        return await self._client.ask(StatsRequest, timeout=ANSWER_TIMEOUT_S)

    def page_keys(
        self, tokens: TokenArray, page_size: int, extra_key: str | None, cache_salt: str | None
    ) -> list[str]:
        """One key a whole page, as the ranks compute them."""
        return page_keys(tokens.tolist(), page_size, extra_key, cache_salt)


class SglangGenerator:
    """Serves a request through SGLang's own front (`engram.service.ports.Generator`)."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        rid: str | None = None,
        tag: Tag | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> Generation:
        """Generate to the end.

        Raises `InvalidRequestError` for what SGLang refuses, `GenerationAbortedError` for what it
        ends without completing.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            input_ids=list(input_ids),
            sampling_params=dict(sampling_params),
            rid=rid,
            extra_key=extra_key,
            cache_salt=cache_salt,
        )
        self._check(input_ids, sampling_params)
        # Nothing of the request in whose context this happens to be done is its own.
        token, waited = CURRENT_TAG.set(tag), WAITED.set(0.0)
        try:
            answers = [answer async for answer in self._manager.generate_request(request, None)]
        except ValueError as error:
            # What SGLang's own routes answer with 400: parameters, lengths, a request id in use.
            raise InvalidRequestError(f"SGLang refuses the generation: {error}") from error
        finally:
            WAITED.reset(waited)
            CURRENT_TAG.reset(token)
        answer = answers[-1]
        meta = answer["meta_info"]
        reason = meta["finish_reason"] or {}
        if reason.get("type") == "abort":
            raise GenerationAbortedError(
                f"SGLang aborted the generation: {reason.get('message') or 'no reason given'}",
                hint="retry when the server is less busy",
            )
        return Generation(
            meta["id"],
            list(answer["output_ids"]),
            answer.get("text"),
            int(meta.get("cached_tokens", 0)),
            meta,
        )

    def _check(self, input_ids: Sequence[int], sampling_params: Mapping[str, Any]) -> None:
        """Refuse what SGLang lets through to where it does harm.

        A token outside the vocabulary ends the scheduler, and with it the server; a parameter that
        SGLang does not know is a TypeError, as a bug would be.
        """
        vocab_size: int = self._manager.model_config.vocab_size
        largest = max(input_ids, default=0)
        if largest >= vocab_size:
            raise InvalidRequestError(
                f"token {largest} is not in the model's vocabulary of {vocab_size}",
                hint="use ids that the model's own tokenizer gives",
                details={"field": "continuation_ids"},
            )
        known = inspect.signature(self._manager.sampling_params_class).parameters
        unknown = sorted(set(sampling_params) - set(known))
        if unknown:
            raise InvalidRequestError(
                f"sampling_params: SGLang knows no {', '.join(unknown)}",
                details={"field": f"sampling_params.{unknown[0]}"},
            )
        for name, value in sampling_params.items():
            # What no int32 tensor holds ends the scheduler; a seed is a 64-bit number.
            if isinstance(value, int) and name != "sampling_seed" and not -(2**31) <= value < 2**31:
                raise InvalidRequestError(
                    f"sampling_params: {name} has more than 32 bits",
                    details={"field": f"sampling_params.{name}"},
                )
        try:
            params = self._manager.sampling_params_class(**sampling_params)
            params.verify(vocab_size)
            _check_stop_tokens(params.stop_token_ids, vocab_size)
            # The way to the scheduler, whose loop a value of a wrong type would end.
            msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=type(params))
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
            raise InvalidRequestError(
                f"sampling_params: {error}", details={"field": "sampling_params"}
            ) from error


def _check_stop_tokens(ids: Iterable[int] | None, vocab_size: int) -> None:
    """With min_new_tokens they are places in a tensor as long as the vocabulary, never checked."""
    for token in ids or ():
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_token_ids: {token} is not in the vocabulary of {vocab_size}")
