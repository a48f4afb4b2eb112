"""Puts this package's kernels in the place of those of SGLang that need an accelerator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engram.sglang_plugin.cpu import causal_conv, mamba2, selective_state, tracking
from engram.sglang_plugin.cpu.platform import is_active
from engram.version import SUPPORTED_SGLANG


@dataclass(frozen=True)
class Patch:
    """One upstream name and what takes its place.

    `undefined` says that SGLang imports the name only for certain accelerators, so that on a CPU
    the module exists and the name does not.
    """

    module: str
    name: str
    replacement: Callable[..., Any]
    undefined: bool = False

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"


_MIXER = "sglang.srt.layers.attention.mamba.mamba"
_BACKEND = "sglang.srt.layers.attention.hybrid_linear_attn_backend"

# In the modules that call them: `from x import y` gave each its own binding.
MAMBA2_PATCHES = (
    Patch(_MIXER, "causal_conv1d_fn", causal_conv.causal_conv1d_fn, undefined=True),
    Patch(_MIXER, "causal_conv1d_fn_triton", causal_conv.causal_conv1d_fn, undefined=True),
    Patch(_MIXER, "causal_conv1d_update", causal_conv.causal_conv1d_update, undefined=True),
    Patch(
        _MIXER,
        "causal_conv1d_update_triton",
        causal_conv.causal_conv1d_update,
        undefined=True,
    ),
    Patch(_MIXER, "mamba_chunk_scan_combined", mamba2.mamba_chunk_scan_combined),
    Patch(_MIXER, "selective_state_update", selective_state.selective_state_update),
    Patch(_BACKEND, "track_mamba_states_if_needed", tracking.track_mamba_states_if_needed),
    Patch(
        _BACKEND,
        "track_mamba_states_all_layers",
        tracking.track_mamba_states_all_layers,
    ),
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
    targets = [_apply(patch) for patch in MAMBA2_PATCHES]
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign,assignment]
    return [*targets, "torch.Tensor.pin_memory"]


def _apply(patch: Patch) -> str:
    try:
        module = importlib.import_module(patch.module)
    except ImportError as error:
        raise _unsupported(patch.target) from error
    if not patch.undefined and not hasattr(module, patch.name):
        raise _unsupported(patch.target)
    setattr(module, patch.name, patch.replacement)
    return patch.target


def _unsupported(target: str) -> RuntimeError:
    return RuntimeError(
        f"SGLang has no {target}, which Engram replaces to serve on a CPU. "
        f"Hint: install the version Engram supports, sglang=={SUPPORTED_SGLANG}."
    )


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return the tensor itself: without an accelerator nothing is copied from pinned memory.

    torch raises here instead, and `ScheduleBatch.prepare_for_decode` asks for it unconditionally
    under the `extra_buffer` strategy.
    """
    return self
