"""Why so many tokens were cached: what was there, and where a prompt, or a snapshot, turned off."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from engram.catalog.rows import SnapshotRow
from engram.conversation.turns import RunningRequest, Tag, Turn
from engram.core.tokens import TokenArray, common_prefix_length
from engram.errors import NotFoundError
from engram.service.context import ServiceContext
from engram.service.restores import Restorer

MAX_SERVED: Final = 1_000
"""Requests that can be explained."""


@dataclass(slots=True)
class Served:
    """What is remembered of a request beyond its tokens.

    `cached_tokens` of the `prompt_tokens` were not computed: `vram_tokens` were in SGLang's tree,
    `ram_tokens` were loaded from RAM. `fetched_tokens` is the boundary that the gate had brought
    into RAM before, from `fetched_from`; 0 and None if it had nothing to bring. What the engine
    has not told is None.
    """

    rid: str
    prompt_tokens: int
    tag: Tag | None
    fetched_tokens: int = 0
    fetched_from: str | None = None
    problem: str | None = None
    cached_tokens: int | None = None
    vram_tokens: int | None = None
    ram_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that differs: its place, and the ids that were recorded and sent."""

    position: int
    recorded: int
    sent: int


@dataclass(frozen=True, slots=True)
class Earlier:
    """The turn that a prompt should have gone on from.

    `token_count` is the boundary of its state if it is saved; `common_tokens` of its `tokens` begin
    the prompt.
    """

    branch_name: str
    turn_number: int
    snapshot_id: str | None
    token_count: int | None
    tokens: int
    common_tokens: int
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A request, the turn it was, and the turn before."""

    served: Served
    turn_number: int | None
    earlier: Earlier | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two snapshots: recorded tokens that both begin with, and bytes of files that both name."""

    common_tokens: int
    shared_bytes: int


class ServedRequests:
    """The newest requests and what was cached of each."""

    def __init__(self) -> None:
        self._served: OrderedDict[str, Served] = OrderedDict()

    def begin(self, request: RunningRequest) -> None:
        """A request is on its way; an earlier one of its id is forgotten."""
        self._served.pop(request.rid, None)
        self._served[request.rid] = Served(request.rid, len(request.prompt), request.tag)
        if len(self._served) > MAX_SERVED:
            self._served.popitem(last=False)

    def fetched(self, rid: str, tokens: int, source: str) -> None:
        """Its stored prefix has been brought into RAM."""
        served = self._served.get(rid)
        if served is not None:
            served.fetched_tokens, served.fetched_from = tokens, source

    def failed(self, rid: str, why: str) -> None:
        """Its stored prefix could not be used."""
        served = self._served.get(rid)
        if served is not None:
            served.problem = why

    def cached(self, rid: str, total: int, vram: int | None, ram: int | None) -> None:
        """The engine has told how much it did not compute."""
        served = self._served.get(rid)
        if served is not None:
            served.cached_tokens, served.vram_tokens, served.ram_tokens = total, vram, ram

    def get(self, rid: str) -> Served | None:
        """What is remembered of a request."""
        return self._served.get(rid)


class Explainer:
    """Explains requests of one server."""

    def __init__(self, context: ServiceContext, restorer: Restorer, served: ServedRequests) -> None:
        self._context = context
        self._restorer = restorer
        self._served = served

    async def compare(self, one: SnapshotRow, other: SnapshotRow) -> Comparison:
        """Where two snapshots of a tenant part."""
        tokens = [await self._restorer.tokens(row) for row in (one, other)]
        shared = await self._context.in_catalog(
            self._context.catalog.shared_bytes, one.tenant, one.snapshot_id, other.snapshot_id
        )
        return Comparison(common_prefix_length(*tokens), shared)

    async def explain(self, tenant: str, rid: str) -> Explanation:
        """Explain a finished request.  `NotFoundError` if it is none of the newest."""
        served = self._served.get(rid)
        if served is None or served.cached_tokens is None or not _is_of(served, tenant):
            raise NotFoundError(
                f"nothing is known of a request {rid!r}",
                hint=f"the newest {MAX_SERVED:,} since the server's start can be explained, once "
                "they are finished",
                details={"rid": rid},
            )
        turn = self._context.tracker.turn_of(rid)
        tokens = await self._tokens_of(rid, turn, tenant)
        if tokens is None or served.tag is None:
            return Explanation(served, None, None)
        number = turn.number if turn else None
        if number is None:
            row = await self._context.in_catalog(self._context.catalog.find_rid, rid, tenant)
            number = None if row is None else row.turn_number
        if number is None:
            return Explanation(served, None, None)
        earlier = await self._earlier(served.tag, number, tokens[: served.prompt_tokens])
        return Explanation(served, number, earlier)

    async def _tokens_of(self, rid: str, turn: Turn | None, tenant: str) -> TokenArray | None:
        if turn is not None:
            return turn.request.tokens
        row = await self._context.in_catalog(self._context.catalog.find_rid, rid, tenant)
        return None if row is None else await self._restorer.tokens(row)

    async def _earlier(self, tag: Tag, number: int, prompt: TokenArray) -> Earlier | None:
        """The newest turn before, on the branch."""
        context = self._context
        turn = context.tracker.before(tag, number)
        row = await context.in_catalog(
            context.catalog.before, tag.tenant, tag.conversation_id, tag.branch_name, number
        )
        before = max(0 if turn is None else turn.number, 0 if row is None else row.turn_number)
        if row is not None and row.turn_number < before:
            row = None
        if turn is not None and turn.number == before:
            recorded = turn.request.tokens
        elif row is not None:
            recorded = await self._restorer.tokens(row)
        else:
            return None
        common = common_prefix_length(recorded, prompt)
        difference = None
        if common < min(len(recorded), len(prompt)):
            difference = Difference(common, int(recorded[common]), int(prompt[common]))
        return Earlier(
            tag.branch_name,
            before,
            None if row is None else row.snapshot_id,
            None if row is None else row.token_count,
            len(recorded),
            common,
            difference,
        )


def _is_of(served: Served, tenant: str) -> bool:
    return served.tag is None or served.tag.tenant == tenant
