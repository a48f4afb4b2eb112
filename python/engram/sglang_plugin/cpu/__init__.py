"""What stock SGLang needs to serve on a machine without an accelerator.

| concern | module |
|---|---|
| the platform SGLang is told to be on | `platform` |
| which SGLang functions are replaced, and by what | `patches` |
| causal convolution, prefill and decode | `causal_conv` |
| Mamba-2 scan, prefill | `mamba2` |
| selective state update, decode | `selective_state` |
| models without attention heads | `attention_free` |
| state copies of the `extra_buffer` strategy | `tracking` |
"""

from engram.sglang_plugin.cpu.patches import install
from engram.sglang_plugin.cpu.platform import is_active

__all__ = ["install", "is_active"]
