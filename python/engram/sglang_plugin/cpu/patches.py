"""Puts this package's kernels in the place of those of SGLang that need an accelerator."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from engram.sglang_plugin.cpu import (
    adapters,
    attention_free,
    causal_conv,
    delta_projection,
    experts,
    gated_delta,
    gated_norm,
    kimi_delta,
    latent_attention,
    mamba2,
    output_gates,
    selective_state,
    short_conv,
    tracking,
    wide_products,
)
from engram.sglang_plugin.cpu.platform import is_active
from engram.version import SUPPORTED_SGLANG


@dataclass(frozen=True)
class Patch:
    """One upstream name, where its callers look it up, and what takes its place.

    `name` may be that of a class's attribute, with a dot. `original` is what SGLang means there on
    an accelerator. On a CPU SGLang either binds the name to it all the same, or, for the
    convolutions, leaves the name undefined. A replacement `around` the original gets it as its
    first argument.
    """

    module: str
    name: str
    original: str
    replacement: Any
    around: bool = False

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"


_MIXER = "sglang.srt.layers.attention.mamba.mamba"
_CONV = "sglang.srt.layers.attention.mamba.causal_conv1d"
_CONV_TRITON = "sglang.kernels.ops.mamba.causal_conv1d_triton"
_SSD = "sglang.kernels.ops.mamba.triton_ops"
_BACKEND = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_SCATTER = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"

# In the modules that call them: `from x import y` gave each its own binding.
MAMBA2_PATCHES = (
    Patch(_MIXER, "causal_conv1d_fn", f"{_CONV}.causal_conv1d_fn", causal_conv.causal_conv1d_fn),
    Patch(
        _MIXER,
        "causal_conv1d_fn_triton",
        f"{_CONV_TRITON}.causal_conv1d_fn",
        causal_conv.causal_conv1d_fn,
    ),
    Patch(
        _MIXER,
        "causal_conv1d_update",
        f"{_CONV}.causal_conv1d_update",
        causal_conv.causal_conv1d_update,
    ),
    Patch(
        _MIXER,
        "causal_conv1d_update_triton",
        f"{_CONV_TRITON}.causal_conv1d_update",
        causal_conv.causal_conv1d_update,
    ),
    Patch(
        _MIXER,
        "mamba_chunk_scan_combined",
        f"{_SSD}.mamba_chunk_scan_combined",
        mamba2.mamba_chunk_scan_combined,
    ),
    Patch(
        _MIXER,
        "selective_state_update",
        f"{_SSD}.selective_state_update",
        selective_state.selective_state_update,
    ),
    Patch(
        _BACKEND,
        "track_mamba_states_if_needed",
        f"{_SCATTER}.track_mamba_states_if_needed",
        tracking.track_mamba_states_if_needed,
    ),
    Patch(
        _BACKEND,
        "track_mamba_states_all_layers",
        f"{_SCATTER}.track_mamba_states_all_layers",
        tracking.track_mamba_states_all_layers,
    ),
)

# `ModelRunner.load_model` calls it on a CPU, and divides by a number of heads that may not be.
ATTENTION_FREE_PATCHES = (
    Patch(
        "sglang.srt.model_executor.model_runner",
        "adjust_config_with_unaligned_cpu_tp",
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        attention_free.adjust_config_with_unaligned_cpu_tp,
    ),
)


def _at_home(module: str, **replacements: Any) -> tuple[Patch, ...]:
    """Patches of names where they are defined; `_rebind` finds who has imported them before."""
    return tuple(Patch(module, name, f"{module}.{name}", new) for name, new in replacements.items())


_CONVOLUTIONS: dict[str, Any] = {
    "causal_conv1d_fn": causal_conv.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv.causal_conv1d_update,
}
_FLA = "sglang.kernels.ops.attention.fla"
_LINEAR = "sglang.kernels.ops.attention.linear"
_KERNELS = "sglang.srt.layers.attention.linear.kernels"

# Mamba-1's mixer, LFM2 and the delta rules call these too, from modules of their own.
SHARED_PATCHES = (
    *_at_home(_CONV, **_CONVOLUTIONS),
    *_at_home(_CONV_TRITON, **_CONVOLUTIONS),
    *_at_home(_SSD, selective_state_update=selective_state.selective_state_update),
)

# `Lfm2MoeShortConv.forward` asks it whether its fused kernels can serve.
SHORT_CONV_PATCHES = _at_home(
    "sglang.kernels.ops.mamba.lfm_short_conv",
    can_dispatch_fused_lfm_short_conv=short_conv.can_dispatch_fused_lfm_short_conv,
)

# `GDNAttnBackend` and `KDAAttnBackend` with their Triton kernels, and the layers around them. A
# packed decode is one more kernel for what the function it skips does.
DELTA_PATCHES = (
    *_at_home(f"{_FLA}.chunk", chunk_gated_delta_rule=gated_delta.chunk_gated_delta_rule),
    *_at_home(f"{_FLA}.kda", chunk_kda=kimi_delta.chunk_kda),
    *_at_home(
        f"{_LINEAR}.fused_sigmoid_gating_recurrent",
        fused_sigmoid_gating_delta_rule_update=gated_delta.fused_sigmoid_gating_delta_rule_update,
    ),
    *_at_home(f"{_LINEAR}.fused_gdn_gating", fused_gdn_gating=gated_delta.fused_gdn_gating),
    *_at_home(f"{_KERNELS}.gdn_triton", **{"TritonGDNKernel.supports_packed_decode": False}),
    *_at_home(f"{_KERNELS}.kda_triton", **{"TritonKDAKernel.supports_packed_decode": False}),
    *_at_home(
        "sglang.kernels.ops.attention.triton_gdn_fused_proj",
        fused_qkvzba_split_reshape_cat=delta_projection.fused_qkvzba_split_reshape_cat,
        fused_qkvzba_split_reshape_cat_contiguous=(
            delta_projection.fused_qkvzba_split_reshape_cat_contiguous
        ),
    ),
    *_at_home(
        f"{_FLA}.fused_norm_gate",
        **{"FusedRMSNormGated.forward": gated_norm.fused_rms_norm_gated_forward},
    ),
    *_at_home(f"{_FLA}.layernorm_gated", **{"RMSNorm.forward": gated_norm.rms_norm_gated_forward}),
    *_at_home(
        "sglang.kernels.ops.elementwise.elementwise",
        fused_sigmoid_mul=output_gates.fused_sigmoid_mul,
        sigmoid_gate_mul_broadcast=output_gates.sigmoid_gate_mul_broadcast,
        fused_gate_sigmoid_mul=output_gates.fused_gate_sigmoid_mul,
        fused_gate_sigmoid_mul_add=output_gates.fused_gate_sigmoid_mul_add,
    ),
)

# `UnquantizedFusedMoEMethod.forward_cpu` imports it at every call.
_NATIVE_EXPERTS = "sglang.srt.layers.moe.fused_moe_native"
EXPERT_PATCHES = (
    Patch(
        _NATIVE_EXPERTS,
        "moe_forward_native",
        f"{_NATIVE_EXPERTS}.moe_forward_native",
        experts.moe_forward_native,
        around=True,
    ),
)

# Names where they are defined come last: those before are checked against the true originals.
PATCHES = (
    *MAMBA2_PATCHES,
    *ATTENTION_FREE_PATCHES,
    *SHARED_PATCHES,
    *SHORT_CONV_PATCHES,
    *DELTA_PATCHES,
    *EXPERT_PATCHES,
)


def install() -> list[str]:
    """Replace SGLang's accelerator-only functions in this process, where the CPU platform serves.

    Does nothing where another platform serves. May be called again.

    Returns:
        The full names of what is replaced; empty where another platform serves.

    Raises:
        RuntimeError: if SGLang lacks a name that is to be replaced, so is not the version this was
            written for.
    """
    if not is_active():
        return []
    originals = [_value_of(patch.original) for patch in PATCHES]
    targets = [apply_patch(patch) for patch in PATCHES]
    _rebind(PATCHES, originals)
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign,assignment]
    torch.get_device_module = _get_device_module  # type: ignore[assignment]
    registered = [wide_products.register(), latent_attention.register(), *adapters.register()]
    return [*targets, "torch.Tensor.pin_memory", "torch.get_device_module", *registered]


def apply_patch(patch: Patch) -> str:
    """Put one replacement in place; return the full name of what it replaces."""
    module = _find(patch.module)
    original = _value_of(patch.original)
    *inside, name = patch.name.split(".")
    owner: Any = module
    for part in inside:
        owner = getattr(owner, part, None)
        if owner is None:
            raise _unsupported(patch.target)
    if getattr(owner, name, original) not in (original, patch.replacement):
        raise _unsupported(f"{patch.target} that is {patch.original}")
    setattr(owner, name, _put_around(original, patch) if patch.around else patch.replacement)
    return patch.target


def _put_around(original: Any, patch: Patch) -> Any:
    """The replacement with the original bound to it; once, however often it is applied."""
    if isinstance(original, functools.partial) and original.func is patch.replacement:
        return original
    return functools.partial(patch.replacement, original)


def _rebind(patches: Sequence[Patch], originals: Sequence[Any]) -> None:
    """Give the modules that imported by name what is replaced at home its replacement as well."""
    replacements = {
        id(original): patch.replacement
        for patch, original in zip(patches, originals, strict=True)
        if patch.target == patch.original
        and not patch.around
        and callable(original)
        and original is not patch.replacement
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                if id(value) in replacements:
                    setattr(module, key, replacements[id(value)])


def _value_of(target: str) -> Any:
    """What SGLang has under a full name, of a module's member or of a class's."""
    module, _, name = target.rpartition(".")
    *_, last = module.split(".")
    if last[:1].isupper():
        module, _, owner = module.rpartition(".")
        value = getattr(getattr(_find(module), owner, None), name, None)
    else:
        value = getattr(_find(module), name, None)
    if value is None:
        raise _unsupported(target)
    return value


def _find(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _unsupported(module) from error


def _unsupported(target: str) -> RuntimeError:
    return RuntimeError(
        f"SGLang has no {target}, which Engram replaces to serve on a CPU. "
        f"Hint: install the version Engram supports, sglang=={SUPPORTED_SGLANG}."
    )


_torch_get_device_module = torch.get_device_module


# Dynamo looks for what torch's own function wraps.
@functools.wraps(_torch_get_device_module)
def _get_device_module(device: Any = None) -> Any:
    """Where no device is named, that of the CPU.

    A torch built for CUDA names `torch.cuda` here although there is none; SGLang synchronises it at
    the end of `/release_memory_occupation`, in the scheduler, which ends with an error.
    """
    return _torch_get_device_module("cpu" if device is None else device)


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return the tensor itself: without an accelerator nothing is copied from pinned memory.

    torch raises here instead, and `ScheduleBatch.prepare_for_decode` asks for it unconditionally
    under the `extra_buffer` strategy.
    """
    return self
