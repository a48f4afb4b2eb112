"""The native kernel, if it is installed: package `engram_kernel`, from the folder sgl-kernel.

Without it everything works on torch, only slower. `backend()` says which is in use, and why.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from engram.errors import UnsupportedError

if TYPE_CHECKING:
    from engram.conditional_memory.native import NativeKernel

_HINT = "pip install ./sgl-kernel in a checkout of Engram"


@cache
def load() -> NativeKernel | None:
    """The kernel, or None where `engram_kernel` is not installed.

    Raises:
        UnsupportedError: it is installed, but its version or library does not fit.
    """
    try:
        import engram_kernel
    except ModuleNotFoundError as error:
        if error.name != "engram_kernel":
            raise
        return None
    except OSError as error:
        raise UnsupportedError(
            f"engram_kernel cannot be loaded: {error}", hint=f"build it again: {_HINT}"
        ) from error
    from engram.conditional_memory.native import ABI_VERSION, NativeKernel

    found = getattr(engram_kernel, "ABI_VERSION", None)
    if found != ABI_VERSION:
        raise UnsupportedError(
            f"engram_kernel has ABI version {found}, this Engram needs {ABI_VERSION}",
            hint=f"build it again: {_HINT}",
        )
    return NativeKernel()


def usable(device: torch.device) -> bool:
    """Whether the kernel is installed and computes on ``device``."""
    return device.type == "cpu" and load() is not None


def require(device: torch.device) -> NativeKernel:
    """The kernel. Raises `UnsupportedError` if it is not `usable` on ``device``."""
    native = load()
    if native is None:
        raise UnsupportedError("the native kernel is not installed", hint=_HINT)
    if device.type != "cpu":
        raise UnsupportedError(f"the native kernel does not compute on {device}", hint="use torch")
    return native


def backend() -> str:
    """What hashes and gathers on a CPU, in one line for people."""
    if load() is not None:
        import engram_kernel

        return f"engram_kernel {engram_kernel.__version__} ({engram_kernel.instruction_set()})"
    return f"torch {torch.__version__} (the native kernel is not installed; {_HINT})"
