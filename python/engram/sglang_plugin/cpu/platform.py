"""Whether this machine is one for the CPU platform: entry point group `sglang.srt.platforms`.

Nothing here imports sglang: SGLang loads the entry point while its own platform modules are still
being imported. The platform class is in `srt_platform`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

ENTRY_POINT = "engram_cpu"
_CLASS_PATH = "engram.sglang_plugin.cpu.srt_platform:EngramCpuPlatform"

# Present when a CUDA or Ascend driver is loaded, even where torch cannot use the device. (AMD's
# /dev/kfd says nothing: every laptop with an integrated Radeon has it. A ROCm build of torch does.)
_DEVICE_NODES = ("/dev/nvidiactl", "/dev/davinci_manager")


def activate() -> str | None:
    """Return the platform's `module:Class` where nothing but the CPU can serve, else None.

    None leaves the choice to SGLang. It is the answer on any doubt: an accelerator that torch can
    use or that only has a driver loaded (a broken installation its owner wants to hear of),
    `SGLANG_USE_CPU_ENGINE=1` (SGLang's own CPU engine), or a check that itself fails.
    `SGLANG_PLATFORM=engram_cpu` asks for this platform by name and skips the driver check.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    try:
        if _torch_has_accelerator():
            return None
        asked_for = os.environ.get("SGLANG_PLATFORM") == ENTRY_POINT
        if not asked_for and any(Path(node).exists() for node in _DEVICE_NODES):
            return None
    except (AssertionError, AttributeError, ImportError, OSError, RuntimeError):
        # A device check that raises says that some device stack is installed: not ours to judge.
        return None
    return _CLASS_PATH


def is_active() -> bool:
    """Return whether SGLang uses this platform in this process."""
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected and selected != ENTRY_POINT:
        return False
    return activate() is not None


def _torch_has_accelerator() -> bool:
    """Return whether torch can use another device than the CPU, or was built for only such."""
    if torch.accelerator.is_available() or torch.cuda.is_available():
        return True
    if any(getattr(torch.version, name, None) is not None for name in ("hip", "musa")):
        return True
    for name in ("xpu", "mps", "npu", "hpu"):
        module: Any = getattr(torch, name, None)
        if module is not None and module.is_available():
            return True
    return False
