"""ASGI middleware that refuses the routes of SGLang that snapshots cannot survive yet.

Stored states are matched by a fingerprint of the weights that is taken at launch.  A route that
changes the weights of a running server would make old states match new weights, silently.
"""

from __future__ import annotations

from typing import Final

from engram.errors import UnsupportedError
from engram.server.tagging import App, Receive, Scope, Send, route_of
from engram.server.wire import error_response

CHANGING_WEIGHTS: Final = frozenset(
    {
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/begin_weight_update",
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
    }
)


class RefusingMiddleware:
    """Answers the refused routes itself; all others pass."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_of(scope) in CHANGING_WEIGHTS:
            refusal = UnsupportedError(
                f"{route_of(scope)} is refused while snapshots are kept: stored states would be "
                "used with weights that did not make them",
                hint="restart the server with the new weights, or without "
                "--enable-snapshot-persistence",
            )
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)
