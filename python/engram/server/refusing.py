"""ASGI middleware that refuses the routes of SGLang that snapshots cannot survive.

Stored states are matched by a fingerprint of the weights that made them.  The routes that update
weights change the fingerprint; those here would change what the model computes, and leave it.
"""

from __future__ import annotations

from typing import Final

from engram.errors import UnsupportedError
from engram.server.tagging import App, Receive, Scope, Send, route_of
from engram.server.wire import error_response

LORA: Final = (
    "an adapter of --lora-paths is known by its weights, one that is loaded later by an id that "
    "another may have had before: states of that one would be used with it"
)
REFUSED_ROUTES: Final = {
    "/weights_checker": "one of its actions fills the weights with random numbers, and nothing "
    "tells when they are right again",
    "/load_lora_adapter": LORA,
    "/load_lora_adapter_from_tensors": LORA,
    "/unload_lora_adapter": "a request for the adapter would have SGLang read its files again, "
    "under the id of what they held at launch",
}
"""Route -> why it is refused."""


class RefusingMiddleware:
    """Answers the refused routes itself; all others pass."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = route_of(scope) if scope["type"] == "http" else ""
        if route in REFUSED_ROUTES:
            refusal = UnsupportedError(
                f"{route} is refused while snapshots are kept: {REFUSED_ROUTES[route]}",
                hint="start the server without --enable-snapshot-persistence to use it",
            )
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)
