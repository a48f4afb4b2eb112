"""Messages between the server and a worker: four bytes of length, then JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, Final

HEADER: Final = struct.Struct(">I")
OVERHEAD_BYTES: Final = 64 << 10
"""Room for what stands around a result."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as it is sent.

    Half a surrogate pair, as Python makes of the name of a file that is no UTF-8, becomes ``?``: no
    reply could be written with it.
    """
    written = json.dumps(message, allow_nan=False, ensure_ascii=False)
    return frame(written.encode(errors="replace"))


def frame(body: bytes) -> bytes:
    """JSON as it is sent."""
    return HEADER.pack(len(body)) + body


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side is gone."""
    header = _exactly(connection, HEADER.size)
    if header is None:
        return None
    body = _exactly(connection, HEADER.unpack(header)[0])
    return None if body is None else json.loads(body)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    found = bytearray()
    while len(found) < count:
        part = connection.recv(min(count - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)


async def read(reader: asyncio.StreamReader, limit: int) -> dict[str, Any]:
    """The next message of at most `limit` bytes.

    Raises EOFError when the other side is gone, ValueError for what is no message.
    """
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    if length > limit:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(await reader.readexactly(length))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message
