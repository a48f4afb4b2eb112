"""Bounded waits: what comes in time, what does not, and cancellations."""

import asyncio

import pytest

from engram.core.waiting import within

LONG_S = 60.0


def test_what_comes_in_time_is_returned_or_raised() -> None:
    async def fails() -> None:
        raise ValueError("as the work says")

    async def work() -> None:
        assert await within(LONG_S, asyncio.sleep(0, "done")) == "done"
        with pytest.raises(ValueError, match="as the work says"):
            await within(LONG_S, fails())

    asyncio.run(work())


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_what_is_late_has_ended_when_that_is_said(seconds: float) -> None:
    async def work() -> None:
        ended = asyncio.Event()

        async def late() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.set()

        with pytest.raises(asyncio.TimeoutError):
            await within(seconds, late())
        assert ended.is_set()

    asyncio.run(work())


def test_a_cancellation_in_the_moment_of_the_answer_is_not_lost() -> None:
    async def work() -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(LONG_S, answer))
        await asyncio.sleep(0.01)
        answer.set_result(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(work())


def test_a_cancellation_before_it_ends_the_work_too() -> None:
    async def work() -> None:
        endless = asyncio.ensure_future(asyncio.Event().wait())
        waiting = asyncio.ensure_future(within(LONG_S, endless))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert endless.cancelled()

    asyncio.run(work())
