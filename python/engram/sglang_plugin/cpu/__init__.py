"""What stock SGLang needs to serve on a machine without an accelerator.

| concern | module |
|---|---|
| the platform SGLang is told to be on | `platform` |
| which SGLang functions are replaced, and by what | `patches` |
| causal convolution, prefill and decode | `causal_conv` |
| Mamba-2 scan, prefill | `mamba2` |
| selective state update, decode | `selective_state` |
| which way short convolutions go (LFM2) | `short_conv` |
| the delta rule, prefill and decode | `delta_rule` |
| how gated delta nets call it (Qwen3-Next, Qwen3.5) | `gated_delta` |
| how Kimi delta attention calls it | `kimi_delta` |
| what a delta net's projections give, taken apart | `delta_projection` |
| norms with a gate | `gated_norm` |
| gates on outputs | `output_gates` |
| how latent attention computes (Kimi-Linear) | `latent_attention` |
| experts without a gate, and their factor | `experts` |
| matrix products wider than their operands | `wide_products` |
| models without attention heads | `attention_free` |
| state copies of the `extra_buffer` strategy | `tracking` |
"""

from engram.sglang_plugin.cpu.patches import install
from engram.sglang_plugin.cpu.platform import is_active

__all__ = ["install", "is_active"]
