"""What is known of conversations as a whole: when they were used, and what they are worth."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from engram.snapshot.conversation import DEFAULT_PRIORITY, ConversationRecord

if TYPE_CHECKING:
    from engram.service.context import ServiceContext

MAX_UNWRITTEN: Final = 10_000
"""Uses that are kept in memory; past that they are written without waiting for a clean-up."""

Conversation = tuple[str, str]
"""Tenant and conversation id."""


class Conversations:
    """Uses are written down now and then, all at once: to lose some does no harm. Priorities are
    durable when `set_priority` returns.  Used on one event loop.
    """

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._uses: dict[Conversation, float] = {}
        self._written: dict[Conversation, float] = {}
        self._priorities: dict[Conversation, int] | None = None
        self._lock = asyncio.Lock()
        self._writing: asyncio.Task[None] | None = None

    def used(self, tenant: str, conversation_id: str) -> None:
        """A conversation is used now."""
        self._uses[tenant, conversation_id] = time.time()
        if len(self._uses) >= MAX_UNWRITTEN and (self._writing is None or self._writing.done()):
            self._writing = self._context.start(self.write_down())

    def used_since(self, moment: float) -> Callable[[Conversation], bool]:
        """Tells of a conversation whether it was used after a time; for any thread (it may block).

        What is used from now on it does not see.
        """
        uses = {name for name, at in {**self._written, **self._uses}.items() if at > moment}

        def used(name: Conversation) -> bool:
            return name in uses or (self._context.catalog.last_use(*name) or 0.0) > moment

        return used

    async def write_down(self) -> None:
        """Record the uses since the last time, in one transaction."""
        uses, self._uses = self._uses, {}
        self._written = uses
        try:
            await self._context.in_catalog(self._context.catalog.record_use, uses)
        except BaseException:
            self._uses = {**uses, **self._uses}
            raise

    async def priorities(self) -> Mapping[Conversation, int]:
        """The priorities that were set; all others are the default."""
        if self._priorities is None:
            async with self._lock:
                if self._priorities is None:
                    self._priorities = await self._context.in_store(self._read)
        return MappingProxyType(self._priorities)

    def _read(self) -> dict[Conversation, int]:
        records = self._context.store.iter_conversations()
        return {(one.tenant, one.conversation_id): one.priority for one in records}

    async def priority(self, tenant: str, conversation_id: str) -> int:
        """What a conversation is worth, from 0 to 100."""
        return (await self.priorities()).get((tenant, conversation_id), DEFAULT_PRIORITY)

    async def set_priority(self, tenant: str, conversation_id: str, priority: int) -> None:
        """Make a conversation worth so much, durably."""
        name = (tenant, conversation_id)
        await self.priorities()
        async with self._lock:
            assert self._priorities is not None
            if self._priorities.get(name, DEFAULT_PRIORITY) == priority:
                return
            record = ConversationRecord(
                tenant=tenant, conversation_id=conversation_id, priority=priority
            )
            store = self._context.store
            if priority == DEFAULT_PRIORITY:
                await self._context.in_store(store.delete_conversation, record)
                self._priorities.pop(name, None)
            else:
                await self._context.in_store(store.put_conversation, record)
                self._priorities[name] = priority
        self._context.changed()

    async def prioritised(self) -> list[Conversation]:
        """The conversations whose priority is not the default."""
        return list(await self.priorities())
