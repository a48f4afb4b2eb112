"""Where the rows of a memory are: in torch, in host memory, or on disk.

| class | home | trainable | rows larger than RAM |
|---|---|---|---|
| `TorchTable` | a module's parameters, on any device | fp32, bf16 | no |
| `HostTable` | anonymous huge pages, pinned where there is a GPU | no | no |
| `DiskTable` | sharded files, read through mmap or directly | no | yes |
"""

from engram.conditional_memory.tables.base import MemoryTable
from engram.conditional_memory.tables.cache import CacheStatistics, HotRowCache
from engram.conditional_memory.tables.disk import DiskTable
from engram.conditional_memory.tables.host import HostTable
from engram.conditional_memory.tables.memory import TorchTable
from engram.conditional_memory.tables.rows import RowFormat

__all__ = [
    "CacheStatistics",
    "DiskTable",
    "HostTable",
    "HotRowCache",
    "MemoryTable",
    "RowFormat",
    "TorchTable",
]
