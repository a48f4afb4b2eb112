"""What is shown of a reply while it is written, and how readers hear of changes."""

import asyncio

from engram.agents.draft import Changes, Draft, Position


def test_readers_get_what_they_have_not_seen() -> None:
    draft = Draft()
    assert draft.after(Position()) is None
    draft.begin(0)
    assert draft.after(Position()) is None
    assert draft.add("one ") == Position(0, 0)
    assert draft.add("two") == Position(0, 4)
    assert draft.after(Position()) == (Position(0, 0), "one two")
    assert draft.after(Position(0, 4)) == (Position(0, 4), "two")
    assert draft.after(Position(0, 7)) is None
    draft.begin(1)
    draft.add("three")
    assert draft.after(Position(0, 7)) == (Position(1, 0), "three")


def test_no_reader_misses_a_change_that_another_has_seen() -> None:
    async def run() -> None:
        changes = Changes()
        seen = changes.count
        quick = asyncio.create_task(changes.past(seen))
        await asyncio.sleep(0)
        changes.tell()
        await quick
        # A second reader that looked before the change, but waits only now.
        await changes.past(seen)
        waiting = asyncio.create_task(changes.past(changes.count))
        await asyncio.sleep(0)
        assert not waiting.done()
        changes.tell()
        await waiting

    asyncio.run(asyncio.wait_for(run(), 60))
