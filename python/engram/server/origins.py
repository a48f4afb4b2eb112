"""Pages of other sites: a browser lets them reach any server, so the server has to look.

Without this, a page that somebody opens could call the tools of a server on their own machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from engram.errors import ForeignOriginError
from engram.server.tagging import Receive, Scope, Send
from engram.server.wire import error_response


def is_foreign(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request comes from a page of another origin than the server's own."""
    found = {name.lower(): value for name, value in headers}
    origin = found.get(b"origin")
    if origin is None:
        return False
    host = found.get(b"host", b"").decode("latin-1").lower()
    return urlsplit(origin.decode("latin-1")).netloc.lower() != host


async def refuse_foreign(scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer 403 to such a request; whether that was done."""
    if not is_foreign(scope["headers"]):
        return False
    refusal = ForeignOriginError(
        "the page that asks is of another origin than this server",
        hint="call the server from a program, or from a page it serves itself",
    )
    await error_response(refusal)(scope, receive, send)
    return True
