"""The scheduler process: hang the control plane on its dispatcher."""

from __future__ import annotations

from typing import Any

import zmq
from sglang.utils import TypeBasedDispatcher

from engram.sglang_plugin.control import RankControl, ReplySocket


def attach(scheduler: Any) -> None:
    """Route Engram's requests to a `RankControl`, if the scheduler's tree is Engram's."""
    from engram.sglang_plugin.cache import EngramRadixCache

    cache = scheduler.tree_cache
    if not isinstance(cache, EngramRadixCache):
        return
    outbox = scheduler.ipc_channels.send_to_tokenizer.socket
    endpoint = outbox.getsockopt(zmq.LAST_ENDPOINT).decode()
    control = RankControl(cache, ReplySocket(endpoint))
    scheduler._request_dispatcher += TypeBasedDispatcher(list(control.handlers.items()))
