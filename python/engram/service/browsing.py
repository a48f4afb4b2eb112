"""Looking through what is stored: conversations, trees, pages of snapshots, two compared."""

from __future__ import annotations

from dataclasses import dataclass

from engram.catalog.rows import BranchRow, ConversationRow, SnapshotPage, SnapshotRow
from engram.catalog.snapshots import MAX_PAGE
from engram.core.tokens import common_prefix_length
from engram.service.context import ServiceContext
from engram.service.restores import Restorer


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """Some conversations by id; ``after`` is the cursor of the next page, None at the end."""

    conversations: list[ConversationRow]
    after: str | None


@dataclass(frozen=True, slots=True)
class Tree:
    """A conversation's snapshots, parents before children, and its branches by name."""

    branches: list[BranchRow]
    snapshots: list[SnapshotRow]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two snapshots: recorded tokens that both begin with, and bytes of files that both name."""

    one: SnapshotRow
    other: SnapshotRow
    common_tokens: int
    shared_bytes: int


class Browser:
    """Reads the catalog for people; changes nothing."""

    def __init__(self, context: ServiceContext, restorer: Restorer) -> None:
        self._context = context
        self._restorer = restorer

    async def conversations(self, tenant: str, limit: int, after: str | None) -> ConversationPage:
        """A page of a tenant's conversations, by id."""
        catalog = self._context.catalog
        # One more than asked for says whether there is another page; a full page costs one query.
        ask = min(limit + 1, MAX_PAGE)
        rows = await self._context.in_catalog(catalog.conversations, tenant, limit=ask, after=after)
        more = len(rows) > limit or (ask == limit == len(rows))
        page = rows[:limit]
        return ConversationPage(page, page[-1].conversation_id if more else None)

    async def conversation(self, tenant: str, conversation_id: str) -> ConversationRow:
        """One conversation.  `NotFoundError`."""
        catalog = self._context.catalog

        def ask() -> ConversationRow:
            branches = catalog.branches(tenant, conversation_id)
            return catalog.conversation_of(tenant, conversation_id, branches)

        return await self._context.in_catalog(ask)

    async def snapshots(
        self,
        tenant: str,
        conversation_id: str | None,
        branch_name: str | None,
        limit: int,
        after: str | None,
    ) -> SnapshotPage:
        """A page of a tenant's snapshots, oldest first."""
        return await self._context.in_catalog(
            self._context.catalog.list_snapshots,
            tenant,
            conversation_id,
            branch_name,
            limit=limit,
            after=after,
        )

    async def tree(self, tenant: str, rows: list[SnapshotRow]) -> Tree:
        """The tree that the snapshots of one conversation are (at least one, oldest first)."""
        branches = await self._context.in_catalog(
            self._context.catalog.branches, tenant, rows[0].conversation_id
        )
        return Tree(branches, _parents_first(rows))

    async def compare(self, one: SnapshotRow, other: SnapshotRow) -> Comparison:
        """Where two snapshots part."""
        tokens = [await self._restorer.tokens(row) for row in (one, other)]
        shared = await self._context.in_catalog(
            self._context.catalog.shared_bytes, one.tenant, one.snapshot_id, other.snapshot_id
        )
        return Comparison(one, other, common_prefix_length(*tokens), shared)


def _parents_first(rows: list[SnapshotRow]) -> list[SnapshotRow]:
    """Depth first, each branch to its end before the branches beside it; without recursion."""
    known = {row.snapshot_id for row in rows}
    children: dict[str | None, list[SnapshotRow]] = {}
    for row in rows:
        parent = row.parent_snapshot if row.parent_snapshot in known else None
        children.setdefault(parent, []).append(row)
    found: list[SnapshotRow] = []
    waiting = list(reversed(children.get(None, [])))
    while waiting:
        row = waiting.pop()
        found.append(row)
        # The own branch is taken up last, and so looked at first.
        below = children.get(row.snapshot_id, [])
        below = sorted(below, key=lambda child: child.branch_name == row.branch_name)
        waiting += below
    return found
