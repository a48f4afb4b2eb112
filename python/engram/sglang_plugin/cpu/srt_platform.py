"""The out-of-tree platform with which stock SGLang serves on a machine without an accelerator.

With it SGLang itself picks torch-native attention, allocators and cache writers, gloo instead of
PyNccl and the native rotary embedding, so that only the kernels listed in `patches` are replaced.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class EngramCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The CPU as a full platform of its own: no Triton, no graphs, no pinned memory."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        """Return "cpu": what SGLang takes for `--device` where it is not given, so a string."""
        return self.device_type

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def support_mamba_cache_extra_buffer(self) -> bool:
        """True: `tracking` copies states and `mamba2` returns those at chunk boundaries."""
        return True
