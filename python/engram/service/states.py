"""The state of a finished request: where it is, what writing it takes, and computing it again."""

from __future__ import annotations

import logging
import time

from engram.conversation.turns import FinishedRequest
from engram.errors import CaptureLostError
from engram.service.context import ServiceContext
from engram.service.ports import EngineInfo, Stored

logger = logging.getLogger(__name__)


class RequestStates:
    """Asks the ranks for the states of requests; what they have lost is computed again."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def locate(self, request: FinishedRequest) -> int:
        """Where a snapshot of the request will end, its state computed again if need be."""
        context = self._context

        async def ask(engine: EngineInfo) -> int:
            expected = context.expected_boundary(request, engine)
            return (await context.ranks.locate(engine.namespace.id, request, expected)).boundary

        try:
            return await context.with_engine(ask)
        except CaptureLostError as lost:
            boundary = lost.details.get("boundary")
            if not isinstance(boundary, int) or boundary < 1:
                raise
            return boundary

    async def needed(self, request: FinishedRequest, boundary: int | None) -> tuple[int, bool]:
        """Bytes that a save of the request will write."""
        context = self._context

        async def ask(engine: EngineInfo) -> tuple[int, bool]:
            expected = boundary or context.expected_boundary(request, engine)
            again = False
            while True:
                try:
                    located = await context.ranks.locate(
                        engine.namespace.id, request, expected, measure=True
                    )
                    assert located.needed is not None
                    return located.needed, again
                except CaptureLostError as lost:
                    end = lost.details.get("boundary")
                    if again or not isinstance(end, int) or end < 1:
                        raise
                    expected, again = end, True
                    await self.recompute(request, end)

        return await context.with_engine(ask)

    async def persist(
        self, engine: EngineInfo, request: FinishedRequest
    ) -> tuple[EngineInfo, Stored, bool]:
        """What is durable now, of which engine, and whether it had to be computed again."""
        await self._context.write_down(engine)
        ranks, namespace = self._context.ranks, engine.namespace.id
        expected = self._context.expected_boundary(request, engine)
        try:
            return engine, await ranks.persist(namespace, request, expected), False
        except CaptureLostError as lost:
            boundary = lost.details.get("boundary")
            if not isinstance(boundary, int) or boundary < 1:
                raise
        again = await self.recompute(request, boundary)
        return engine, await ranks.persist(namespace, again, boundary), True

    async def recompute(self, request: FinishedRequest, boundary: int) -> FinishedRequest:
        """Compute the state at `boundary` again from the recorded tokens.

        A request for exactly those tokens leaves a state at their end when its one token is
        sampled; the token itself is not used.
        """
        prefix = request.tokens[:boundary]
        logger.info("Engram: computing the state of %s again, %d tokens", request.rid, boundary)
        generation = await self._context.generator.generate(
            prefix.tolist(),
            {"max_new_tokens": 1, "ignore_eos": True},
            extra_key=request.extra_key,
            cache_salt=request.cache_salt,
        )
        return FinishedRequest(
            generation.rid, prefix, time.time(), request.extra_key, request.cache_salt
        )
