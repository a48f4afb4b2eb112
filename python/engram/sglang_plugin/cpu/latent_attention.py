"""Multi-head latent attention (MLA) on the CPU: always in its absorbed form.

SGLang has a handler for each attention backend that chooses how an MLA layer computes, and takes
that of Triton where a backend has none, as `torch_native`. That one has a prefill hand over keys
and values of full size, which are in no pool; but `TorchNativeAttnBackend.forward_extend` reads
keys and values from the pool, whatever it is handed, and there lie the latent ones. The replies are
wrong then, without an error where the two happen to have one width.
"""

from __future__ import annotations

import importlib
from typing import Any

_HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler"
_BACKEND = "torch_native"


def absorbed(attn: Any, forward_batch: Any) -> Any:
    """The way in which queries meet the latent keys and values as they lie in the pool."""
    del attn, forward_batch
    return importlib.import_module(_HANDLERS).AttnForwardMethod.MLA


def register() -> str:
    """Register the handler in this process; may be called again. Returns what it stands for.

    Raises:
        ImportError, AttributeError: if SGLang has no such registry.
    """
    importlib.import_module(_HANDLERS).AttentionBackendRegistry.register(_BACKEND, absorbed)
    return f"{_HANDLERS}.AttentionBackendRegistry[{_BACKEND}]"
