"""Engram: memory for language models that outlives a request, a process and a machine."""

from typing import TYPE_CHECKING

from engram.version import __version__

if TYPE_CHECKING:
    from engram.conditional_memory import EngramConfig as EngramConfig
    from engram.conditional_memory import EngramModule as EngramModule

__all__ = ["EngramConfig", "EngramModule", "__version__"]

# Loaded when first used: they need torch, which costs seconds that a command or a client must not.
_LAZY = frozenset({"EngramConfig", "EngramModule"})


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from engram import conditional_memory

        return getattr(conditional_memory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
