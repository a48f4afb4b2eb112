"""The scheduler process: hang the control plane on its dispatcher."""

from __future__ import annotations

from typing import Any

from sglang.utils import TypeBasedDispatcher

from engram.sglang_plugin.control import RankControl, ReplySocket


def remember_inbox(scheduler: Any, port_args: Any) -> None:
    """Note where the HTTP process listens: SGLang gives a socket to the first rank alone."""
    scheduler.engram_inbox = port_args.tokenizer_ipc_name


def attach(scheduler: Any) -> None:
    """Route Engram's requests to a `RankControl`, if the scheduler's tree is Engram's."""
    from sglang.srt.runtime_context import get_parallel

    from engram.sglang_plugin.cache import EngramRadixCache

    cache = scheduler.tree_cache
    if not isinstance(cache, EngramRadixCache):
        return
    replica = get_parallel().dp_rank or 0
    control = RankControl(cache, ReplySocket(scheduler.engram_inbox), replica)
    scheduler._request_dispatcher += TypeBasedDispatcher(list(control.handlers.items()))
