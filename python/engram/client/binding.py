"""Makes a method of a function that describes a call: written once, for both clients.

    class EngramClient:
        save = blocking(calls.save)

is a method with the parameters of `calls.save`, that sends the call and returns its result. Of a
conversation's methods, the conversation itself is the function's first argument (`blocking_at`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from engram.client.exchange import Call
from engram.core.ids import DEFAULT_BRANCH, check_id

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A branch of a conversation."""

    conversation_id: str
    branch_name: str = DEFAULT_BRANCH

    def __post_init__(self) -> None:
        check_id("conversation_id", self.conversation_id)
        check_id("branch_name", self.branch_name)


class Runs(Protocol):
    """Sends a call and returns its result."""

    def _run(self, call: Call[T]) -> T: ...


class RunsAsync(Protocol):
    """The same on an event loop."""

    async def _run(self, call: Call[T]) -> T: ...


class Blocking(Generic[P, T]):
    """A method that returns the result of a call."""

    def __init__(self, make: Callable[..., Call[T]], *, at_place: bool) -> None:
        self._make, self._at_place = make, at_place
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, owner: None, kind: type[Any]) -> Blocking[P, T]: ...
    @overload
    def __get__(self, owner: Runs, kind: type[Any]) -> Callable[P, T]: ...
    def __get__(self, owner: Any, kind: type[Any]) -> Blocking[P, T] | Callable[P, T]:
        if owner is None:
            return self
        first = (owner.place,) if self._at_place else ()

        def method(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = owner._run(self._make(*first, *args, **kwargs))
            return result

        _dress(method, self._make, self._at_place)
        return method


class Awaiting(Generic[P, T]):
    """The same for asyncio."""

    def __init__(self, make: Callable[..., Call[T]], *, at_place: bool) -> None:
        self._make, self._at_place = make, at_place
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, owner: None, kind: type[Any]) -> Awaiting[P, T]: ...
    @overload
    def __get__(self, owner: RunsAsync, kind: type[Any]) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, owner: Any, kind: type[Any]) -> Awaiting[P, T] | Callable[P, Awaitable[T]]:
        if owner is None:
            return self
        first = (owner.place,) if self._at_place else ()

        async def method(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = await owner._run(self._make(*first, *args, **kwargs))
            return result

        _dress(method, self._make, self._at_place)
        return method


def blocking(make: Callable[P, Call[T]]) -> Blocking[P, T]:
    """A method of a client."""
    return Blocking(make, at_place=False)


def blocking_at(make: Callable[Concatenate[Place, P], Call[T]]) -> Blocking[P, T]:
    """A method of a conversation."""
    return Blocking(make, at_place=True)


def awaiting(make: Callable[P, Call[T]]) -> Awaiting[P, T]:
    """A method of an asyncio client."""
    return Awaiting(make, at_place=False)


def awaiting_at(make: Callable[Concatenate[Place, P], Call[T]]) -> Awaiting[P, T]:
    """A method of an asyncio client's conversation."""
    return Awaiting(make, at_place=True)


def _dress(method: Callable[..., Any], make: Callable[..., Any], at_place: bool) -> None:
    """Give a method the name, the words and the parameters of the function it is made of."""
    functools.update_wrapper(method, make, updated=())
    signature = inspect.signature(make)
    returns = re.sub(r"^Call\[(.*)\]$", r"\1", str(signature.return_annotation))
    parameters = list(signature.parameters.values())[1 if at_place else 0 :]
    vars(method)["__signature__"] = signature.replace(
        parameters=parameters, return_annotation=returns
    )
