"""What Engram rests on in SGLang: every name it hooks, overrides or calls, with its shape.

SGLang calls none of these public.  If one is missing or has other parameters, running on would mean
running half-hooked, so a server with persistence on stops at launch and says which.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, NoReturn

from engram.version import SUPPORTED_SGLANG

SRT: Final = "sglang.srt."
TREE: Final = SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache."
LINKER: Final = SRT + "mem_cache.unified_cache.unified_cache_linker."
HTTP: Final = SRT + "entrypoints.http_server."
TOKENIZER: Final = SRT + "managers.tokenizer_manager.TokenizerManager."
SCHEDULER: Final = SRT + "managers.scheduler.Scheduler."
CHAT: Final = SRT + "entrypoints.openai.serving_chat.OpenAIServingChat."
RESPONSES: Final = SRT + "entrypoints.openai.serving_responses.OpenAIServingResponses."
WEIGHTS: Final = SRT + "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
ADDER: Final = SRT + "managers.schedule_policy.PrefillAdder."
RESULTS: Final = (
    SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
)
STATES: Final = SRT + "mem_cache.unified_cache.components.mamba.MambaComponent."
STATE_POOL: Final = SRT + "mem_cache.memory_pool.HybridReqToTokenPool."

EXPECTED: Final[dict[str, str]] = {
    SRT + "server_args.ServerArgs.add_cli_args": "parser",
    SRT + "server_args.ServerArgs.from_cli_args": "cls, args",
    HTTP
    + "launch_server": "server_args, init_tokenizer_manager_func=, run_scheduler_process_func=, "
    "run_detokenizer_process_func=, execute_warmup_func=, launch_callback=",
    HTTP + "_setup_and_run_http_server": "server_args, tokenizer_manager, template_manager, "
    "port_args, scheduler_infos, subprocess_watchdog, execute_warmup_func=, launch_callback=",
    SRT + "configs.update_config.adjust_config_with_unaligned_cpu_tp": "model_config, "
    "load_config, tp_size",
    SRT + "mem_cache.registry.create_unified_radix_cache": "ctx, *, cache_class=",
    SRT + "mem_cache.cpp_utils.native_hash.get_native_hash": "token_ids, prior_digest, page_size=",
    SRT + "mem_cache.cpp_utils.native_hash._native_hash_input": "token_ids",
    SRT + "mem_cache.utils.storage_namespace_seed": "extra_key, cache_salt",
    SCHEDULER + "init_ipc_channels": "self, port_args",
    SCHEDULER + "init_request_dispatcher": "self",
    TREE + "init_cache_linker": "self, cache_linker",
    TREE + "checkpoint": "self, req, *, up_to, **kwargs",
    TREE + "insert": "self, params",
    TREE + "check_hicache_events": "self",
    TREE + "reset": "self",
    TREE + "_all_reduce_attn_groups": "self, tensor, op",
    TREE + "match_prefix": "self, params",
    TREE + "lock": "self, node_id, skip_lock_components=",
    TREE + "unlock": "self, lock",
    TREE + "path_device_indices": "self, node",
    TREE + "full_evictable_size": "self",
    TREE + "full_protected_size": "self",
    TREE + "mamba_evictable_size": "self",
    TREE + "mamba_protected_size": "self",
    LINKER + "UnifiedCacheLinkerWrapper.match": "self, key, req, result",
    LINKER + "UnifiedCacheLinkerWrapper.release_request": "self, rid",
    LINKER + "UnifiedCacheLinker.lookup": "self, rid, transfers",
    LINKER + "UnifiedCacheLinker.load": "self, rid, transfers",
    LINKER + "UnifiedCacheLinker.start_layer_wise_loading": "self",
    LINKER + "UnifiedCacheLinker.finish_layer_wise_loading": "self, counter_index",
    LINKER + "UnifiedCacheLinker.cancel_queued_load": "self, rid",
    LINKER + "UnifiedCacheLinker.offload": "self, transfers, session_id=",
    LINKER + "UnifiedCacheLinker.num_completed_offloads": "self",
    LINKER + "UnifiedCacheLinker.pop_completed_offload": "self",
    LINKER + "UnifiedCacheLinker.reset": "self",
    LINKER + "UnifiedCacheLinker.close": "self",
    LINKER + "LayerWiseLoadCounter.__init__": "self, num_layers, on_layer_ready=",
    LINKER + "LayerWiseLoadCounter.update_producer": "self",
    LINKER + "LayerWiseLoadCounter.complete": "self, index, layer",
    LINKER + "LayerWiseLoadCounter.fail": "self, index, error",
    LINKER + "LayerWiseLoadCounter.finish": "self, index",
    SRT + "mem_cache.memory_pool.HybridReqToTokenPool.register_layer_transfer_counter": "self, "
    "layer_transfer_counter",
    STATES + "prepare_for_caching_req": "self, req, insert_params, token_ids_len, is_finished",
    STATES + "_alloc_mamba_slot": "self, req=",
    STATE_POOL + "get_mamba_ping_pong_keep_idx": "self, req",
    STATE_POOL + "set_mamba_ping_pong_slot": "self, req, idx, value",
    STATE_POOL + "translate_mamba_indices": "self, mamba_indices",
    SRT + "mem_cache.memory_pool.MambaPool.copy_from": "self, src_indices, dst_indices",
    ADDER + "_select_prefill_admission": "self, req, *, total_tokens, host_hit_length, "
    "swa_host_hit_length, truncation_align_size, has_chunked_req=",
    ADDER + "add_chunked_req": "self, req",
    RESULTS + "_handle_finish_state_updated_req": "self, req, batch, result, i, logits_output",
    SRT + "runtime_context.mamba_track_grid": "tree_page",
    SRT + "managers.schedule_batch.Req.refresh_fill_ids": "self",
    SRT + "lora.lora_registry.LoRARef.deterministic_id": "lora_name, lora_path",
    TOKENIZER + "generate_request": "self, obj, request=",
    TOKENIZER + "auto_create_handle_loop": "self",
    SRT + "entrypoints.engine.Engine.__init__": "self, **kwargs",
    SRT + "entrypoints.engine.Engine.shutdown": "self",
    TOKENIZER + "_dispatch_to_scheduler": "self, obj",
    TOKENIZER + "_send_one_request": "self, tokenized_obj",
    TOKENIZER + "_send_batch_request": "self, tokenized_objs",
    TOKENIZER + "sigterm_watchdog": "self",
    TOKENIZER + "_handle_batch_output": "self, recv_obj",
    TOKENIZER + "update_weights_from_disk": "self, obj, request=",
    TOKENIZER + "update_weights_from_tensor": "self, obj, request=",
    TOKENIZER + "update_weights_from_distributed": "self, obj, request=",
    TOKENIZER + "update_weights_from_ipc": "self, obj, request=",
    TOKENIZER + "begin_weight_update": "self, obj, request=",
    TOKENIZER + "end_weight_update": "self, obj, request=",
    TOKENIZER + "release_memory_occupation": "self, obj, request=",
    WEIGHTS + "update_weights_from_disk": "self, recv_req",
    WEIGHTS + "update_weights_from_tensor": "self, recv_req",
    WEIGHTS + "update_weights_from_distributed": "self, recv_req",
    WEIGHTS + "update_weights_from_ipc": "self, recv_req",
    WEIGHTS + "begin_weight_update": "self, recv_req",
    WEIGHTS + "end_weight_update": "self, recv_req",
    WEIGHTS + "release_memory_occupation": "self, recv_req",
    CHAT + "handle_request": "self, request, raw_request",
    CHAT + "_process_messages": "self, request, is_multimodal, *, output_constrained=",
    CHAT + "_handle_streaming_request": "self, adapted_request, request, raw_request",
    CHAT + "_handle_non_streaming_request": "self, adapted_request, request, raw_request",
    CHAT + "_convert_to_internal_request": "self, request, raw_request=",
    CHAT + "_render_and_encode_chat_template": "self, messages, *, tools, template_kwargs, "
    "encode_kwargs, use_cache, add_generation_prompt=",
    RESPONSES + "create_responses": "self, request, raw_request=",
    RESPONSES + "retrieve_responses": "self, response_id",
    RESPONSES + "cancel_responses": "self, response_id",
    RESPONSES + "create_error_response": "self, message, err_type=, status_code=, param=",
    RESPONSES + "responses_full_generator": "self, request, sampling_params, result_generator, "
    "context, model_name, tokenizer, request_metadata, created_time=, *, require_reasoning, "
    "output_items=, tool_adapter=",
    RESPONSES + "_run_background_request": "self, request, sampling_params, result_generator, "
    "context, model_name, tokenizer, request_metadata, created_time=, *, require_reasoning, "
    "tool_adapter=",
    RESPONSES + "responses_stream_generator_non_harmony": "self, request, sampling_params, "
    "result_generator, model_name, tokenizer, request_metadata, created_time=, *, "
    "require_reasoning, tool_adapter=",
    SRT + "managers.io_struct.hook_custom_types": "*new_types",
    SRT + "managers.io_struct.sock_send": "socket, obj, flags=",
    SRT + "utils.auth.auth_level": "level",
}
"""Upstream's name -> its parameters; `name=` has a default."""


