"""The disk quota: a save over it first makes room, and is refused where there is none to make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engram.errors import StoreFullError

if TYPE_CHECKING:
    from engram.service.context import ServiceContext

MakeRoom = Callable[[int], Awaitable[None]]
"""Bring the segments' bytes down to a number, if that is possible."""


class DiskQuota:
    """Counts the bytes of all segments that snapshots name, and of those that saves will write.

    ``limit`` is in bytes, None for no quota.  Used on one event loop.
    """

    def __init__(self, context: ServiceContext, limit: int | None) -> None:
        self.limit = limit
        self.make_room: MakeRoom | None = None
        self._context = context
        self._used: int | None = None
        self._changes = 0
        self._reserved = 0
        self._lock = asyncio.Lock()

    async def used(self) -> int:
        """Bytes of the segments that snapshots name; never too few."""
        while self._used is None:
            changes = self._changes
            counts = await self._context.in_catalog(self._context.catalog.counts)
            # Of a save that has ended meanwhile it is not known whether it was counted.
            if changes == self._changes:
                self._used = counts.segment_bytes
        return self._used

    def wrote(self, nbytes: int) -> None:
        """A save has stored so many bytes."""
        self._changes += 1
        if self._used is not None:
            self._used += nbytes

    def recount(self) -> None:
        """Something was removed: count again before it matters.

        What it has freed is not subtracted: it may have been missing when it was counted last.
        """
        self._changes += 1
        self._used = None

    @asynccontextmanager
    async def reserved(self, needed: int) -> AsyncIterator[None]:
        """Have room for `needed` bytes within.  `StoreFullError` if none can be made."""
        if self.limit is None:
            yield
            return
        async with self._lock:
            await self._have(needed)
            self._reserved += needed
        try:
            yield
        finally:
            self._reserved -= needed

    async def _have(self, needed: int) -> None:
        assert self.limit is not None
        allowed = self.limit - self._reserved - needed
        if await self.used() <= allowed:
            return
        if allowed >= 0 and self.make_room is not None:
            await self.make_room(allowed)
            self.recount()
        used = await self.used()
        if used > allowed:
            raise StoreFullError.over_quota(
                needed=needed, used=used + self._reserved, quota=self.limit
            )
