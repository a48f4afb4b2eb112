"""DeepSeek-Engram's conditional memory as a library: n-gram lookup memory for language models.

Each token looks up rows of a table by hashes of the n-grams it ends; a gate that sees the hidden
state decides how much of them to add to it. The parts, each usable alone: `TokenCompression`,
`NgramHashLayout` and `HashStream` (which rows), `MemoryTable` (where rows are), `ContextGate` and
`ShortConv` (what becomes of them), `EngramModule` and `EngramStack` (all of it).

Runs without SGLang. `backend()` says whether the native kernel is in use.
"""

from engram.conditional_memory.compression import TokenCompression
from engram.conditional_memory.config import EngramConfig
from engram.conditional_memory.conv import ShortConv
from engram.conditional_memory.gate import ContextGate
from engram.conditional_memory.hashing import NgramHashLayout
from engram.conditional_memory.kernel import backend
from engram.conditional_memory.module import EngramModule, EngramStack
from engram.conditional_memory.prefetch import Prefetcher, PrefetchHandle
from engram.conditional_memory.state import EngramState
from engram.conditional_memory.streaming import HashStream
from engram.conditional_memory.tables import (
    DiskTable,
    HostTable,
    HotRowCache,
    MemoryTable,
    RowFormat,
    TorchTable,
)

__all__ = [
    "ContextGate",
    "DiskTable",
    "EngramConfig",
    "EngramModule",
    "EngramStack",
    "EngramState",
    "HashStream",
    "HostTable",
    "HotRowCache",
    "MemoryTable",
    "NgramHashLayout",
    "PrefetchHandle",
    "Prefetcher",
    "RowFormat",
    "ShortConv",
    "TokenCompression",
    "TorchTable",
    "backend",
]
