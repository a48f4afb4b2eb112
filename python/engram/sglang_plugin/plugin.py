"""Entry point of the `sglang.srt.plugins` group: called once in every SGLang process.

Every hook of Engram is named here, after its target.  What the hooks rest on is in `compat.py`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from engram.errors import EngramError
from engram.sglang_plugin import compat, cpu
from engram.sglang_plugin.compat import ADDER, RESULTS, WEIGHTS

logger = logging.getLogger(__name__)

_in_use: set[str] = set()
"""What hooks without a server's settings at hand may do in this process."""


def register() -> None:
    """Register Engram's hooks with SGLang, and its CPU kernels where there is no accelerator."""
    cpu.install()
    from sglang.srt.plugins.hook_registry import HookRegistry

    from engram.sglang_plugin.messages import register_messages

    register_messages()
    for target, (hook, kind) in HOOKS.items():
        HookRegistry.register(target, hook, compat.hook_type(kind))


def after_add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """Engram's flags beside SGLang's."""
    from engram.sglang_plugin.args import add_flags

    add_flags(parser)


def around_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Turn Engram's flags into SGLang's settings before SGLang reads them."""
    from engram.sglang_plugin.args import apply_flags

    settings = apply_flags(args)
    if settings.enable_snapshot_persistence:
        compat.require_whole(HOOKS)
    return original(cls, args)


def around_launch_server(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Open the store first."""
    from engram.sglang_plugin.http import around_launch_server as hook

    return hook(original, *args, **kwargs)


def before_setup_and_run_http_server(*args: Any, **kwargs: Any) -> None:
    """Mount the service on SGLang's app."""
    from engram.sglang_plugin.http import before_setup_and_run_http_server as hook

    hook(*args, **kwargs)


def around_create_unified_radix_cache(
    original: Callable[..., Any], ctx: Any, *, cache_class: type | None = None
) -> Any:
    """Build the tree as an `EngramRadixCache` where Engram's linker is configured."""
    from engram.sglang_plugin.args import settings_of

    if settings_of(ctx.server_args) is None:
        return original(ctx, cache_class=cache_class)
    from engram.sglang_plugin.cache import EngramRadixCache
    from engram.sglang_plugin.rank import MODEL_CONFIG

    compat.require_whole(HOOKS)
    _in_use.update(("page keys", "whole pages"))
    token = MODEL_CONFIG.set(ctx.model_config)
    try:
        return original(ctx, cache_class=EngramRadixCache)
    except EngramError as error:
        logger.critical("engram: error: %s", error)
        raise
    finally:
        MODEL_CONFIG.reset(token)


def after_init_ipc_channels(result: None, scheduler: Any, port_args: Any) -> None:
    """Every rank answers the HTTP process itself."""
    from engram.sglang_plugin.scheduler import remember_inbox

    remember_inbox(scheduler, port_args)


def after_init_request_dispatcher(result: None, scheduler: Any) -> None:
    """Let the scheduler answer the control plane."""
    from engram.sglang_plugin.scheduler import attach

    attach(scheduler)


def around_get_native_hash(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hash pages without compiling anything inside the scheduler loop."""
    if "page keys" not in _in_use:
        return original(*args, **kwargs)
    from engram.sglang_plugin.keys import replace_native_hash

    return replace_native_hash(*args, **kwargs)


def around_select_prefill_admission(
    original: Callable[..., Any], adder: Any, req: Any, **kw: Any
) -> Any:
    """End a prefill at the next point of its prompt."""
    from engram.sglang_plugin.points import admit_to_point

    return admit_to_point(original, adder, req, **kw)


def around_add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """The same, for a prefill that goes on."""
    from engram.sglang_plugin.points import continue_to_point

    return continue_to_point(original, adder, req)


def around_handle_finish_state_updated_req(
    original: Callable[..., Any], processor: Any, req: Any, *args: Any, **kw: Any
) -> Any:
    """Keep states of a running reply."""
    from engram.sglang_plugin.points import keep_points_of_reply

    return keep_points_of_reply(original, processor, req, *args, **kw)


def around_mamba_track_grid(original: Callable[..., int], tree_page: int) -> int:
    """Track the state of a running reply at every page, where pages are larger than a token."""
    from engram.sglang_plugin.points import track_whole_pages

    if "whole pages" not in _in_use:
        return original(tree_page)
    return track_whole_pages(original, tree_page)


def around_deterministic_id(original: Callable[..., str], *args: Any) -> str:
    """Tell adapters apart by what they hold."""
    from engram.sglang_plugin.adapters import adapter_id

    return adapter_id(original, *args)


def around_update_weights_from_disk(original: Callable[..., Any], *args: Any) -> Any:
    """Name the new weights in the rank's namespace."""
    from engram.sglang_plugin.weights import update_from_disk

    return update_from_disk(original, *args)


def around_weight_update(original: Callable[..., Any], *args: Any) -> Any:
    """Give weights that no directory holds a name of their own."""
    from engram.sglang_plugin.weights import update_at_runtime

    return update_at_runtime(original, *args)


def around_update_weights_from_ipc(original: Callable[..., Any], *args: Any) -> Any:
    """The same, for the update that needs no session."""
    from engram.sglang_plugin.weights import update_from_ipc

    return update_from_ipc(original, *args)


def around_release_memory_occupation(original: Callable[..., Any], *args: Any) -> Any:
    """Finish the copies before their memory is unmapped."""
    from engram.sglang_plugin.weights import release_memory

    return release_memory(original, *args)


HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    "sglang.srt.server_args.ServerArgs.add_cli_args": (after_add_cli_args, "after"),
    "sglang.srt.server_args.ServerArgs.from_cli_args": (around_from_cli_args, "around"),
    "sglang.srt.entrypoints.http_server.launch_server": (around_launch_server, "around"),
    "sglang.srt.entrypoints.http_server._setup_and_run_http_server": (
        before_setup_and_run_http_server,
        "before",
    ),
    "sglang.srt.mem_cache.registry.create_unified_radix_cache": (
        around_create_unified_radix_cache,
        "around",
    ),
    "sglang.srt.managers.scheduler.Scheduler.init_ipc_channels": (
        after_init_ipc_channels,
        "after",
    ),
    "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher": (
        after_init_request_dispatcher,
        "after",
    ),
    "sglang.srt.mem_cache.cpp_utils.native_hash.get_native_hash": (
        around_get_native_hash,
        "around",
    ),
    ADDER + "_select_prefill_admission": (around_select_prefill_admission, "around"),
    ADDER + "add_chunked_req": (around_add_chunked_req, "around"),
    RESULTS + "_handle_finish_state_updated_req": (
        around_handle_finish_state_updated_req,
        "around",
    ),
    "sglang.srt.runtime_context.mamba_track_grid": (around_mamba_track_grid, "around"),
    "sglang.srt.lora.lora_registry.LoRARef.deterministic_id": (around_deterministic_id, "around"),
    WEIGHTS + "update_weights_from_disk": (around_update_weights_from_disk, "around"),
    WEIGHTS + "update_weights_from_tensor": (around_weight_update, "around"),
    WEIGHTS + "update_weights_from_distributed": (around_weight_update, "around"),
    WEIGHTS + "update_weights_from_ipc": (around_update_weights_from_ipc, "around"),
    WEIGHTS + "begin_weight_update": (around_weight_update, "around"),
    WEIGHTS + "end_weight_update": (around_weight_update, "around"),
    WEIGHTS + "release_memory_occupation": (around_release_memory_occupation, "around"),
}
"""Upstream's name -> (our hook, how it is applied)."""
