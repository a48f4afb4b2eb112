"""Every operation that changes a store, at its smallest: what the fault table goes through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engram.conversation.turns import Tag
from engram.retention import RetentionPolicy
from engram.store.layout import Layout
from faults.engine import Keeper

FIRST, SECOND, NEW = "first", "second", "new"
MESSAGES: Final = {FIRST: [11, 12, 13, 14], SECOND: [21, 22], NEW: [31, 32, 33]}


async def _turn(keeper: Keeper, name: str) -> None:
    """The next turn of the one conversation, computed and not saved."""
    before = {FIRST: [], SECOND: keeper.tokens.get(FIRST, []), NEW: keeper.tokens.get(SECOND, [])}
    await keeper.talk(before[name], MESSAGES[name], Tag("conversation"), f"rid-{name}")
    keeper.tokens[name] = keeper.tokens.pop(f"rid-{name}")


async def _save(keeper: Keeper, name: str) -> None:
    await keeper.service.save(tenant="", rid=f"rid-{name}", snapshot_id=name)


async def two_turns(keeper: Keeper) -> None:
    """What every store but the empty one holds before the operation: two turns, saved."""
    for name in (FIRST, SECOND):
        await _turn(keeper, name)
        await _save(keeper, name)


async def _nothing(keeper: Keeper) -> None:
    pass


async def _new_turn(keeper: Keeper) -> None:
    await _turn(keeper, NEW)


async def _first_turn(keeper: Keeper) -> None:
    await _turn(keeper, FIRST)


async def _save_new(keeper: Keeper) -> None:
    await _save(keeper, NEW)


async def _save_first(keeper: Keeper) -> None:
    await _save(keeper, FIRST)


async def _branch(keeper: Keeper) -> None:
    keeper.tokens[NEW] = keeper.tokens[FIRST]
    await keeper.service.save(
        tenant="",
        conversation_id="conversation",
        turn_number=1,
        branch_name="other",
        snapshot_id=NEW,
    )


async def _delete(keeper: Keeper) -> None:
    await keeper.gone(SECOND)


async def _retain(keeper: Keeper) -> None:
    """The older of the two turns is not among the newest one of its branch."""
    housekeeper = keeper.service.housekeeper
    housekeeper._policy = RetentionPolicy(keep_last=1)
    await housekeeper.round()


async def _change(keeper: Keeper) -> None:
    await keeper.service.change("", SECOND, user_metadata={"title": "a title"})


async def _prefer(keeper: Keeper) -> None:
    await keeper.service.set_priority("", "conversation", 80)


async def _collect(keeper: Keeper) -> None:
    assert keeper.orphans(), "there is something to collect"
    await keeper.collect()
    assert not keeper.orphans()


def _forgotten_segments(root: Path) -> None:
    """The second turn without its manifest: rows and a state that nobody names."""
    [path] = [p for p in Layout(root).manifests.rglob("*.json") if b'"second"' in p.read_bytes()]
    path.unlink()


def _no_catalog(root: Path) -> None:
    Layout(root).catalog.unlink()


def _no_marker(root: Path) -> None:
    Layout(root).marker.unlink()


def _unchanged(root: Path) -> None:
    pass


@dataclass(frozen=True)
class Operation:
    """What is done, on what, and which snapshots there are before and after it.

    `act` is None for what is done by starting: then faults are met by that.  `alter` changes the
    files of the store before, `prepare` what the server has in memory.
    """

    name: str
    before: frozenset[str]
    after: frozenset[str]
    act: Callable[[Keeper], Awaitable[None]] | None
    prepare: Callable[[Keeper], Awaitable[None]] = _nothing
    alter: Callable[[Path], None] = _unchanged
    empty: bool = False

    @property
    def again(self) -> bool:
        """Whether it is worth doing once more where it had no effect."""
        return self.act is not None and self.before != self.after


_FIRST: Final = frozenset({FIRST})
_BOTH: Final = frozenset({FIRST, SECOND})

OPERATIONS: Final = (
    Operation("first save", frozenset(), frozenset({FIRST}), _save_first, _first_turn, empty=True),
    Operation("save", _BOTH, _BOTH | {NEW}, _save_new, _new_turn),
    Operation("branch", _BOTH, _BOTH | {NEW}, _branch),
    Operation("delete", _BOTH, _FIRST, _delete),
    Operation("retention", _BOTH, frozenset({SECOND}), _retain),
    Operation("change", _BOTH, _BOTH, _change),
    Operation("priority", _BOTH, _BOTH, _prefer),
    Operation("gc", _FIRST, _FIRST, _collect, alter=_forgotten_segments),
    Operation("start on nothing", frozenset(), frozenset(), None, empty=True),
    Operation("start", _BOTH, _BOTH, None),
    Operation("start without a catalog", _BOTH, _BOTH, None, alter=_no_catalog),
    Operation("start without a marker", _BOTH, _BOTH, None, alter=_no_marker),
)
