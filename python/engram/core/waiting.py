"""A bound on how long something may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """What `work` returns; `TimeoutError` of asyncio after so many seconds.  It has ended then.

    Unlike `asyncio.wait_for` of Python 3.10 and 3.11 this never takes in a cancellation that comes
    just as the work is done: what was told to stop would go on.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        in_time = task.done()
        if not in_time:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    if not in_time:
        raise asyncio.TimeoutError
    return task.result()