@dataclass(frozen=True)
class Problem:
    """A name that is not as expected; `found` is empty when it is missing."""

    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        if not self.found:
            return f"{self.name} is missing"
        return f"{self.name} takes ({self.found}), expected ({self.expected})"


def shape(function: Callable[..., Any]) -> str:
    """The parameters of a callable, without annotations and the values of defaults."""
    parts: list[str] = []
    star = False
    # Through class methods and through our own wrappers, to what upstream wrote.
    plain = inspect.unwrap(getattr(function, "__func__", function))
    for parameter in inspect.signature(plain).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts.append(f"*{parameter.name}")
            star = True
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        default = "" if parameter.default is parameter.empty else "="
        parts.append(parameter.name + default)
    return ", ".join(parts)


def problems(expected: Mapping[str, str] = EXPECTED) -> list[Problem]:
    """Everything that is not as expected in the SGLang that is installed."""
    found = []
    for name, wanted in expected.items():
        try:
            target = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            found.append(Problem(name, wanted, ""))
            continue
        actual = shape(target)
        if actual != wanted:
            found.append(Problem(name, wanted, actual))
    return found


def installed_sglang() -> str:
    """The version of the SGLang that is installed."""
    return version("sglang")


def unapplied(targets: Iterable[str]) -> list[str]:
    """Hooks that SGLang registered but did not apply (it only logs such a failure)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [target for target in targets if target not in HookRegistry._patched]


def require_whole(targets: Iterable[str]) -> None:
    """Stop the process unless SGLang is as expected and every hook is in place."""
    wrong = [str(problem) for problem in problems()]
    wrong += [f"the hook on {target} was not applied" for target in unapplied(targets)]
    if wrong:
        _stop(wrong)


def _stop(wrong: list[str]) -> NoReturn:
    lines = "\n  ".join(wrong)
    raise SystemExit(
        f"engram: error: this SGLang ({installed_sglang()}) is not the supported one "
        f"({SUPPORTED_SGLANG}):\n  {lines}\n"
        f"engram: install sglang=={SUPPORTED_SGLANG}, or start without "
        "--enable-snapshot-persistence"
    )


def hook_type(kind: str) -> Any:
    """SGLang's name for a way to hook."""
    from sglang.srt.plugins.hook_registry import HookType

    return HookType(kind)
