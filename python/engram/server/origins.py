"""Pages of other sites: a browser lets them reach any server, so the server has to look.

Without this, a page that somebody opens could call the tools of a server on their own machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from engram.server.tagging import Receive, Scope, Send


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
    body = {
        "success": False,
        "error": "foreign_origin",
        "message": "the page that asks is of another origin than this server",
        "hint": "call the server from a program, or from a page it serves itself",
        "details": {},
    }
    await JSONResponse(body, status_code=403)(scope, receive, send)
    return True
