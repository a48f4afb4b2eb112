"""Engram: memory for language models that outlives a request, a process and a machine."""

from importlib import import_module
from typing import TYPE_CHECKING

from engram.version import __version__

if TYPE_CHECKING:
    from engram.client import AsyncEngramClient as AsyncEngramClient
    from engram.client import EngramClient as EngramClient
    from engram.client import SnapshotManager as SnapshotManager
    from engram.conditional_memory import EngramConfig as EngramConfig
    from engram.conditional_memory import EngramModule as EngramModule
    from engram.sglang_plugin.inprocess import Engine as Engine

__all__ = [
    "AsyncEngramClient",
    "Engine",
    "EngramClient",
    "EngramConfig",
    "EngramModule",
    "SnapshotManager",
    "__version__",
]

# Loaded when first used: torch costs seconds that a command or a client must not.
_LAZY = {
    "AsyncEngramClient": "engram.client",
    "Engine": "engram.sglang_plugin.inprocess",
    "EngramClient": "engram.client",
    "SnapshotManager": "engram.client",
    "EngramConfig": "engram.conditional_memory",
    "EngramModule": "engram.conditional_memory",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
