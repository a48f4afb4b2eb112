"""LoRA adapters on a CPU: SGLang's torch backend for them asks for pinned memory, which is for
copies to an accelerator and which torch refuses to allocate without one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Final

import torch

MODULES: Final = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
"""Where `torch.tensor` and `torch.zeros` are called with `pin_memory=True`."""


class Unpinned(ModuleType):
    """`torch` as a module sees it, whose constructors of tensors pin nothing."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kw: Any) -> torch.Tensor:
        """`torch.tensor` in memory of the usual kind."""
        return torch.tensor(*args, **kw)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kw: Any) -> torch.Tensor:
        """`torch.zeros` in memory of the usual kind."""
        return torch.zeros(*args, **kw)


def register() -> list[str]:
    """Give the modules such a `torch`; the names of what is replaced."""
    for name in MODULES:
        module: Any = importlib.import_module(name)
        if not isinstance(module.torch, Unpinned):
            module.torch = Unpinned()
    return [f"{name}.torch" for name in MODULES]
