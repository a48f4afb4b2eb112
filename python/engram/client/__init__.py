"""The Python client: sync and async, typed; needs neither torch nor SGLang.

| module | holds |
|---|---|
| `client.py`, `aio.py` | `EngramClient` and its `Conversation`; the same for asyncio |
| `manager.py` | `SnapshotManager`, for users of the published Engram fork |
| `calls.py` | one function a route: what is sent, what comes back |
| `results.py` | what comes back, typed |
| `chat.py` | replies that are generated, whole or as a stream |
| `exchange.py` | one call with its retries, without any I/O |
| `transport.py` | the I/O, once for threads and once for asyncio |
| `failures.py` | the exception that a reply stands for |
"""

from engram.client.aio import AsyncConversation, AsyncEngramClient
from engram.client.client import Conversation, EngramClient
from engram.client.exchange import Retries
from engram.client.manager import SnapshotManager

__all__ = [
    "AsyncConversation",
    "AsyncEngramClient",
    "Conversation",
    "EngramClient",
    "Retries",
    "SnapshotManager",
]
