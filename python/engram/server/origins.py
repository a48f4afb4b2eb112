"""Pages of other sites: a browser lets them reach any server, so the server has to look.

Without this, a page that somebody opens could call the tools of a server on their own machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from engram.errors import ForeignOriginError
from engram.server.tagging import Receive, Scope, Send
from engram.server.wire import error_response


def is_foreign(headers: Iterable[tuple[bytes, bytes]], *, keyed: bool) -> bool:
    """Whether a request comes from a page of another origin than the server's own.

    Without keys (`keyed`) a name is not enough to be the server's own: the owner of any other can
    have it point here once their page is open (DNS rebinding). Only an address is, and localhost.
    """
    found = {name.lower(): value for name, value in headers}
    origin = found.get(b"origin")
    if origin is None:
        return False
    host = found.get(b"host", b"").decode("latin-1").lower()
    try:
        page = urlsplit(origin.decode("latin-1"))
        name = page.hostname or ""
    except ValueError:
        return True
    return page.netloc.lower() != host or not (keyed or _fixed(name))


def _fixed(name: str) -> bool:
    """Whether no owner of a domain can decide what a host's name stands for."""
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_page(headers: Iterable[tuple[bytes, bytes]], *, keyed: bool) -> None:
    """Raise `ForeignOriginError` for a page that may not ask.

    With keys (`keyed`) any may: it has been given one, which a browser sends for no page by itself.
    """
    if not keyed and is_foreign(headers, keyed=keyed):
        raise _refusal()


async def refuse_foreign(scope: Scope, receive: Receive, send: Send, *, keyed: bool) -> bool:
    """Answer 403 to a request of a foreign page; whether that was done."""
    if not is_foreign(scope["headers"], keyed=keyed):
        return False
    await error_response(_refusal())(scope, receive, send)
    return True


def _refusal() -> ForeignOriginError:
    return ForeignOriginError(
        "the page that asks is of another origin than this server",
        hint="call the server from a program; pages of other sites may use the routes, but not "
        "MCP and the WebSocket, of a server with --api-key",
    )
