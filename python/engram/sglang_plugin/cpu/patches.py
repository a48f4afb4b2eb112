"""Puts this package's kernels in the place of those of SGLang that need an accelerator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from engram.sglang_plugin.cpu import (
    attention_free,
    causal_conv,
    mamba2,
    selective_state,
    tracking,
)
from engram.sglang_plugin.cpu.platform import is_active
from engram.version import SUPPORTED_SGLANG


@dataclass(frozen=True)
class Patch:
    """One upstream name, where its callers look it up, and what takes its place.

    `original` is the function SGLang means there on an accelerator. On a CPU SGLang either binds
    the name to it all the same, or, for the convolutions, leaves the name undefined.
    """

    module: str
    name: str
    original: str
    replacement: Callable[..., Any]

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

PATCHES = (*MAMBA2_PATCHES, *ATTENTION_FREE_PATCHES)


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
    targets = [apply_patch(patch) for patch in PATCHES]
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign,assignment]
    torch.get_device_module = _get_device_module  # type: ignore[assignment]
    return [*targets, "torch.Tensor.pin_memory", "torch.get_device_module"]


def apply_patch(patch: Patch) -> str:
    """Put one replacement in place; return the full name of what it replaces."""
    module = _find(patch.module)
    original_module, _, original_name = patch.original.rpartition(".")
    original = getattr(_find(original_module), original_name, None)
    if original is None:
        raise _unsupported(patch.original)
    if getattr(module, patch.name, original) not in (original, patch.replacement):
        raise _unsupported(f"{patch.target} that is {patch.original}")
    setattr(module, patch.name, patch.replacement)
    return patch.target


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
