"""Nothing of ours may reach SGLang's scheduler loop as an exception (law 6)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from engram.tiers.base import TierStats

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Containment:
    """Runs pieces of Engram on the scheduler thread; a failure is logged, counted and ends there.

    What is lost is then a snapshot or a hit, never the request: the caller goes on as if Engram
    had nothing stored.  The count is in the rank's statistics.
    """

    def __init__(self, stats: TierStats) -> None:
        self._stats = stats

    def run(self, what: str, action: Callable[[], T], otherwise: T) -> T:
        """The result of `action`, or `otherwise` if it raised."""
        try:
            return action()
        except Exception:
            self._stats.contained_errors += 1
            logger.exception("Engram: %s failed; serving goes on without it", what)
            return otherwise


def contained(what: str, otherwise: Any = None) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a method of an object that has a `containment`."""

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> T:
            return self.containment.run(what, lambda: method(self, *args, **kwargs), otherwise)

        return wrapper

    return decorate
